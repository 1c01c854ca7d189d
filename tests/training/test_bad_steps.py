"""All ranks detect a bad loss or gradient together; it is recorded and changes nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from checkpoints import unequal
from megatron.core.transformer.moe.router import TopKRouter
from test_parity import EP, OVERLAPPED, PLAIN, PP, TP, VPP
from test_resume import path_of, records, start

from mixtrain.engine import model
from mixtrain.errors import FAULT, FINISHED
from mixtrain.system.status import read_status
from mixtrain.training import loop
from mixtrain.training.logs import collapsed_layers

TWO = [EP + "2", "trainer.limit_val_batches=0", "data.split='100,0,0'"]
SKIP = "trainer.bad_step_policy=skip"


def poisoned_losses(steps: set[int], rank: int = 1):
    """Return a `before` that makes the loss of one rank NaN in these steps."""

    def before(identity) -> None:
        calls = {"step": 0}
        train_step = loop.train_step
        run_microbatches = loop.run_microbatches

        def counted(plan, ranks, training, microbatches, stop, step, batch):
            calls["step"] = step
            return train_step(plan, ranks, training, microbatches, stop, step, batch)

        def poisoned(*arguments, **more):
            loss, tokens = run_microbatches(*arguments, **more)
            return (math.nan if identity.rank == rank and calls["step"] in steps else loss), tokens

        loop.train_step = counted
        loop.run_microbatches = poisoned

    return before


def poisoned_gradients(steps: set[int], value: float = math.inf, rank: int = 1):
    """Return a `before` that sets one gradient entry of a rank before the norm, in these steps.

    The entry is in the second half of the buffer, which rank 1 updates if two ranks share it.
    """

    def before(identity) -> None:
        train_step = loop.train_step

        def poisoned(plan, ranks, training, microbatches, stop, step, batch):
            prepare = type(training.optimizer).prepare_grads

            def prepare_grads():
                if step in steps and identity.rank == rank:
                    gradients = training.chunks[0].buffers[0].grad_data
                    gradients[len(gradients) // 2 + 10] = value
                return prepare(training.optimizer)

            training.optimizer.prepare_grads = prepare_grads
            return train_step(plan, ranks, training, microbatches, stop, step, batch)

        loop.train_step = poisoned

    return before


def bad_steps(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", [TWO, [*TWO, PP + "2"]], ids=["EP2", "EP2xPP2"])
def test_a_loss_that_is_not_a_number_stops_all_ranks_with_a_record(layout, tmp_path):
    last = 3 if PP + "2" in layout else 1  # a rank with the loss
    words = ["trainer.max_steps=4", "checkpoint.save_interval=1"]
    run_dir, codes, log = start(tmp_path, *layout, *words, before=poisoned_losses({3}, last))
    assert codes == {FAULT}, log
    reason = read_status(run_dir)["reason"]
    assert reason.startswith(
        f"step 3: lm_loss is not finite on rank {last}; its 8 samples are in bad_steps.jsonl"
    )
    (record,) = bad_steps(run_dir)
    assert (record["step"], record["what"], record["ranks"]) == (3, "lm_loss", [last])
    assert len(record["samples"]) == 8 and len({tuple(sample) for sample in record["samples"]}) == 8
    assert "Traceback" not in log and not path_of(run_dir, 3).exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        [PLAIN],
        ["optimizer.clip_grad=0"],
        OVERLAPPED,
        ["trainer.precision=bf16", "optimizer.grad_reduce_in_fp32=false"],
        ["optimizer=sgd", "optimizer.lr_warmup_steps=0"],
    ],
    ids=["plain", "without the distributed optimizer", "unclipped", "overlapped", "bf16", "sgd"],
)
def test_a_skipped_step_changes_nothing_and_is_counted(words, tmp_path):
    """A run whose last step is skipped ends with bitwise the state of a run one step shorter."""
    once, codes, log = start(tmp_path / "once", *TWO, *words, SKIP, "trainer.max_steps=2")
    assert codes == {FINISHED}, log
    both, codes, log = start(
        tmp_path / "both", *TWO, *words, SKIP, "trainer.max_steps=3", before=poisoned_gradients({3})
    )
    assert codes == {FINISHED}, log
    assert (
        "warning: step 3: grad_norm is not finite on rank 1; " in log and "skipped, 1 so far" in log
    )
    assert unequal(path_of(once, 2), path_of(both, 3)) == []
    states = [
        json.loads((path_of(run, at) / "run_state.json").read_text())
        for run, at in ((once, 2), (both, 3))
    ]
    assert [state["schedule_steps"] for state in states] == [2, 2]
    assert (
        [state["optimizer_steps"] for state in states] == [0, 0] if "sgd" in str(words) else [2, 2]
    )
    assert (states[1]["step"], states[1]["skipped_steps"], states[1]["consumed_samples"]) == (
        3,
        1,
        24,
    )
    last = records(both)[-1]
    assert (last["lm_loss"], last["grad_norm"], last["skipped_steps"]) == (None, None, 1)
    assert records(both)[:2] == records(once)[:2]


def test_a_run_goes_on_after_a_skipped_step_and_a_resumed_one_knows_of_it(tmp_path):
    words = [
        *TWO,
        SKIP,
        "trainer.max_steps=3",
        "checkpoint.save_interval=2",
        "checkpoint.keep_last=null",
    ]
    run_dir, codes, log = start(tmp_path, *words, before=poisoned_losses({2}))
    assert codes == {FINISHED}, log
    assert [record["skipped_steps"] for record in records(run_dir)] == [0, 1, 1]
    state = json.loads((path_of(run_dir, 2) / "run_state.json").read_text())
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (1, 1)
    _, codes, log = start(tmp_path, *words[:2], SKIP, "trainer.max_steps=4", *words[2:3])
    assert codes == {FINISHED} and records(run_dir)[-1]["skipped_steps"] == 1, log


def test_too_many_in_a_row_stop_the_run(tmp_path):
    words = [*TWO, SKIP, "trainer.bad_step_limit=2", "trainer.max_steps=9"]
    run_dir, codes, log = start(tmp_path, *words, before=poisoned_losses({2, 4, 5, 6}))
    assert codes == {FAULT}, log
    assert read_status(run_dir)["reason"].endswith("more than trainer.bad_step_limit = 2 in a row")
    assert [record["step"] for record in bad_steps(run_dir)] == [2, 4, 5, 6]


def test_a_gradient_larger_than_it_may_be_is_bad(tmp_path):
    words = [*TWO, SKIP, "trainer.bad_step_grad_norm=100", "trainer.max_steps=3"]
    run_dir, codes, log = start(tmp_path, *words, before=poisoned_gradients({2}, 1e6))
    assert codes == {FINISHED}, log
    (record,) = bad_steps(run_dir)
    assert (record["what"], record["value"], record["ranks"]) == ("grad_norm", "1e+06", [])
    assert [entry["skipped_steps"] for entry in records(run_dir)] == [0, 1, 1]


def test_a_gradient_that_is_not_finite_names_its_rank(tmp_path):
    run_dir, codes, _ = start(
        tmp_path, *TWO, "trainer.max_steps=3", before=poisoned_gradients({2}, math.nan)
    )
    assert codes == {FAULT}
    assert "step 2: grad_norm is not finite on rank 1" in read_status(run_dir)["reason"]
    assert bad_steps(run_dir)[0]["ranks"] == [1]


SPOILED = {
    "EP2xPP2": [EP + "2", PP + "2"],
    "PP2xVPP2": [EP + "1", PP + "2", VPP],
    "TP2": [EP + "1", *TP],
    "DP2 without the distributed optimizer": [EP + "1", "trainer.devices=2", PLAIN],
    "two optimizer instances": [
        EP + "2",
        "trainer.devices=4",
        "parallel.num_distributed_optimizer_instances=2",
    ],
}


@pytest.mark.parametrize("layout", SPOILED)
def test_a_gradient_that_backward_makes_infinite_on_one_rank_is_bad_on_all(layout, tmp_path):
    """An expert's gradient passes the reductions into one rank's part of the norm."""

    def before(identity) -> None:
        build = model.build

        def spoiled(*arguments):
            models = build(*arguments)
            if identity.rank == 1:
                weights = [
                    p for name, p in models[0].named_parameters() if "experts.weight2" in name
                ]
                weights[0].register_hook(lambda gradient: gradient * math.inf)
            return models

        model.build = spoiled

    words = [*SPOILED[layout], *TWO[1:], SKIP, "trainer.max_steps=2"]
    run_dir, codes, log = start(tmp_path, *words, before=before)
    assert codes == {FINISHED}, log
    assert [(record["what"], 1 in record["ranks"]) for record in bad_steps(run_dir)] == [
        ("grad_norm", True)
    ] * 2
    assert [record["skipped_steps"] for record in records(run_dir)] == [1, 2]


def test_an_expert_bias_is_what_it_was_before_a_skipped_step(tmp_path):
    words = [*TWO, SKIP, "router=expert_bias", "router.moe_router_bias_update_rate=0.1"]
    once, _, _ = start(tmp_path / "once", *words, "trainer.max_steps=1")
    both, codes, log = start(
        tmp_path / "both", *words, "trainer.max_steps=2", before=poisoned_losses({2})
    )
    assert codes == {FINISHED}, log
    assert unequal(path_of(once, 1), path_of(both, 2)) == []
    assert records(both)[0]["expert_bias"] != [[0.0] * 8] * 4


def rigged_routers(identity, change) -> None:
    """Call `change(router, rank)` for every router of the model before the run."""
    build = model.build

    def rigged(*arguments):
        models = build(*arguments)
        with torch.no_grad():
            for module in models[0].modules():
                if isinstance(module, TopKRouter):
                    change(module, identity.rank)
        return models

    model.build = rigged


def spoil(router, rank) -> None:
    if rank == 1 and router.layer_number == 3:
        router.weight.fill_(math.nan)


@pytest.mark.parametrize("router", ["aux_loss", "sinkhorn", "expert_bias"])
def test_router_weights_that_are_not_finite_are_named_by_layer_and_rank(router, tmp_path):
    words = [*TWO, f"router={router}", "trainer.max_steps=2"]
    run_dir, codes, log = start(
        tmp_path, *words, before=lambda identity: rigged_routers(identity, spoil)
    )
    assert codes == {FAULT}, log
    assert (
        "the router of layer 3 on rank 1 was the first that was not finite"
        in read_status(run_dir)["reason"]
    )
    assert bad_steps(run_dir)[0]["routers"] == [[3, 1]]


def test_routers_that_were_given_what_is_not_finite_are_not_named(tmp_path):
    """Layer 4 gets it on both tensor ranks, which share sequences; or all layers do."""
    tensor, _, _ = start(
        tmp_path / "TP2",
        EP + "1",
        *TP,
        *TWO[1:],
        before=lambda identity: rigged_routers(identity, spoil),
    )
    assert bad_steps(tensor)[0]["routers"] == [[3, 1]] and bad_steps(tensor)[0]["ranks"] == [0, 1]

    def before(identity) -> None:
        build = model.build

        def spoiled(*arguments):
            models = build(*arguments)
            with torch.no_grad():
                models[0].embedding.word_embeddings.weight.fill_(math.nan)
            return models

        model.build = spoiled

    embedding, codes, _ = start(tmp_path / "embedding", *TWO, before=before)
    assert codes == {FAULT} and bad_steps(embedding)[0]["routers"] == []


def test_a_run_whose_every_step_is_skipped_for_a_router_ends_with_its_report(tmp_path):
    """The balancing loss is not finite either, and metrics.jsonl has none."""
    words = [*TWO, SKIP, "trainer.max_steps=2"]
    run_dir, codes, log = start(
        tmp_path, *words, before=lambda identity: rigged_routers(identity, spoil)
    )
    assert codes == {FINISHED}, log
    values = [
        (record["lm_loss"], record["load_balancing_loss"], record["skipped_steps"])
        for record in records(run_dir)
    ]
    assert values == [(None, None, 1), (None, None, 2)]
    assert (run_dir / "report.png").exists()


def test_all_tokens_to_two_experts_is_a_warning_and_the_others_learn_nothing(tmp_path):
    """The router's bias makes the choice; experts without tokens get no gradient."""

    def collapse(router, rank) -> None:
        if router.layer_number == 2:
            gating = router.gating
            favour = torch.tensor([0.0, 50.0, 0, 0, 0, 40.0, 0, 0])
            router.gating = lambda hidden: gating(hidden) + favour

    gradients: list[float] = []

    def before(identity) -> None:
        rigged_routers(identity, collapse)
        train_step = loop.train_step

        def looked(plan, ranks, training, *rest):
            outcome = train_step(plan, ranks, training, *rest)
            weights = [
                p
                for name, p in training.chunks[0].named_parameters()
                if "layers.1.mlp.experts.weight1" in name
            ]
            gradients.extend(
                expert.abs().max().item() for weight in weights for expert in weight.main_grad
            )
            print("GRADIENTS", json.dumps(gradients[:4]))
            return outcome

        loop.train_step = looked

    words = [EP + "2", *TWO[1:], "trainer.max_steps=2", "optimizer.clip_grad=0", PLAIN]
    run_dir, codes, log = start(tmp_path, *words, before=before)
    assert codes == {FINISHED}, log
    load = records(run_dir)[0]["tokens_per_expert"][1]
    assert load == [0, 256, 0, 0, 0, 256, 0, 0]
    assert (
        "warning: step 1: layer 2 sends 100% of its tokens to experts 1, 5: 0 256 0 0 0 256 0 0"
        in log
    )
    assert log.count("warning: ") == 1
    assert [record["collapsed_layers"] for record in records(run_dir)] == [[2], [2]]
    none, some, *rest = json.loads(re.search(r"GRADIENTS (.*)", log)[1])
    assert none == 0 and some > 0 and rest == [0, 0]


def test_a_collapse_is_nearly_everything_to_as_few_experts_as_a_token_has():
    assert collapsed_layers([[50, 50, 0, 0], [46, 45, 9, 0], [45, 45, 5, 5]], topk=2) == [1, 2]
    assert collapsed_layers([[50, 50]], topk=2) == []
