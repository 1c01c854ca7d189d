"""tools/generate.py: what it takes and refuses, the run's model and tokenizer, and what it prints."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import tensors_of
from composing import ROOT, config_of, unstarted_environment
from omegaconf import OmegaConf
from rank_workers import run_ranks
from safetensors.torch import save_file
from test_parity import TINY
from test_resume import path_of, start
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from mixtrain.checkpoint import state
from mixtrain.checkpoint.state import RunState
from mixtrain.config import to_yaml
from mixtrain.convert import settings as hugging_face
from mixtrain.convert.weights import to_hugging_face
from mixtrain.data.tokenizer import train_bpe
from mixtrain.errors import FINISHED, REFUSED, UserError
from mixtrain.generate import settings, tokenizer
from mixtrain.generate.request import Request, Sampling, read_prompts
from mixtrain.generate.run import run
from mixtrain.plan import Plan, resolve

DOCS = (ROOT / "docs" / "generate.md").read_text()
COMMANDS = [shlex.split(line[2:]) for line in DOCS.splitlines() if line.startswith("$ python tools/generate.py")]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
SHAPE = [*TINY, "router=none", "model.vocab_size=320", "parallel.expert_model_parallel_size=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run of two steps, a checkpoint of each, with a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("trained")
    run_dir, codes, log = start(folder, *SHAPE, "trainer.max_steps=2", "checkpoint.save_interval=1")
    assert codes == {FINISHED}, log
    train_bpe(iter([DOCS]), 300, run_dir / "tokenizer")
    path = run_dir / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return run_dir


def command(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate.py"), *words],
        cwd=cwd,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def greedy_of_transformers(checkpoint: Path, prompts: list[str], new: int, folder: Path) -> list[list[int]]:
    """What transformers makes of a checkpoint's weights, as files, and of its tokenizer."""
    config = resolve(config_of(*SHAPE))
    weights = {key: whole for key, whole in tensors_of(checkpoint).items() if not key.startswith("optimizer.")}
    save_file(to_hugging_face(config, weights), folder / "model.safetensors", {"format": "pt"})
    MixtralConfig(**hugging_face.to_hugging_face(config)).save_pretrained(folder)
    there = MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    encode = AutoTokenizer.from_pretrained(checkpoint.parent / "tokenizer")
    found = []
    for prompt in prompts:
        ids = encode(prompt, return_tensors="pt")["input_ids"]
        done = there.generate(
            ids, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=encode.eos_token_id
        )
        found.append(done[0, ids.shape[1] :].tolist())
    return found


def test_the_commands_of_the_docs_run_and_give_transformers_tokens(trained, tmp_path):
    plain, as_json = COMMANDS
    one = command(*(str(trained) if word == "runs/laptop" else word for word in plain[2:]))
    assert one.returncode == FINISHED, one.stderr
    assert one.stderr.splitlines()[0] == f"generate: {path_of(trained, 2)} on 1 rank, cpu, fp32"
    assert re.fullmatch(
        r"generate: 1 prompt with \d+ tokens continued with \d+ in [\d.]+ s: \S+ tokens/s, the first after [\d.]+ s",
        one.stderr.splitlines()[-1],
    )
    two = command(*(str(trained) if word == "runs/laptop" else word for word in as_json[2:]))
    assert two.returncode == FINISHED, two.stderr
    assert two.stderr.splitlines()[0].endswith("on 2 ranks (EP 2 x DP 2), cpu, fp32")
    lines = [json.loads(line) for line in two.stdout.splitlines()]
    prompts = [as_json[place + 1] for place, word in enumerate(as_json) if word == "--prompt"]
    assert [line["prompt"] for line in lines] == prompts and len(prompts) == 2
    new = int(as_json[as_json.index("--max-new-tokens") + 1])
    assert [line["tokens"] for line in lines] == greedy_of_transformers(path_of(trained, 2), prompts, new, tmp_path)
    assert {line["reason"] for line in lines} <= {"length", "eod"}
    decode = AutoTokenizer.from_pretrained(trained / "tokenizer").decode
    assert all(line["text"] == decode(line["tokens"], skip_special_tokens=True) for line in lines)
    assert plain[plain.index("--prompt") + 1] == prompts[0] and int(plain[plain.index("--max-new-tokens") + 1]) == new
    assert one.stdout == lines[0]["text"] + "\n"  # at one rank


