"""An export is continued by other programs as by tools/generate.py, and who cannot be asked is
said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from composing import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mixtrain.data.tokenizer import splits_as_gpt2, train_bpe
from mixtrain.interop.convert import to_hf

sys.path.insert(0, str(ROOT / "tools"))
import verify_serving  # noqa: E402

WORDS = [
    "data=stdlib",
    "parallel=ep1",
    "trainer.max_steps=3",
    "model.num_layers=2",
    "trainer.global_batch_size=4",
    "data.seq_length=64",
]


def said(*words: object, code: int) -> str:
    """What the tool prints, on whichever stream."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / words[0], *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """(a run of some steps, its export)."""
    folder = tmp_path_factory.mktemp("served")
    train = [sys.executable, ROOT / "train.py", *WORDS, f"run_dir={folder}/run"]
    done = subprocess.run(train, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    to_hf.convert(folder / "run", folder / "export")
    return folder / "run", folder / "export"


@pytest.mark.long
def test_transformers_continues_an_export_as_generate_continues_the_checkpoint(trained):
    run, export = trained
    shown = said("verify_serving.py", run, export, "--max-new-tokens", 8, code=0)
    assert (
        f"{len(verify_serving.PROMPTS)} of {len(verify_serving.PROMPTS)} continuations are the same"
        in shown
    )


@pytest.mark.long
def test_an_engine_with_other_tokens_is_found_and_the_prompt_is_shown(trained, tmp_path):
    run, export = trained
    other = tmp_path / "other"
    other.mkdir()
    for file in export.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    values = json.loads((other / "config.json").read_text()) | {"num_experts_per_tok": 1}
    (other / "config.json").write_text(json.dumps(values))
    shown = said(
        "verify_serving.py", run, other, "--max-new-tokens", 8, "--prompt", "def main(", code=1
    )
    assert "0 of 1 continuations are the same" in shown and "'def main(':" in shown


@pytest.mark.parametrize(
    "words, part",
    [
        (["--engine", "mlx=/nowhere/python"], "--engine mlx=/nowhere/python: no such file"),
        (["--engine", "llama_cpp"], "--engine llama_cpp and --gguf FILE go together"),
        (
            ["--engine", "llama_cpp", "--gguf", "no.gguf"],
            "no.gguf: no such file; tools/convert_to_gguf.py makes one",
        ),
        (["--max-new-tokens", "129"], "--max-new-tokens 129 must be at most 128"),
        (["--engine", "ollama"], "ollama is none of llama_cpp, mlx, transformers, vllm"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, words, part):
    (tmp_path / "config.json").write_text("{}")
    assert part in said("verify_serving.py", tmp_path, tmp_path, *words, code=2)


@pytest.mark.long
def test_an_engine_that_fails_is_shown_with_its_last_lines(trained):
    shown = said(
        "verify_serving.py",
        *trained,
        "--engine",
        f"vllm={sys.executable}",
        "--max-new-tokens",
        1,
        code=1,
    )
    assert "vllm ended with exit code 1:" in shown and "No module named 'vllm'" in shown


def test_a_trained_tokenizer_splits_as_gpt2s_and_others_are_left_to_the_converter(tmp_path):
    train_bpe(iter([(ROOT / "README.md").read_text()] * 2), 400, tmp_path / "trained")
    assert splits_as_gpt2(tmp_path / "trained")
    for name, change in {
        "normalised": lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFC()),
        "prefixed": lambda tokenizer: setattr(
            tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel()
        ),
        "digits": lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Digits()),
    }.items():
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        change(tokenizer)
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        assert not splits_as_gpt2(tmp_path / name), name


def to_gguf(folder: Path, llama_cpp: Path) -> str:
    """What the tool refuses."""
    (folder / "config.json").write_text("{}")
    return said("convert_to_gguf.py", folder, folder / "x.gguf", "--llama-cpp", llama_cpp, code=2)


def test_without_a_clone_of_llama_cpp_its_converter_is_asked_for(tmp_path):
    shown = to_gguf(tmp_path, tmp_path)
    assert (
        f"--llama-cpp {tmp_path}: no convert_hf_to_gguf.py there; a clone of llama.cpp is wanted"
        in shown
    )


def test_a_tokenizer_of_pieces_without_their_scores_is_not_converted(tmp_path):
    Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert f"{tmp_path} has no tokenizer.model: llama.cpp merges by the scores in it" in to_gguf(
        tmp_path, tmp_path
    )


CONVERTER = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

def main():
    import pathlib, sys
    out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
    out.write_text("half")
    out.write_text(TextModel().get_vocab_base_pre(None))
"""


def test_a_gguf_file_has_its_name_when_it_is_whole_and_what_llama_cpp_does_not_know_is_one_line(
    tmp_path,
):
    """A converter that only asks for the name of the split, as llama.cpp's does."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    words = ("convert_to_gguf.py", tmp_path, tmp_path / "x.gguf", "--llama-cpp", tmp_path)
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Digits()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shown = said(*words, code=1)
    assert shown.count("\n") == 1 and "BPE pre-tokenizer was not recognized" in shown
    assert list(tmp_path.glob("x.gguf*")) == []
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said(*words, code=0)
    assert (tmp_path / "x.gguf").read_text() == "gpt-2"
