"""Benchmark scenarios, figures and files; test_bench_run.py runs benchmarks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from composing import ROOT, config_of

from mixtrain.config import memory
from mixtrain.errors import Fault, UserError
from mixtrain.proof.bench import readings, report, run, scenario
from mixtrain.proof.bench.processes import WarmupResult
from mixtrain.proof.bench.readings import Reading
from mixtrain.proof.bench.report import figures, peak_tflops
from mixtrain.proof.bench.scenario import BenchRequest, Measure
from mixtrain.proof.bench.variants import variants_of

RESULTS = sorted((ROOT / "benchmarks").glob("*.csv"))


def problems_of(*words: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        variants_of(scenario.parse(list(words)))
    return caught.value.problems


@pytest.mark.long  # Hydra composes about sixty variants
@pytest.mark.parametrize("name", scenario.names())
def test_every_variant_of_a_scenario_is_a_legal_run_of_this_machine_or_left_out_with_a_reason(name):
    words = ["+shrink=laptop"] if name.endswith("_1gpu") else []
    rows, left_out = variants_of(scenario.parse([f"scenario={name}", *words]))
    asked = scenario.parse([f"scenario={name}"]).scenario.rows
    assert list(rows) == list(asked)
    for row, variants in rows.items():
        missing = set(asked[row].variants) - {variant.name for variant in variants}
        assert all(any(line.startswith(f"{one} (") for line in left_out) for one in missing), (
            missing
        )


def test_a_scenario_of_a_gpu_names_the_command_that_runs_it_on_a_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for problem in problems_of(
        "scenario=fine_grained_1gpu", "rows=[microbatch_1]", "variants=[torch]"
    ):
        assert problem.endswith("python tools/bench.py scenario=fine_grained_1gpu +shrink=laptop")


ONE = ("scenario=cpu_small", "rows=[step_fp32]", "variants=[torch]")
HUGGING_FACE = ("scenario=cpu_small", "rows=[forward_backward_fp32]", "variants=[hf_eager]")
WRONG = {
    ("scenario=cpu_smal",): "scenario=cpu_smal: did you mean cpu_small?",
    ("rounds=3",): "scenario=: there are checkpoint, ",
    ("scenario=cpu_small", "variants=[jax]"): "variants=jax: there are torch, local, hf_eager, ",
    ("scenario=cpu_small", "rows=[step]"): "rows=step: there are forward_backward_fp32, ",
    ("scenario=cpu_small", "--fast"): "--fast is not key=value; ",
    ("scenario=cpu_small", "rounds=0"): "rounds = 0 must be at least 1",
    ("scenario=cpu_small", "rounds=many"): "cpu_small.yaml: ",
    ("scenario=cpu_small", "rounds=[3"): "cpu_small.yaml: ",
    (*ONE, "model.hiden_size=1"): "model.hiden_size is not a key of mixtrain; did you mean",
    (*ONE, "trainer.global_batch_size=3"): "trainer.global_batch_size = 3 must be a multiple of",
    (
        "scenario=start_up",
        "data=mock",
    ): "data=mock: this row runs commands, which take no words of train.py",
    (
        *HUGGING_FACE,
        "router=sinkhorn",
    ): "router.moe_router_load_balancing_type = sinkhorn: the weights",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_is_said_before_anything_runs(words):
    assert any(WRONG[words] in problem for problem in problems_of(*words))


def test_overrides_rank_command_line_over_variant_over_row_over_scenario():
    row = scenario.ScenarioRow(
        Measure.step, words=["seed=2", "name=b"], variants={"one": ["seed=3"]}
    )
    whole = scenario.Scenario(
        1, 1, 1, True, None, 0, ["seed=1", "name=a", "parallel=ep1"], {"row": row}
    )
    rows, _ = variants_of(BenchRequest("made", whole, ["name=c"], None))
    config = rows["row"][0].plan.config
    assert (config.seed, config.name, config.parallel.expert_model_parallel_size) == (3, "c", 1)


def test_flops_are_those_of_the_published_conventions():
    """Mixtral 8x7B at 4096: 79.7 GFLOP per token with the causal half of the scores, else 82.9."""
    model = config_of("+recipe=mixtral_8x7b_ep8").model
    assert memory.training_flops(model, 4096, causal=True) == pytest.approx(79.7e9, rel=1e-3)
    assert memory.training_flops(model, 4096, causal=False) == pytest.approx(82.9e9, rel=1e-3)
    assert (peak_tflops("NVIDIA H200, 143771 MiB"), peak_tflops("GeForce")) == (989, None)


def made(variant: str, number: int, seconds: float, others: float = 0.0, **values) -> Reading:
    return Reading("row", number, variant, seconds, 2 * seconds, 100, "tokens", others, **values)


def test_ratios_are_taken_within_rounds():
    """A machine that slows down over the rounds changes the speeds, not the ratio."""
    slow = [(number, 1.0 + number) for number in range(9)]
    taken = [
        one
        for number, time in slow
        for one in (made("a", number, time), made("b", number, 2 * time))
    ]
    first, second = figures(taken)["row"]
    assert first.ratios("rate") == [] and second.ratios("rate") == [2] * 9
    assert first.median("rate") == pytest.approx(100 / 5) and second.ratios("cpu_rate") == [2] * 9


def test_a_ratio_is_shown_with_its_range_over_all_rounds(capsys):
    """A round in which others were busy counts, and the heading says how busy they were."""
    values = [(1, 2.0, 0.0), (2, 2.5, 0.04), (3, 9.0, 1.5)]
    report.show(
        {},
        [
            one
            for number, seconds, others in values
            for one in (made("a", number, 1), made("b", number, seconds, others=others))
        ],
    )
    shown = capsys.readouterr().out
    assert "row: 3 rounds, other processes kept up to 1.5 CPUs busy" in shown
    assert "2.50 (2.00-9.00)" in shown


def test_variants_that_compute_something_else_are_not_compared():
    rows, _ = variants_of(
        scenario.parse(
            ["scenario=cpu_small", "rows=[forward_backward_fp32]", "variants=[torch,local]"]
        )
    )
    variants = rows["forward_backward_fp32"][:2]
    right = WarmupResult([10.0, 9.0], 2.0, None)
    for wrong in (
        WarmupResult([10.0, 9.001], 2.0, None),
        WarmupResult([10.0, 9.0], 2.1, None),
        WarmupResult([float("nan")] * 2, 2, 0),
    ):
        with pytest.raises(Fault, match="local does not compute what torch does"):
            run.check_same_results("row", variants, {"torch": right, "local": wrong})
    run.check_same_results(
        "row", variants, {"torch": right, "local": replace(right, losses=[10.00001, 9.0])}
    )


def test_a_file_of_readings_is_read_as_it_was_written_and_another_is_refused(tmp_path):
    taken = [made("a", 1, 0.5, peak_bytes=7, flops_causal=2.5), made("b", 1, 0.25)]
    readings.write(tmp_path / "new" / "file.csv", {"machine": "of: one"}, taken)
    assert readings.read(tmp_path / "new" / "file.csv") == ({"machine": "of: one"}, taken)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for other in ("other.csv", "none.csv"):
        with pytest.raises(UserError, match="is not a file of this benchmark's readings"):
            readings.read(tmp_path / other)


def test_tflops_and_mfu_are_shown_of_a_gpu(capsys):
    taken = [made("a", 1, 1.0, flops_causal=1e13, flops_whole=2e13, ranks=2)]
    report.show({"machine": "32 cores"}, taken)
    assert "MFU" not in capsys.readouterr().out
    report.show({"machine": "32 cores", "gpu": "NVIDIA H100", "scenario": "model.x=[/a]"}, taken)
    shown = capsys.readouterr().out
    assert (
        "model.x=[/a]" in shown
        and re.search(r"a +100 +500 +1000 +101\.1%", shown)
        and max(map(len, shown.splitlines())) <= 100
    )


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_checked_in_result_says_where_it_is_from_and_the_page_has_its_tables(path, capsys):
    facts, taken = readings.read(path)
    assert {"scenario", "machine", "system", "versions", "commit"} <= set(facts)
    assert (
        "dirty" not in facts["commit"]
        and facts["scenario"].split()[0] == path.stem in scenario.names()
    )
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"show benchmarks/{path.name}" in page
    report.show({}, taken)
    tables = capsys.readouterr().out.split("\n\n")[:-1]  # without the legend
    for line in "\n".join(tables).splitlines():
        assert line.strip(" ─") in page