def plan_of(run_dir: Path, *words: str, folder: Path) -> Plan:
    tree, problems = settings.composed(list(words))
    checkpoint, _ = settings.find(str(run_dir), full=True)
    return settings.plan_of(tree, list(words), state.read(checkpoint), checkpoint, str(folder), None, problems)


def asked(run_dir: Path, *prompts: str, new: int = 12, **more) -> Request:
    values = {"stop": [], "chat": False, "batch_size": 2, "as_json": True, "sampling": Sampling()}
    return Request(list(prompts), str(run_dir / "tokenizer"), max_new_tokens=new, **values | more)


def generated(run_dir: Path, request: Request, folder: Path) -> tuple[int, list[dict], str]:
    """(exit code, lines of JSON, all that was printed) of one rank."""
    plan = plan_of(run_dir, folder=folder)
    (code,) = run_ranks(1, lambda me: run(plan, request, me), folder / "ranks")
    log = (folder / "ranks" / "rank_0.log").read_text()
    return code, [json.loads(line) for line in log.splitlines() if line.startswith("{")], log


@pytest.fixture(scope="module")
def text(trained, tmp_path_factory) -> str:
    """What follows "generate" greedily."""
    code, (line,), log = generated(trained, asked(trained, "generate", new=40), tmp_path_factory.mktemp("text"))
    assert code == FINISHED and len(line["tokens"]) == 40, log
    return line["text"]


def test_a_text_ends_before_the_first_stop_text(trained, text, tmp_path):
    stop = text[7:10]
    place = text.index(stop)
    request = asked(trained, "generate", "x", "generate", new=40, stop=["not in it", stop])  # two batches
    code, lines, log = generated(trained, request, tmp_path)
    assert code == FINISHED and [line["prompt"] for line in lines] == ["generate", "x", "generate"], log
    assert lines[0]["text"] == lines[2]["text"] == text[:place]
    assert lines[0]["reason"] == "stop" and len(lines[0]["tokens"]) < 40


def test_in_a_chat_the_template_stands_around_the_prompt(trained, tmp_path):
    (chat,) = generated(trained, asked(trained, "hello", chat=True), tmp_path / "chat")[1]
    (same,) = generated(trained, asked(trained, "<user>hello\n<assistant>"), tmp_path / "plain")[1]
    (other,) = generated(trained, asked(trained, "hello"), tmp_path / "bare")[1]
    assert chat["tokens"] == same["tokens"] != other["tokens"] and chat["prompt"] == "hello"


def test_a_prompt_that_leaves_no_room_is_refused_with_what_would_fit(trained, tmp_path):
    positions = resolve(config_of(*SHAPE)).model.max_position_embeddings
    code, lines, log = generated(trained, asked(trained, "a b", new=positions), tmp_path)
    assert code == REFUSED and not lines
    assert f"more than model.max_position_embeddings = {positions:,}; use --max-new-tokens {positions - 3}" in log


