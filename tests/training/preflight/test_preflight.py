"""The preflight on real ranks of two pretended nodes: it passes, or names the node at fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composing import RECIPES, plan_of
from rank_workers import run_ranks

from mixtrain.config import layout_sensitive
from mixtrain.config.plan import Plan
from mixtrain.engine import model, process_groups
from mixtrain.errors import FINISHED, Fault, UserError
from mixtrain.proof.drill.runs import SMALL, records
from mixtrain.system.rank_identity import Identity
from mixtrain.system.status import read_status
from mixtrain.training import preflight, worker
from mixtrain.training.preflight import network, node_info
from mixtrain.training.preflight.check import RECORD, PreflightRun
from mixtrain.training.preflight.shrink import ShrunkPlans, shrink

WORDS = [*SMALL, "parallel=ep2", "trainer.num_nodes=2", "trainer.devices=1", "checkpoint=none"]


def fly(plan: Plan, identity: Identity, sabotage: Callable[[Identity, Plan], Plan | None]) -> dict:
    """Run the preflight as the only rank of one of two nodes: its output, or why it ended."""
    os.environ["SLURMD_NODENAME"] = f"n{identity.rank}"
    identity = replace(identity, local_rank=0, local_world_size=1)
    plan = sabotage(identity, plan) or plan
    said = []
    with process_groups.start(plan, identity) as here:
        try:
            PreflightRun(plan, identity, here, said.append).run()
        except UserError as error:
            return {"refused": list(error.problems)}
        except Fault as fault:
            return {"fault": str(fault)}
    return {"said": said}


class Field:
    """The folder of preflights; the CPU's result is computed once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    def fly(self, sabotage=lambda identity, plan: None, *words: str) -> tuple[list[dict], Path]:
        self.count += 1
        run_dir = self.folder / str(self.count)
        made = self.folder / "1" / preflight.FOLDER
        if made.is_dir() and self.count > 1:
            shutil.copytree(made, run_dir / preflight.FOLDER)
        run_dir.mkdir(exist_ok=True)
        plan = plan_of(
            *WORDS, *words, f"run_dir={run_dir}", f"data.path_to_cache={self.folder}/cache"
        )
        return run_ranks(
            2, lambda identity: fly(plan, identity, sabotage), self.folder / f"ranks_{self.count}"
        ), run_dir


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Field:
    made = Field(tmp_path_factory.mktemp("field"))
    made.first = made.fly()
    return made


def test_two_sound_nodes_pass_and_are_told_what_was_seen(field):
    (first, second), run_dir = field.first
    text = "\n".join(first["said"])
    assert second["said"] and "2: n0, n1" in text
    for fragment in (
        "libraries",
        "EP of 2",
        "GB/s",
        "all gradients match the CPU's, within",
        "ready",
    ):
        assert fragment in text
    record = json.loads((run_dir / RECORD).read_text())
    assert [rank["node"] for rank in record["ranks"]] == ["n0", "n1"] and record["problems"] == []
    assert record["parity"]["differences"]["gradient"] < 1e-4
    assert [name for name in os.listdir(run_dir) if name.startswith(".preflight")] == []


def test_a_node_with_other_code_is_refused_on_all_ranks(field):
    def sabotage(identity, plan):
        digest = node_info.source_digest()
        node_info.source_digest = lambda: digest if identity.rank == 0 else "another"

    results, _ = field.fly(sabotage)
    for result in results:
        (problem,) = result["refused"]
        assert (
            problem.startswith("node n1 has another mixtrain (commit ")
            and "source another)" in problem
        )


def test_a_node_that_sees_another_directory_is_refused(field, monkeypatch):
    def sabotage(identity, plan):
        node_info.SEEN_WITHIN_S = 1
        if identity.rank == 1:
            return replace(
                plan, config=replace(plan.config, run_dir=f"{plan.config.run_dir}-elsewhere")
            )

    results, run_dir = field.fly(sabotage)
    shared = (
        f"node n1: run_dir = {run_dir}-elsewhere is not the directory that the first rank writes to"
    )
    assert all(result["refused"][0].startswith(shared) for result in results)


def test_a_cache_that_cannot_be_written_is_refused_with_its_key(field):
    def sabotage(identity, plan):
        if identity.rank == 1:
            Path(f"{plan.config.run_dir}-file").write_text("")
            data = replace(plan.config.data, path_to_cache=f"{plan.config.run_dir}-file/cache")
            return replace(plan, config=replace(plan.config, data=data))

    results, run_dir = field.fly(sabotage)
    for result in results:
        (problem,) = result["refused"]
        assert (
            problem
            == f"node n1: data.path_to_cache = {run_dir}-file/cache cannot be written: Not a"
            " directory"
        )


def test_a_wire_that_gives_wrong_numbers_is_a_fault_with_the_node(field):
    def sabotage(identity, plan):
        if identity.rank == 1:
            full = torch.full
            network.torch.full = lambda size, value, **more: full(size, value + 1, **more)

    results, _ = field.fly(sabotage)
    assert all(
        "node n0: the all-reduce of the all group gave" in result["fault"] for result in results
    )


