"""tools/generate.py: its arguments and refusals, the model and tokenizer, what it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from composing import ROOT, config_of, unstarted_environment
from rank_workers import run_ranks
from test_parity import TINY
from test_resume import path_of, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixtrain.checkpoint import integrity, state
from mixtrain.config.plan import Plan, resolve
from mixtrain.data.tokenizer import train_bpe
from mixtrain.errors import FINISHED, REFUSED, UserError
from mixtrain.interop.convert import to_hf
from mixtrain.interop.generate import generation_plan
from mixtrain.interop.generate.rank import run
from mixtrain.interop.generate.request import Request, Sampling

DOCS = (ROOT / "docs" / "generate.md").read_text()
COMMANDS = [
    shlex.split(line[2:])
    for line in DOCS.splitlines()
    if line.startswith("$ python tools/generate.py")
]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "<assistant>"
)
TP2 = "parallel.tensor_model_parallel_size=2"
SHAPE = [*TINY, "router=none", "model.vocab_size=320", "parallel.expert_model_parallel_size=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The directory of a run of two steps, a checkpoint of each, with a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("trained")
    run_dir, codes, log = start(folder, *SHAPE, "trainer.max_steps=2", "checkpoint.save_interval=1")
    assert codes == {FINISHED}, log
    train_bpe(iter([Path(__file__).read_text()]), 300, run_dir / "tokenizer")
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


def greedy_of_transformers(
    checkpoint: Path, prompts: list[str], new: int, folder: Path
) -> list[list[int]]:
    """What transformers makes of an exported checkpoint, opened as its users open it."""
    to_hf.convert(checkpoint, folder / "exported")
    there = AutoModelForCausalLM.from_pretrained(folder / "exported")
    encode = AutoTokenizer.from_pretrained(folder / "exported")
    assert there.config.eos_token_id == encode.eos_token_id == 0
    found = []
    for prompt in prompts:
        ids = encode(prompt, return_tensors="pt")
        done = there.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
        found.append(done[0, ids["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.long
def test_the_commands_of_the_docs_run_and_give_transformers_tokens(trained, tmp_path):
    plain, as_json = COMMANDS
    one = command(*(str(trained) if word == "runs/laptop" else word for word in plain[2:]))
    assert one.returncode == FINISHED, one.stderr
    assert one.stderr.splitlines()[0] == f"generate: {path_of(trained, 2)} on 1 rank, cpu, fp32"
    assert re.fullmatch(
        r"generate: 1 prompt with \d+ tokens continued with \d+ in [\d.]+ s: \S+ tokens/s,"
        r" the first after [\d.]+ s",
        one.stderr.splitlines()[-1],
    )
    two = command(*(str(trained) if word == "runs/laptop" else word for word in as_json[2:]))
    assert two.returncode == FINISHED, two.stderr
    assert two.stderr.splitlines()[0].endswith("on 2 ranks (EP 2 x DP 2), cpu, fp32")
    lines = [json.loads(line) for line in two.stdout.splitlines()]
    prompts = [as_json[place + 1] for place, word in enumerate(as_json) if word == "--prompt"]
    assert [line["prompt"] for line in lines] == prompts and len(prompts) == 2
    new = int(as_json[as_json.index("--max-new-tokens") + 1])
    expected = greedy_of_transformers(path_of(trained, 2), prompts, new, tmp_path)
    assert [line["tokens"] for line in lines] == expected
    at_tp2 = asked(trained, *prompts, new=new)
    plan = plan_of(trained, TP2, folder=tmp_path / "tp2")
    run_ranks(2, lambda identity: run(plan, at_tp2, identity), tmp_path / "ranks")
    log = (tmp_path / "ranks" / "rank_0.log").read_text()
    assert [
        json.loads(line)["tokens"] for line in log.splitlines() if line.startswith("{")
    ] == expected
    assert {line["reason"] for line in lines} <= {"length", "eod"}
    decode = AutoTokenizer.from_pretrained(trained / "tokenizer").decode
    assert all(line["text"] == decode(line["tokens"], skip_special_tokens=True) for line in lines)
    assert (
        plain[plain.index("--prompt") + 1] == prompts[0]
        and int(plain[plain.index("--max-new-tokens") + 1]) == new
    )
    assert one.stdout == lines[0]["text"] + "\n"  # at one rank


def plan_of(run_dir: Path, *words: str, folder: Path) -> Plan:
    tree, problems = generation_plan.compose_overrides(list(words))
    checkpoint, _ = generation_plan.find_checkpoint(str(run_dir), full=True)
    return generation_plan.plan_of(
        tree, list(words), state.read(checkpoint), checkpoint, str(folder), None, problems
    )


def asked(run_dir: Path, *prompts: str, new: int = 12, **more) -> Request:
    values = {"stop": [], "chat": False, "batch_size": 2, "as_json": True, "sampling": Sampling()}
    return Request(list(prompts), str(run_dir / "tokenizer"), max_new_tokens=new, **values | more)


def generated(run_dir: Path, request: Request, folder: Path) -> tuple[int, list[dict], str]:
    """(exit code, lines of JSON, all that was printed) of one rank."""
    plan = plan_of(run_dir, folder=folder)
    (code,) = run_ranks(1, lambda identity: run(plan, request, identity), folder / "ranks")
    log = (folder / "ranks" / "rank_0.log").read_text()
    return code, [json.loads(line) for line in log.splitlines() if line.startswith("{")], log


@pytest.fixture(scope="module")
def text(trained, tmp_path_factory) -> str:
    """What follows "generate" greedily."""
    code, (line,), log = generated(
        trained, asked(trained, "generate", new=40), tmp_path_factory.mktemp("text")
    )
    assert code == FINISHED and len(line["tokens"]) == 40, log
    return line["text"]


def test_a_text_ends_before_the_first_stop_text(trained, text, tmp_path):
    stop = text[7:10]
    place = text.index(stop)
    # two batches
    request = asked(trained, "generate", "x", "generate", new=40, stop=["not in it", stop])
    code, lines, log = generated(trained, request, tmp_path)
    assert code == FINISHED and [line["prompt"] for line in lines] == [
        "generate",
        "x",
        "generate",
    ], log
    assert lines[0]["text"] == lines[2]["text"] == text[:place]
    assert lines[0]["reason"] == "stop" and len(lines[0]["tokens"]) < 40


def test_a_generation_whose_reader_has_gone_stops_after_its_batch(trained, tmp_path):
    request = asked(trained, "generate", "x", "y", new=40, batch_size=1)

    def unread(identity) -> int:
        gone, here = os.pipe()
        os.close(gone)
        os.dup2(here, 1)
        return run(plan_of(trained, folder=tmp_path), request, identity)

    (code,) = run_ranks(1, unread, tmp_path / "ranks")
    log = (tmp_path / "ranks" / "rank_0.log").read_text()
    assert code == FINISHED and "Traceback" not in log, log
    assert "continued with 4" in log  # 40 or 41 tokens, not 120


def test_in_a_chat_the_template_stands_around_the_prompt(trained, tmp_path):
    (chat,) = generated(trained, asked(trained, "hello", chat=True), tmp_path / "chat")[1]
    (same,) = generated(trained, asked(trained, "<user>hello\n<assistant>"), tmp_path / "plain")[1]
    (other,) = generated(trained, asked(trained, "hello"), tmp_path / "bare")[1]
    assert chat["tokens"] == same["tokens"] != other["tokens"] and chat["prompt"] == "hello"


def test_a_prompt_that_leaves_no_room_is_refused_with_what_would_fit(trained, tmp_path):
    positions = resolve(config_of(*SHAPE)).model.max_position_embeddings
    # two bytes, two tokens
    code, lines, log = generated(trained, asked(trained, "ü", new=positions), tmp_path)
    assert code == REFUSED and not lines
    assert (
        f"more than model.max_position_embeddings = {positions:,}; use --max-new-tokens"
        f" {positions - 2}" in log
    )
    code, lines, log = generated(trained, asked(trained, "ü" * 1024), tmp_path / "long")
    assert code == REFUSED and "use a shorter one" in log


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
    code, lines, log = generated(
        trained, replace(asked(trained, "x"), tokenizer=str(made)), tmp_path
    )
    assert (
        code == REFUSED and "cannot read the tokenizer" in log and not (tmp_path / "ran").exists()
    )


def test_the_newest_valid_checkpoint_is_taken_and_a_damaged_one_named(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    shard = next(path_of(run_dir, 2).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found, (damage,) = generation_plan.find_checkpoint(str(run_dir), full=False)
    assert found == path_of(run_dir, 1) and damage.startswith(f"{shard} has ")
    path_of(run_dir, 1).rename(tmp_path / "release")  # as a conversion calls it
    assert generation_plan.find_checkpoint(str(tmp_path), full=True) == (tmp_path / "release", [])
    for place in (path_of(run_dir, 2), run_dir, tmp_path / "nothing"):
        with pytest.raises(UserError):
            generation_plan.find_checkpoint(str(place), full=False)


def test_sizes_that_only_the_state_of_a_run_has_are_refused_before_they_take_memory(
    trained, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    path = path_of(run_dir, 2)
    state = json.loads((path / "run_state.json").read_text())
    state["config"]["model"]["vocab_size"] = 1 << 40  # some hundred TB
    (path / "run_state.json").write_text(json.dumps(state))
    integrity.write_manifest(
        path, integrity.describe(file for file in path.iterdir() if file.name != "integrity.json")
    )
    code, _, log = generated(run_dir, asked(run_dir, "a"), tmp_path / "work")
    differing = "embedding.word_embeddings.weight is [320, 64] in it, [1099511627776, 64] in this"
    assert code == REFUSED and differing in log


def test_the_arguments_are_refused_before_anything_is_started(trained):
    done = command(str(trained), "--top-k", "0")
    assert done.returncode == REFUSED and done.stderr.splitlines()[0] == "mixtrain: 3 problems:"
    assert not done.stdout and "Traceback" not in done.stderr
    done = command(str(trained), "--prompt", "x", "--tempreature", "1")
    assert done.returncode == REFUSED and done.stderr.splitlines()[-1].endswith(
        "unrecognized arguments: --tempreature 1"
    )