def test_a_tokenizer_that_wants_code_of_its_own_run_is_refused(trained, tmp_path):
    """And the code is not run."""
    made = tmp_path / "tokenizer"
    shutil.copytree(trained / "tokenizer", made)
    (made / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    path = made / "tokenizer_config.json"
    words = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    path.write_text(json.dumps(words))
    code, lines, log = generated(trained, replace(asked(trained, "x"), tokenizer=str(made)), tmp_path)
    assert code == REFUSED and "cannot read the tokenizer" in log and not (tmp_path / "ran").exists()


def test_the_newest_valid_checkpoint_is_taken_and_a_damaged_one_named(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    shard = next(path_of(run_dir, 2).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found, (damage,) = settings.find(str(run_dir), full=False)
    assert found == path_of(run_dir, 1) and damage.startswith(f"{shard} has ")
    for place in (path_of(run_dir, 2), tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError):
            settings.find(str(place), full=False)


def state_of(*words: str) -> RunState:
    return RunState(config=OmegaConf.to_container(OmegaConf.create(to_yaml(resolve(config_of(*words))))))


def planned(run: RunState, *words: str) -> Plan:
    tree, problems = settings.composed(list(words))
    return settings.plan_of(tree, list(words), run, Path("ckpt"), "folder", None, problems)


def test_the_model_is_the_runs_and_the_layout_that_of_the_words():
    run = state_of(
        *SHAPE, "model.rotary_base=500", "router=sinkhorn", "parallel=pp2_ep2", "trainer.precision=bf16",
        "trainer.recompute_granularity=full", "trainer.recompute_method=uniform", "trainer.recompute_num_layers=1",
        "dispatcher=allgather", "model.extra.moe_permute_fusion=false",
    )  # fmt: skip
    plan = planned(run)
    assert (plan.world_size, plan.config.parallel.pipeline_model_parallel_size) == (1, 1)
    assert (plan.config.model.rotary_base, plan.config.model.vocab_size) == (500, 320)
    assert plan.config.model.extra == {"moe_permute_fusion": False}
    assert plan.config.trainer.precision.name == "bf16" and plan.config.trainer.recompute_granularity is None
    assert plan.config.router.moe_router_load_balancing_type[0].name == "sinkhorn"
    assert settings.changed(run, plan) == []
    plan = planned(run, "parallel=ep2", "parallel.tensor_model_parallel_size=2", "trainer.precision=fp32")
    assert (plan.world_size, plan.data_parallel_size, plan.config.parallel.sequence_parallel) == (2, 1, True)
    assert settings.changed(run, plan) == ["trainer.precision = fp32 (the run: bf16)"]
    plan = planned(run, "parallel.pipeline_model_parallel_size=2", "trainer.devices=4", "router=aux_loss")
    assert (plan.world_size, plan.data_parallel_size) == (4, 2)
    assert "router.moe_router_load_balancing_type = [aux_loss] (the run: [sinkhorn])" in settings.changed(run, plan)


REFUSALS = {
    "parallel.context_parallel_size=2": "parallel.context_parallel_size = 2: no sequence is split",
    "parallel=pp2_vpp2": "parallel.virtual_pipeline_model_parallel_size = 2: a token goes through",
    "parallel.data_parallel_sharding_strategy=optim": "parallel.data_parallel_sharding_strategy = optim: there are no",
    "dispatcher.moe_expert_capacity_factor=1.0": "dispatcher.moe_expert_capacity_factor = 1.0: which tokens",
    "router.moe_router_force_load_balancing=true": "router.moe_router_force_load_balancing = true: the router",
    "trainer.precision=fp8": "trainer.precision = fp8: it needs Transformer Engine",
    "parallel.sequence_parallel=true": "parallel.sequence_parallel = true: generation sets this itself, to false",
    "model.transformer_impl=local": "model.transformer_impl = local: generation sets this itself, to torch",
    "parallel.expert_model_parallel_size=3": "parallel.expert_model_parallel_size = 3 must divide",
    "trainer.num_nodes=2": "trainer.num_nodes = 2, but nothing has started",
    "trainer.accelerator=gpu": "trainer.accelerator = gpu with trainer.devices = 1, but this machine has 0 GPUs",
    "parallel=ep3": "parallel=ep3: did you mean",
    "+recipe=mixtral_8x7b_ep8": "+recipe=mixtral_8x7b_ep8: the model is the checkpoint's",
    "parallel.expert_parallel=2": "parallel.expert_parallel is not a key of mixtrain",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_what_there_is_no_generation_for_is_refused_by_its_key(word, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as refused:
        planned(state_of(*SHAPE), word)
    assert any(problem.startswith(REFUSALS[word]) for problem in refused.value.problems), refused.value


def test_what_a_run_was_trained_with_is_refused_by_its_key_too():
    capacity = "dispatcher.moe_expert_capacity_factor"
    with pytest.raises(UserError, match=f"use {capacity}=null"):
        planned(state_of(*SHAPE, f"{capacity}=1.0"))
    plan = planned(run := state_of(*SHAPE, f"{capacity}=1.0"), f"{capacity}=null")
    assert settings.changed(run, plan) == [f"{capacity} = null (the run: 1.0)"]
    assert planned(state_of(*SHAPE, "router.moe_input_jitter_eps=0.1")).config.router.moe_input_jitter_eps is None


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
def test_a_request_is_refused_by_the_option_that_is_wrong(change, problem, tmp_path):
    right = asked(tmp_path, "x")
    assert list(right.problems()) == []
    (found,) = replace(right, **change).problems()
    assert found.startswith(problem)


def test_a_request_is_handed_over_whole(tmp_path):
    request = asked(tmp_path, "a\nb", "ü", stop=["."], chat=True, sampling=Sampling(0.5, 3, 0.9, 7))
    request.write(tmp_path)
    assert Request.read(tmp_path) == request


def test_prompts_come_from_lines_or_from_objects(tmp_path):
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\n two \n")
    objects.write_text('{"prompt": "a\\nb"}\n')
    assert read_prompts(str(lines)) == ["one", " two "] and read_prompts(str(objects)) == ["a\nb"]
    for wrong, why in (("{}\n", "line 1: an object"), ("[\n", "line 1: not valid JSON"), ("\n", "there is no prompt")):
        objects.write_text(wrong)
        with pytest.raises(UserError, match=why):
            read_prompts(str(objects))
    with pytest.raises(UserError, match="No such file"):
        read_prompts(str(tmp_path / "nothing"))


def test_the_tokenizer_is_the_one_beside_the_checkpoint_or_that_of_the_run(trained, tmp_path):
    beside, checkpoint = trained / "tokenizer", path_of(trained, 2)
    run = state.read(checkpoint)
    assert tokenizer.directory_of(None, checkpoint, run, 320) == str(beside)
    with pytest.raises(UserError, match="has 300 tokens, more than model.vocab_size = 256"):
        tokenizer.directory_of(None, checkpoint, run, 256)
    alone = tmp_path / "runs" / "own" / "iter_0000002"
    with pytest.raises(UserError, match=r"no tokenizer \(data.kind = mock\); give --tokenizer"):
        tokenizer.directory_of(None, alone, run, 320)
    assert tokenizer.directory_of(str(beside), alone, run, 320) == str(beside)
    named = replace(run, config={"run_dir": "runs/own", "data": {"kind": "indexed", "tokenizer": "tok"}})
    with pytest.raises(UserError, match="data.tokenizer = tok of the run is not there"):
        tokenizer.directory_of(None, alone, named, 320)
    shutil.copytree(beside, tmp_path / "tok")  # beside runs/, where the run was started
    assert tokenizer.directory_of(None, alone, named, 320) == str(tmp_path / "tok")


def test_of_the_texts_of_the_standard_library_the_runs_own_is_found_by_its_fingerprint(trained, tmp_path):
    for name, content in (("stdlib-a", b"other"), ("stdlib-b", b"the text")):
        shutil.copytree(trained / "tokenizer", tmp_path / name / "text-tokenizer")
        (tmp_path / name / "text.bin").write_bytes(content)
        (tmp_path / name / "text.idx").write_bytes(content)
    data = {"kind": "stdlib", "tokenizer": None, "path_to_cache": str(tmp_path)}
    run = RunState(config={"data": data}, data={"documents": tokenizer.documents(tmp_path / "stdlib-b" / "text")})
    assert tokenizer.directory_of(None, tmp_path / "iter_0000001", run, 300) == str(
        tmp_path / "stdlib-b/text-tokenizer"
    )
    with pytest.raises(UserError, match="is not in data.path_to_cache"):
        tokenizer.directory_of(None, tmp_path / "iter_0000001", replace(run, data={"documents": "no"}), 300)


def test_a_real_run_has_that_fingerprint(tmp_path):
    """Of a text that is indexed here, by the data set's own fingerprint."""
    from mixtrain.data.datasets import build
    from mixtrain.data.fingerprint import fingerprint
    from mixtrain.data.preprocess import preprocess
    from mixtrain.data.sources import Files

    preprocess(Files(ROOT, ["README.md"]), tmp_path / "text", train_vocab_size=300, workers=1, log=lambda words: None)
    made, _, _ = build(
        "indexed", data_path=[str(tmp_path / "text")], split="100,0,0", seq_length=32, seed=1, train_samples=4,
        valid_samples=0, test_samples=0, tokenizer_dir=tmp_path / "text-tokenizer", vocab_size=300,
        path_to_cache=tmp_path / "cache", log=lambda words: None,
    )  # fmt: skip
    assert tokenizer.documents(tmp_path / "text") == fingerprint(made)["documents"]


def test_the_arguments_are_refused_before_anything_is_started(trained):
    done = command(str(trained), "--top-k", "0")
    assert done.returncode == REFUSED and done.stderr.splitlines()[0] == "mixtrain: 3 problems:"
    assert not done.stdout and "Traceback" not in done.stderr
    done = command(str(trained), "--prompt", "x", "--tempreature", "1")
    assert done.returncode == REFUSED and done.stderr.splitlines()[-1].endswith(
        "unrecognized arguments: --tempreature 1"
    )