def test_a_rank_that_computes_something_else_is_a_fault_with_its_node(field):
    def sabotage(identity, plan):
        build = model.build_chunk

        def changed(*arguments):
            chunk = build(*arguments)
            if identity.rank == 1:
                for name, parameter in chunk.named_parameters():
                    if "experts" in name:
                        parameter.register_hook(lambda gradient: gradient * 1.01)
            return chunk

        model.build_chunk = changed

    results, _ = field.fly(sabotage)
    for result in results:
        assert result["fault"].startswith("the shrunk recipe differs from the CPU's result: ")
        assert "on rank 1, node n1," in result["fault"]


@pytest.mark.long
def test_a_run_with_a_preflight_has_the_numbers_of_one_without(field, tmp_path):
    words = [
        *SMALL,
        "parallel=ep2",
        "trainer.max_steps=3",
        f"data.path_to_cache={field.folder}/cache",
    ]
    # Megatron-Core remembers the number of layers of what it has seen first
    words += ["model.num_layers=3"]
    for asked in ("always", "never"):
        folder = tmp_path / asked
        shutil.copytree(field.folder / "1" / preflight.FOLDER, folder / preflight.FOLDER)
        plan = plan_of(*words, f"run_dir={folder}", f"trainer.preflight={asked}", "checkpoint=last")
        assert (
            run_ranks(
                2,
                lambda identity, plan=plan: worker.run(plan, identity),
                tmp_path / f"ranks_{asked}",
            )
            == [FINISHED] * 2
        )
    assert (tmp_path / "always" / RECORD).exists() and not (tmp_path / "never" / RECORD).exists()
    assert (
        records(tmp_path / "always") == records(tmp_path / "never")
        and len(records(tmp_path / "always")) == 3
    )


@pytest.mark.long
def test_a_preflight_alone_leaves_the_run_as_it_was(field, tmp_path):
    (tmp_path / "status.json").write_text(
        '{"state": "stopped", "step": 7, "max_steps": 9, "reason": ""}'
    )
    shutil.copytree(field.folder / "1" / preflight.FOLDER, tmp_path / preflight.FOLDER)
    words = [*SMALL, "parallel=ep2", "trainer.mode=preflight", f"run_dir={tmp_path}"]
    plan = preflight.with_records_dir(plan_of(*words, f"data.path_to_cache={field.folder}/cache"))
    assert (
        run_ranks(2, lambda identity: worker.run(plan, identity), tmp_path / "ranks")
        == [FINISHED] * 2
    )
    assert read_status(tmp_path)["step"] == 7 and not list(tmp_path.glob("iter_*"))
    alone = tmp_path / preflight.FOLDER
    assert read_status(alone)["state"] == "finished" and (alone / RECORD).exists()


# When, and of what


@pytest.mark.parametrize("words, asked", [
    ([], False),
    (["trainer.num_nodes=2", "trainer.devices=1"], True),
    (["trainer.num_nodes=2", "trainer.devices=1", "trainer.preflight=never"], False),
    (["trainer.preflight=always"], True),
    (["trainer.mode=preflight", "trainer.preflight=never"], True),
    (["trainer.accelerator=gpu"], True),
])  # fmt: skip
def test_a_preflight_is_asked_for_on_several_nodes_on_gpus_and_where_it_is_typed(words, asked):
    assert preflight.is_enabled(plan_of(*words)) is asked


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_shrunk_at_its_own_layout_or_the_reason_is_said(name):
    plan = plan_of(f"+recipe={name}")
    plans = shrink(plan)
    if isinstance(plans, str):
        assert any(
            beyond.name in plans for beyond, _ in layout_sensitive.exceeded_limits(plan.config)
        )
        return
    assert isinstance(plans, ShrunkPlans) and plans.one_rank.world_size == 1
    here = plans.layout.config
    theirs = plan.config
    assert plans.layout.world_size == plan.world_size and here.parallel == theirs.parallel
    assert (here.router, here.model.transformer_impl) == (
        theirs.router,
        theirs.model.transformer_impl,
    )
    assert plans.layout.total_parameters == plans.one_rank.total_parameters < 10_000_000
    assert here.trainer.global_batch_size == plans.one_rank.config.trainer.global_batch_size


@pytest.mark.parametrize("router, coefficient", [("global_aux_loss", "1"), ("combined", "[1,1]")])
def test_the_global_auxiliary_loss_is_compared_at_as_many_microbatches(router, coefficient):
    words = [f"router={router}", f"router.moe_aux_loss_coeff={coefficient}"]
    plans = shrink(plan_of("+recipe=mixtral_8x7b_ep8", *words))
    assert isinstance(plans, ShrunkPlans) and plans.layout.data_parallel_size == 16
    assert plans.one_rank.num_microbatches == plans.layout.num_microbatches
    assert (
        plans.one_rank.config.trainer.global_batch_size
        == plans.layout.config.trainer.global_batch_size
    )
