"""What the pages say can be typed is taken as it stands there: by a shell, then by the command,
then by Hydra.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from composing import ROOT, unstarted_environment

from mixtrain.config.compose import CONF, SCENARIOS, check_overrides, compose, options
from mixtrain.config.schema import FREE, legal_keys

PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name != "faults.md"
]
REFUSED = "parallel.expert_model_parallel_size=5"  # the README shows what is said of it


def commands() -> list[str]:
    """Every command line of a console, and every command or override that stands within a sentence
    or a table.
    """
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
        found += [
            line[2:]
            for block in blocks
            for line in block.replace("\\\n", " ").splitlines()
            if line[:2] == "$ "
        ]
        found += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return list(dict.fromkeys(found))


def is_ours(word: str) -> bool:
    """Whether a word is an override of a key or a group of train.py."""
    key, equals, value = word.strip("'\"").lstrip("+").partition("=")
    group = key and (CONF / key).is_dir() and key != SCENARIOS
    return bool(equals and value) and (key in legal_keys() or key.startswith(FREE) or group)


def in_a_shell(command: str) -> list[str]:
    """The words that bash makes of a command line."""
    done = subprocess.run(
        ["bash", "-uc", f"printf '%s\\0' {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.split("\0")[:-1]


def filled_in(words: list[str]) -> list[str]:
    """With an option in the place of NAME."""
    groups = [
        word.lstrip("+").removesuffix("=NAME") if word.endswith("=NAME") else "" for word in words
    ]
    return [
        word.removesuffix("NAME") + options(group)[0] if group else word
        for word, group in zip(words, groups, strict=True)
    ]


OVERRIDES = [text for text in commands() if is_ours(text.split(" ")[0])]
TRAINING = [
    text for text in commands() if re.match(r"python train.py [^.]", text) and REFUSED not in text
]
SUBMISSIONS = [text for text in commands() if re.match(r"(python )?tools/submit.py .*=", text)]


def test_there_are_some_of_each():
    assert len(OVERRIDES) > 25 and len(TRAINING) > 4 and len(SUBMISSIONS) > 5


@pytest.mark.parametrize("text", OVERRIDES)
def test_an_override_of_a_page_is_taken_as_it_is_typed(text):
    words = filled_in(in_a_shell(text))
    assert check_overrides(words) == (check_overrides(words)[0], [])


@pytest.mark.parametrize("text", TRAINING)
def test_a_training_command_of_a_page_composes_as_it_is_typed(text):
    words = filled_in(in_a_shell(text)[2:])
    jobs, problems = compose(words)
    assert problems == [] and (jobs or "--help" in words)


@pytest.mark.parametrize("text", SUBMISSIONS)
def test_a_submission_of_a_page_can_be_printed_without_slurm(text, tmp_path):
    words = [
        word for word in in_a_shell(text) if word not in ("python", "tools/submit.py", "--print")
    ]
    shown = subprocess.run(
        [sys.executable, str(ROOT / "tools/submit.py"), *words, "--print"],
        cwd=tmp_path,
        env=unstarted_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!/usr/bin/env bash\n")
    assert "--multirun" in words or all(word.split("=")[0] in shown.stdout for word in words)
    assert shown.stderr.startswith("would be sent by: ") and list(tmp_path.iterdir()) == []


def test_every_file_that_answers_a_question_is_there():
    rows = re.findall(
        r"^\| [^|]+\? \| `([^`]+)` \|", (ROOT / "docs" / "where.md").read_text(), flags=re.MULTILINE
    )
    assert len(rows) == 20
    assert [name for name in rows if not (ROOT / "mixtrain" / name).exists()] == []


EXTENDING = (ROOT / "docs" / "extending.md").read_text()
SHOWN_PATHS = sorted(
    {name for name in re.findall(r"`([^`\n]+)`", EXTENDING) if "/" in name and " " not in name}
)


@pytest.mark.parametrize("path", SHOWN_PATHS)
def test_every_path_of_the_page_about_extending_is_there(path):
    assert list(ROOT.glob(path.replace("NAME", "[a-z]*"))), path


def test_every_name_of_a_recipe_is_in_a_file_that_the_recipe_shows():
    for recipe in EXTENDING.split("\n## ")[1:]:
        assert len(recipe.strip().splitlines()) <= 2 + 10, recipe  # heading, blank line, ten lines
        names = set(re.findall(r"`(\w+)`", recipe)) - {"NAME"}
        files = [
            file
            for path in SHOWN_PATHS
            if f"`{path}`" in recipe
            for file in ROOT.glob(path.replace("NAME", "[a-z]*"))
            if file.is_file()
        ]
        text = "\n".join(file.read_text() for file in files)
        assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []
