"""What a user types, as a user types it: exit codes, and words on the terminal that can be acted
on.
"""

from __future__ import annotations

import resource
import subprocess

import pytest
from composing import ROOT, run_train

RECIPE = "+recipe=mixtral_8x7b_ep8"


def problems(shown: subprocess.CompletedProcess) -> list[str]:
    """The problems of a refusal: exit code 2, a count, then a line each, and nothing else on
    stderr.
    """
    assert shown.returncode == 2, shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    head, *lines = shown.stderr.splitlines()
    assert head == f"mixtrain: {len(lines)} problem{'s' * (len(lines) > 1)}:"
    assert all(line.startswith("  - ") and len(line) < 400 for line in lines)
    return [line.removeprefix("  - ") for line in lines]


def test_a_recipe_is_planned_on_any_machine_in_two_seconds_of_cpu_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run_train("trainer.mode=plan", RECIPE, "trainer.num_nodes=2")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "16 on 2 nodes of 8" in shown.stdout
    assert "46,702,792,704" in shown.stdout
    assert shown.stdout.startswith("MOCK")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # half a second where nothing else runs: a core that is shared with another thread takes twice
    # as long
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_two_problems_are_both_named():
    named = problems(
        run_train(RECIPE, "parallel.expert_model_parallel_size=5", "trainer.global_batch_size=100")
    )
    keys = [problem.split(" ")[0] for problem in named]
    assert "parallel.expert_model_parallel_size" in keys and "trainer.global_batch_size" in keys
    (experts,) = [problem for problem in named if problem.startswith("parallel.")]
    assert (
        experts
        == "parallel.expert_model_parallel_size = 5 must divide model.num_moe_experts = 8; use 4"
        " or 8"
    )
    (batch,) = [problem for problem in named if problem.startswith("trainer.")]
    assert "100" in batch and "= 16" in batch and batch.endswith("use 96 or 112")


def test_a_misspelt_key_is_offered_the_right_one():
    (problem,) = problems(run_train("trainer.max_stepz=5"))
    assert problem == "trainer.max_stepz is not a key of mixtrain; did you mean trainer.max_steps?"


def test_a_recipe_without_its_gpus_prints_the_plan_and_what_to_type_instead():
    shown = run_train(RECIPE, "trainer.num_nodes=2")
    gpus, nodes = problems(shown)
    assert "46,702,792,704" in shown.stdout
    for fragment in ("trainer.devices = 8", "0 GPUs", "trainer.mode=plan", "+shrink=laptop"):
        assert fragment in gpus
    assert nodes.endswith(f"train.py {RECIPE} trainer.num_nodes=2")
    assert not (ROOT / "runs" / "mixtral_8x7b_ep8" / "status.json").exists()


def test_a_shrunk_recipe_plans_eight_ranks():
    shown = run_train(RECIPE, "+shrink=laptop", "trainer.max_steps=5", "trainer.mode=plan")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "8 on 1 node of 8 (cpu)" in shown.stdout


@pytest.mark.parametrize(
    "words", [["trainer.max_steps=many"], ["data=indexed"], ["name=???"], ["model", "~seed", "=1"]]
)
def test_what_cannot_be_read_is_refused_without_a_traceback(words):
    assert problems(run_train(*words, "trainer.mode=plan"))


def test_a_reason_of_hydras_own_stands_above_ours():
    shown = run_train("hydra.nothing=1")
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr
    assert "hydra.nothing" in shown.stderr
    assert shown.stderr.rstrip().endswith("its reason is above")


def test_a_rank_that_is_not_the_first_of_its_node_says_nothing_of_a_wrong_configuration():
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    shown = run_train("trainer.max_stepz=5", **started)
    assert (shown.returncode, shown.stdout, shown.stderr) == (2, "", "")


def test_train_py_runs_from_another_directory(tmp_path):
    shown = run_train("trainer.mode=plan", cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
