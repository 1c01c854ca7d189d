"""The layout-parity certificate: its layouts, its output and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from composing import ROOT, config_of, quick_tree_of, unstarted_environment

from mixtrain.config.choices import Dispatcher
from mixtrain.config.layout_sensitive import LIMITS
from mixtrain.config.rules import upstream
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra
from mixtrain.proof.parity import table
from mixtrain.proof.parity.certificate import (
    MICROBATCHES,
    Certificate,
    comparable,
    compare_layout,
    run_one_rank,
)
from mixtrain.proof.parity.layouts import ParityLayout, all_layouts
from mixtrain.training import measured_step
from mixtrain.training.compare_steps import TOLERANCES, Verdict, judge

pytestmark = pytest.mark.long
SIZES = ["+shrink=parity", "checkpoint=none"]
ALLGATHER = Dispatcher.allgather


def shrunk(*words: str) -> Config:
    return from_hydra(quick_tree_of(*words, *SIZES))


@pytest.fixture(scope="module")
def default():
    return comparable(shrunk())


def test_all_layouts_of_up_to_eight_ranks_are_there_once(default):
    plans, left_out = default
    every = list(all_layouts())
    assert len(every) == len(set(every)) and not left_out
    assert {layout.ranks for layout in plans} == {1, 2, 4, 8}
    assert next(iter(plans)) == ParityLayout()
    for axis in ("tp", "cp", "pp", "ep", "etp"):
        assert {getattr(layout, axis) for layout in plans} == {1, 2, 4, 8}, axis
    assert {layout.vpp for layout in plans} == {layout.instances for layout in plans} == {1, 2}
    assert Counter(layout.dispatcher for layout in plans)[ALLGATHER] == len(plans) / 2
    for layout in (
        ParityLayout.on(2, tp=2),
        ParityLayout.on(4, tp=2, pp=2),
        ParityLayout.on(2, tp=2, ep=2),
        ParityLayout.on(4, tp=2, ep=2, etp=2),
        ParityLayout.on(2, cp=2),
        ParityLayout.on(8, pp=4, vpp=2, ep=2),
        ParityLayout.on(4, ep=2, instances=2),
    ):
        assert layout in plans


def test_a_plan_is_that_of_its_layout(default):
    layout = ParityLayout.on(8, tp=2, pp=2, vpp=2, ep=4, instances=1, dispatcher=ALLGATHER)
    plan = default[0][layout]
    parallel = plan.config.parallel
    assert (plan.world_size, plan.data_parallel_size, plan.expert_data_parallel_size) == (8, 2, 1)
    assert (parallel.virtual_pipeline_model_parallel_size, parallel.sequence_parallel) == (2, True)
    assert plan.config.dispatcher.moe_token_dispatcher_type is ALLGATHER
    assert str(layout) == "TP2xPP2xVPP2xEP4xDP2, allgather" and layout.axes == (
        "TP",
        "PP",
        "VPP",
        "EP",
        "DP",
    )


@pytest.mark.parametrize(
    "name", ["mixtral_8x7b_ep8_sinkhorn", "mixtral_8x22b_tp2_pp8_ep8", "qwen3_30b_a3b"]
)
def test_a_recipe_has_layouts_and_keeps_its_switches(name):
    config = shrunk(f"+recipe={name}")
    plans, _ = comparable(config)
    whole = config_of(f"+recipe={name}")
    assert len(plans) > 60
    assert (
        config.router == whole.router
        and config.model.transformer_impl is whole.model.transformer_impl
    )
    assert config.optimizer.use_distributed_optimizer == whole.optimizer.use_distributed_optimizer
    assert config.trainer.recompute_granularity == whole.trainer.recompute_granularity


def test_layouts_that_are_another_run_by_design_are_left_out_and_counted():
    plans, left_out = comparable(shrunk("router=sinkhorn"))
    assert all(layout.tp == layout.cp == 1 for layout in plans) and len(plans) > 100
    ((reason, count),) = left_out.items()
    assert "sinkhorn" in reason and count == sum(
        layout.tp * layout.cp > 1 for layout in all_layouts()
    )


def test_a_balanced_assignment_is_compared_where_no_other_is_near():
    plans, left_out = comparable(shrunk("router=balanced"))
    assert not left_out and all(layout.tp == layout.cp == 1 for layout in plans)
    assert {layout.ep for layout in plans} == {layout.dp for layout in plans} == {1, 2, 4, 8}


@pytest.mark.parametrize("router", ["global_aux_loss", "combined"])
def test_the_global_auxiliary_loss_is_compared_over_data_parallel_ranks(router, tmp_path):
    """Every layout has the same number of microbatches, since the counts run over them."""
    plans, left_out = comparable(
        shrunk(
            f"router={router}",
            "model.num_layers=2",
            "router.moe_aux_loss_coeff=1"
            if router == "global_aux_loss"
            else "router.moe_aux_loss_coeff=[1,1]",
        )
    )
    assert not left_out and {layout.dp for layout in plans} == {1, 2, 4, 8}
    assert {plan.num_microbatches for plan in plans.values()} == {MICROBATCHES}
    one = run_one_rank(plans[ParityLayout()], tmp_path / "one.pt", tmp_path)
    verdict = compare_layout(
        plans[ParityLayout.on(4, ep=2)], one, tmp_path / "one.pt", tmp_path / "four"
    )
    assert verdict.outside == [] and verdict.differences["parameter"] > 0


def test_no_microbatch_is_left_to_compare_where_ranks_and_the_step_are_both_balanced():
    both = [
        "router.moe_router_load_balancing_type=[global_aux_loss,aux_loss]",
        "router.moe_aux_loss_coeff=[1,1]",
    ]
    for words in (both, ["router=global_aux_loss", "dispatcher=drop"]):
        plans, left_out = comparable(shrunk(*words))
        assert all(layout.dp == 1 for layout in plans) and "aux_loss, a capacity" in " ".join(
            left_out
        )


def test_a_layout_at_which_megatron_is_wrong_is_left_out_with_the_upstream_file(monkeypatch):
    monkeypatch.setattr(upstream, "megatron_version", lambda: (0, 16))
    plans, left_out = comparable(shrunk("model.extra.calculate_per_token_loss=true"))
    assert all(layout.tp == layout.cp == 1 for layout in plans) and plans
    (reason,) = left_out
    assert "megatron/core/transformer/moe/router.py" in reason


def test_many_experts_become_few_and_still_a_choice(tmp_path):
    made = Certificate("qwen", shrunk("+recipe=qwen3_30b_a3b"), tmp_path)
    assert made.config.model.num_moe_experts == 2 * made.config.model.moe_router_topk == 16
    assert Certificate("default", shrunk(), tmp_path).config.model.num_moe_experts == 8


ONE = {
    "lm_loss": [5.0, 4.0],
    "balance": [1.0, 1.0],
    "grad_norm": [2.0, 2.0],
    "largest_gradients": {"a": [0.5], "decoder.layers.b": [0.5, 0.1]},
}
SHAPES = {"a": (4,), "decoder.layers.b": (2, 3)}


def ranks_result(**changes) -> list[dict]:
    """The result of one rank that has every tensor and differs nowhere."""
    parts = [
        ["a", None, "x", 4, 0.0, 0.0],
        ["decoder.layers.b", 0, "y", 3, 0.0, 0.0],
        ["decoder.layers.b", 1, "z", 3, 0.0, 0.0],
    ]
    return [
        {name: list(ONE[name]) for name in ("lm_loss", "balance", "grad_norm")}
        | {"parts": parts}
        | changes
    ]


def test_what_differs_nowhere_is_within_the_limits():
    assert str(judge(ONE, ranks_result(), SHAPES)) == "within the limits"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"lm_loss": [5.0001, 4.0]}, "lm_loss of step 1 on rank 0 differs by 2.0e-05, limit 1e-05"),
        (
            {"lm_loss": [float("nan"), 4.0]},
            "lm_loss of step 1 on rank 0 differs by inf, limit 1e-05",
        ),
        ({"balance": [None, 1.0]}, "balance of step 1 on rank 0 differs by inf, limit 1e-05"),
        (
            {"grad_norm": [2.0, 2.001]},
            "grad_norm of step 2 on rank 0 differs by 5.0e-04, limit 1e-05",
        ),
    ],
)
def test_a_figure_outside_its_limit_is_named(changes, says):
    assert str(judge(ONE, ranks_result(**changes), SHAPES)) == says


@pytest.mark.parametrize(
    "column, difference, says",
    [
        (4, 2e-5, "gradient of decoder.layers.1.b on rank 0 differs by 2.0e-04, limit 1e-04"),
        (5, 2e-5, "parameter of decoder.layers.1.b on rank 0 differs by 2.0e-05, limit 1e-05"),
        (4, float("inf"), "gradient of decoder.layers.1.b on rank 0 differs by inf, limit 1e-04"),
    ],
)
def test_a_tensor_outside_its_limit_is_named_with_its_layer(column, difference, says):
    (result,) = ranks_result()
    result["parts"][2][column] = difference
    assert str(judge(ONE, [result], SHAPES)) == f"{says}; the first tensor is decoder.layers.1.b"


def test_a_part_that_is_missing_is_outside():
    (result,) = ranks_result()
    result["parts"].pop(1)
    assert str(judge(ONE, [result], SHAPES)) == "decoder.layers.b: the ranks hold 3 of 6 elements"


def test_the_smallest_margin_of_every_choice_is_seen():
    import torch

    with measured_step.ChoiceMargin() as margin:
        torch.topk(torch.tensor([[-1.0, 3.0, 2.5, 2.25]]), k=2, dim=1)
        torch.tensor([[4.0, -1.0, 2.0]]).topk(1)
        # nothing that was never sent is a choice
        torch.topk(torch.tensor([0.5, 0.25, 0.0, 0.0]), k=3)
        torch.topk(torch.tensor([1.0, 1.0]), k=2)  # and neither is all there is
    assert margin.smallest == pytest.approx(0.25)
    with measured_step.ChoiceMargin() as margin:
        torch.topk(torch.tensor([0.5, 0.25]), k=1)  # scores: by their ratio
    assert margin.smallest == pytest.approx(0.6931, abs=1e-4)


def test_the_page_has_a_row_for_each_set_of_axes_and_names_what_is_outside():
    good = Verdict()
    bad = Verdict()
    bad.note("gradient", 0.5, "gradient of a on rank 1")
    verdicts = {ParityLayout(): good, ParityLayout.on(2, tp=2): good, ParityLayout.on(4, tp=4): bad}
    page = table.markdown("A title", [("made with", "x")], verdicts)
    assert "| nothing | 1 | 0.0e+00" in page and "| TP | 2 | " in page and "5.0e-01" in page
    assert (
        "* OUTSIDE at TP4, alltoall: gradient of a on rank 1 differs by 5.0e-01, limit 1e-04"
        in page
    )
    assert all(name in page for name in TOLERANCES)


def test_a_line_of_the_terminal_fits_it_and_stands_under_its_header():
    longest = max((layout for layout in all_layouts()), key=lambda layout: len(str(layout)))
    assert (
        len(table.HEADER) <= 100
        and len(table.line(longest, Verdict())) <= 100 + len(str(longest)) - table.NAME_WIDTH
    )
    ordinary = [layout for layout in all_layouts() if len(str(layout)) <= table.NAME_WIDTH]
    assert len(ordinary) > 0.9 * len(list(all_layouts()))


def parity(*words: str, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/parity.py", *words],
        cwd=ROOT,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.long
def test_the_tool_certifies_a_recipe_and_leaves_its_table(tmp_path):
    done = parity(
        "+recipe=mixtral_8x7b_tp2_pp4_ep4",
        "--sample",
        "3",
        f"run_dir={tmp_path}",
        "model.num_layers=2",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "smallest top-k margin" in done.stdout
        and "every layout computes what one rank computes" in done.stdout
    )
    assert all(len(line) <= 100 for line in done.stdout.splitlines() if str(tmp_path) not in line)
    record = json.loads((tmp_path / "parity.json").read_text())
    assert len(record["layouts"]) == 3 and record["one_rank"]["margin"] > 1e-4
    assert all(
        layout["outside"] == [] and layout["differences"]["parameter"] > 0
        for layout in record["layouts"]
    )
    assert (
        (tmp_path / "parity.md")
        .read_text()
        .startswith("# Layout parity of mixtral_8x7b_tp2_pp4_ep4\n")
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["+recipe=mixtral"], "the options of recipe are"),
        (["--sample", "0"], "at least 1"),
        (["--smaple", "3"], "unrecognized arguments: --smaple"),
        (["model.init_method_std=-1"], "model.init_method_std = -1"),
        (["model.transformer_impl=transformer_engine"], "transformer-engine is not installed"),
        (
            ["trainer.micro_batch_size=2"],
            "trainer.micro_batch_size = 2 must be 1 for the certificate",
        ),
        (["trainer.precision=bf16"], "the certificate is for trainer.precision=fp32"),
        (
            ["parallel=ep1"],
            "parallel=ep1: the certificate runs every layout and sets this itself; remove it",
        ),
        (
            ["run_dir=/proc/nowhere/run", "--sample", "1"],
            "run_dir = /proc/nowhere/run: No such file or directory",
        ),
    ],
)
def test_what_is_wrong_with_the_words_ends_in_exit_code_2(words, says):
    done = parity(*words)
    assert (
        done.returncode == 2
        and says in done.stderr.replace("\n", " ")
        and "Traceback" not in done.stderr
    )


def test_a_layout_that_differs_ends_in_exit_code_1_and_is_named(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    import parity as tool

    from mixtrain.proof.parity import certificate

    bad = Verdict()
    bad.note("gradient", 0.5, "gradient of a on rank 1")
    bad.tensors.append("a")
    one = {"seed": 1, "margin": 1.0, "tried": 1, "lm_loss": [1.0, 1.0]}
    monkeypatch.setattr(certificate, "run_one_rank", lambda *_: one)
    monkeypatch.setattr(certificate, "compare_layout", lambda *_: bad)
    monkeypatch.setattr(sys, "argv", ["parity.py", "--sample", "2", f"run_dir={tmp_path}"])
    assert tool.main() == 1
    assert "2 layouts differ, first " in capsys.readouterr().out
    assert "OUTSIDE at" in (tmp_path / "parity.md").read_text()


def test_every_limit_and_every_fault_is_in_the_docs():
    page = (ROOT / "docs" / "parity.md").read_text()
    for limit in LIMITS:
        assert limit.name.split(".")[-1] in page
    for fault in upstream.FAULTS:
        assert f"`{fault.name}`" in page and fault.file.split("/")[-1] in page


def test_the_certificate_in_the_docs_is_whole_and_within_the_limits():
    page = (ROOT / "docs" / "parity_mixtral_8x7b_tp2_pp4_ep4.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["split", "layouts", *TOLERANCES]
    assert rows[2][2:] == [f"{limit:.0e}" for limit in TOLERANCES.values()]
    plans, left_out = comparable(shrunk("+recipe=mixtral_8x7b_tp2_pp4_ep4"))
    assert {row[0]: int(row[1]) for row in rows[3:]} == Counter(
        ", ".join(layout.axes) or "nothing" for layout in plans
    )
    assert not left_out and f"layouts within the limits: {len(plans)} of {len(plans)}" in page
    for row in rows[3:]:
        assert all(
            float(value) <= limit for value, limit in zip(row[2:], TOLERANCES.values(), strict=True)
        ), row
