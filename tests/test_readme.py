"""The README is a transcript: its commands run, and print what it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def transcripts() -> list[tuple[list[str], str]]:
    """(words of a command, the output block that follows it or nothing)."""
    found = []
    for number, (kind, text) in enumerate(BLOCKS):
        if kind == "console":
            commands = [
                line[2:] for line in text.replace("\\\n", " ").splitlines() if line.startswith("$ ")
            ]
            after = BLOCKS[number + 1] if number + 1 < len(BLOCKS) else ("console", "")
            for command in commands:
                found.append(
                    (shlex.split(command), "" if after[0] or command != commands[-1] else after[1])
                )
    return found


TRAINING = [(words, shown) for words, shown in transcripts() if "train.py" in words]


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize(
    "words, shown", TRAINING, ids=[" ".join(words)[-60:] for words, _ in TRAINING]
)
def test_a_training_command_composes_and_prints_what_the_readme_shows(words, shown):
    overrides = words[words.index("train.py") + 1 :]
    done = run(["train.py", *overrides, "trainer.mode=plan"])
    refused = "mixtrain: " in shown
    assert done.returncode == (2 if refused else 0), done.stderr
    printed = (done.stderr if refused else done.stdout).splitlines()
    for line in shown.splitlines():
        assert line.strip() == "..." or line in printed, line


def test_the_plan_of_the_default_is_the_one_that_the_readme_shows():
    shown = next(text for kind, text in BLOCKS if not kind and text.startswith("run    "))
    printed = run(["train.py", "trainer.mode=plan", "run_dir=runs/laptop"]).stdout.splitlines()
    lines = [line for line in shown.split("  ...")[0].splitlines()]
    assert len(lines) >= 5 and all(line in printed for line in lines)


def test_the_first_steps_of_the_default_are_the_ones_that_the_readme_shows():
    """The whole default run is in tests/launch/test_launch.py, shortened; here only the columns."""
    from mixtrain.training.sinks.terminal import HEADER

    assert HEADER in README


def test_the_preprocessing_command_has_the_options_that_the_readme_uses():
    words = next(words for words, _ in transcripts() if "tools/preprocess_data.py" in words)
    printed = run(["tools/preprocess_data.py", "--help"]).stdout
    options = [word for word in words if word.startswith("--")]
    assert options and all(option in printed for option in options)


def test_every_make_target_is_listed_by_make_help():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    printed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    assert targets == {"help", "setup", "train", "test", "test-long", "check", "plan", "mutants"}
    assert all(re.search(rf"make {target} +\w", printed) for target in targets)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_of_the_docs_is_short_and_names_files_that_exist(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 200
    for name in re.findall(r"`((?:mixtrain|conf|recipes|tests|tools)/[\w./]+)`", text):
        assert list(ROOT.glob(name.replace("NAME", "*"))), name
    for name in re.findall(r"`([a-z_]+\.py)`", text):
        assert list(ROOT.glob(f"mixtrain/**/{name}")) or (ROOT / name).exists(), name
    for name in re.findall(r"`((?!mixtrain|megatron)[a-z_]+/[a-z_/]+\.py)`", text):
        assert (ROOT / "mixtrain" / name).exists() or (ROOT / name).exists(), name
