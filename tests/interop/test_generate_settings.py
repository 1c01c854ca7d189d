"""The plan of a generation, its request and its tokenizer: what is taken from the run, and what is
refused.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from composing import config_of
from omegaconf import OmegaConf
from test_parity import TINY

from mixtrain.checkpoint.state import RunState
from mixtrain.config.plan import Plan, resolve
from mixtrain.config.typed_config import to_yaml
from mixtrain.data.tokenizer import train_bpe
from mixtrain.errors import UserError
from mixtrain.interop.generate import generation_plan, tokenizer_lookup
from mixtrain.interop.generate.request import Request, Sampling, read_prompts

SHAPE = [*TINY, "router=none", "model.vocab_size=320", "parallel.expert_model_parallel_size=1"]


def state_of(*words: str) -> RunState:
    return RunState(
        config=OmegaConf.to_container(OmegaConf.create(to_yaml(resolve(config_of(*words)))))
    )


def planned(run: RunState, *words: str) -> Plan:
    tree, problems = generation_plan.compose_overrides(list(words))
    return generation_plan.plan_of(tree, list(words), run, Path("ckpt"), "folder", None, problems)


def test_the_model_is_the_runs_and_the_layout_that_of_the_words():
    run = state_of(
        *SHAPE,
        "model.rotary_base=500",
        "router=sinkhorn",
        "parallel=pp2_ep2",
        "trainer.precision=bf16",
        "trainer.recompute_granularity=full",
        "trainer.recompute_method=uniform",
        "trainer.recompute_num_layers=1",
        "dispatcher=allgather",
        "model.extra.moe_permute_fusion=false",
    )
    plan = planned(run)
    assert (plan.world_size, plan.config.parallel.pipeline_model_parallel_size) == (1, 1)
    assert (plan.config.model.rotary_base, plan.config.model.vocab_size) == (500, 320)
    assert plan.config.model.extra == {"moe_permute_fusion": False}
    assert (
        plan.config.trainer.precision.name == "bf16"
        and plan.config.trainer.recompute_granularity is None
    )
    assert plan.config.router.moe_router_load_balancing_type[0].name == "sinkhorn"
    assert generation_plan.changed_values(run, plan) == []
    plan = planned(
        run, "parallel=ep2", "parallel.tensor_model_parallel_size=2", "trainer.precision=fp32"
    )
    assert (plan.world_size, plan.data_parallel_size, plan.config.parallel.sequence_parallel) == (
        2,
        1,
        True,
    )
    assert generation_plan.changed_values(run, plan) == ["trainer.precision = fp32 (the run: bf16)"]
    plan = planned(
        run, "parallel.pipeline_model_parallel_size=2", "trainer.devices=4", "router=aux_loss"
    )
    assert (plan.world_size, plan.data_parallel_size) == (4, 2)
    assert (
        "router.moe_router_load_balancing_type = [aux_loss] (the run: [sinkhorn])"
        in generation_plan.changed_values(run, plan)
    )


def test_a_balanced_router_generates_as_top_k_on_tensor_ranks_too():
    words = [word for word in SHAPE if not word.startswith("router=")]
    run = state_of(*words, "router=balanced")
    plan = planned(run, "parallel=ep1", "parallel.tensor_model_parallel_size=2")
    assert plan.config.router.moe_router_load_balancing_type[0].name == "none"
    assert generation_plan.changed_values(run, plan) == []


REFUSALS = {
    "parallel.context_parallel_size=2": "parallel.context_parallel_size = 2: generation does not"
    " split",
    "parallel=pp2_vpp2": "parallel.virtual_pipeline_model_parallel_size = 2: a token passes each",
    "parallel.data_parallel_sharding_strategy=optim": "parallel.data_parallel_sharding_strategy ="
    " optim: there are no",
    "dispatcher.moe_expert_capacity_factor=1.0": "dispatcher.moe_expert_capacity_factor = 1.0:"
    " which tokens",
    "router.moe_router_force_load_balancing=true": "router.moe_router_force_load_balancing = true:"
    " the router",
    "trainer.precision=fp8": "trainer.precision = fp8: it needs Transformer Engine",
    "parallel.sequence_parallel=true": "parallel.sequence_parallel = true: generation sets this"
    " itself, to false",
    "model.transformer_impl=local": "model.transformer_impl = local: generation sets this itself,"
    " to torch",
    "parallel.expert_model_parallel_size=3": "parallel.expert_model_parallel_size = 3 must divide",
    "trainer.num_nodes=2": "trainer.num_nodes = 2, but nothing has started",
    "trainer.accelerator=gpu": "trainer.accelerator = gpu with trainer.devices = 1, but this"
    " machine has 0 GPUs",
    "parallel=ep3": "parallel=ep3: did you mean",
    "+recipe=mixtral_8x7b_ep8": "+recipe=mixtral_8x7b_ep8: the model is the checkpoint's",
    "parallel.expert_parallel=2": "parallel.expert_parallel is not a key of mixtrain",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_what_there_is_no_generation_for_is_refused_by_its_key(word, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as refused:
        planned(state_of(*SHAPE), word)
    assert any(problem.startswith(REFUSALS[word]) for problem in refused.value.problems), (
        refused.value
    )


def test_what_a_run_was_trained_with_is_refused_by_its_key_too():
    capacity = "dispatcher.moe_expert_capacity_factor"
    with pytest.raises(UserError, match=f"use {capacity}=null"):
        planned(state_of(*SHAPE, f"{capacity}=1.0"))
    plan = planned(run := state_of(*SHAPE, f"{capacity}=1.0"), f"{capacity}=null")
    assert generation_plan.changed_values(run, plan) == [f"{capacity} = null (the run: 1.0)"]
    assert (
        planned(
            state_of(*SHAPE, "router.moe_input_jitter_eps=0.1")
        ).config.router.moe_input_jitter_eps
        is None
    )


def asked(*prompts: str, new: int = 12, **more) -> Request:
    values = {"stop": [], "chat": False, "batch_size": 2, "as_json": True, "sampling": Sampling()}
    return Request(list(prompts), "tokenizer", max_new_tokens=new, **values | more)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["x", ""]}, "prompt 2 is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"stop": [""]}, "--stop ''"),
        ({"sampling": Sampling(-1.0)}, "--temperature -1 must be 0"),
        ({"sampling": Sampling(float("nan"))}, "--temperature nan must be 0"),
        ({"sampling": Sampling(1.0, top_k=0)}, "--top-k 0 must be at least 1"),
        ({"sampling": Sampling(1.0, top_p=0.0)}, "--top-p 0 must be above 0"),
        ({"sampling": Sampling(1.0, top_p=1.5)}, "--top-p 1.5 must be above 0 and at most 1"),
        ({"sampling": Sampling(1.0, seed=-1)}, "--seed -1 must be from 0"),
        ({"sampling": Sampling(top_p=0.9)}, "--top-p 0.9 chooses nothing at --temperature 0"),
    ],
)
def test_a_request_is_refused_by_the_option_that_is_wrong(change, problem):
    right = asked("x")
    assert list(right.problems()) == []
    (found,) = replace(right, **change).problems()
    assert found.startswith(problem)


def test_a_request_is_handed_over_whole(tmp_path):
    request = asked("a\nb", "ü", stop=["."], chat=True, sampling=Sampling(0.5, 3, 0.9, 7))
    request.write(tmp_path)
    assert Request.read(tmp_path) == request


def test_prompts_come_from_lines_or_from_objects(tmp_path):
    lines = tmp_path / "a.txt"
    objects = tmp_path / "b.jsonl"
    lines.write_text("one\n\n two \n")
    objects.write_text('{"prompt": "a\\nb"}\n')
    assert read_prompts(str(lines)) == ["one", " two "] and read_prompts(str(objects)) == ["a\nb"]
    for wrong, why in (
        ("{}\n", "prompt is missing"),
        ("[\n", "line 1: not valid JSON"),
        ("\n", "it has no prompt"),
    ):
        objects.write_text(wrong)
        with pytest.raises(UserError, match=why):
            read_prompts(str(objects))
    with pytest.raises(UserError, match="No such file"):
        read_prompts(str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter([Path(__file__).read_text()]), 300, folder)
    return folder


def test_the_tokenizer_is_the_one_beside_the_checkpoint_or_that_of_the_run(made, tmp_path):
    beside = tmp_path / "runs" / "converted" / "tokenizer"
    checkpoint = tmp_path / "runs" / "converted" / "iter_0000002"
    shutil.copytree(made, beside)
    run = state_of(*SHAPE)
    assert tokenizer_lookup.find_directory(None, checkpoint, run, 320) == str(beside)
    with pytest.raises(UserError, match="has 300 tokens, more than model.vocab_size = 256"):
        tokenizer_lookup.find_directory(None, checkpoint, run, 256)
    alone = tmp_path / "runs" / "own" / "iter_0000002"
    with pytest.raises(
        UserError, match=r"no tokenizer beside .*\(data.kind = mock\); give --tokenizer"
    ):
        tokenizer_lookup.find_directory(None, alone, run, 320)
    assert tokenizer_lookup.find_directory(str(beside), alone, run, 320) == str(beside)
    named = replace(
        run, config={"run_dir": "runs/own", "data": {"kind": "indexed", "tokenizer": "tok"}}
    )
    with pytest.raises(UserError, match="data.tokenizer = tok of the run does not exist"):
        tokenizer_lookup.find_directory(None, alone, named, 320)
    shutil.copytree(beside, tmp_path / "tok")  # beside runs/, where the run was started
    assert tokenizer_lookup.find_directory(None, alone, named, 320) == str(tmp_path / "tok")
