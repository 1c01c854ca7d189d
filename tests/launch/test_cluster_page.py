"""The commands of docs/cluster.md and the README compose, and the keys they name exist."""

from __future__ import annotations

import re
import shlex

from composing import ROOT, run_train

from mixtrain.config.schema import legal_keys

PAGES = {name: (ROOT / name).read_text() for name in ("docs/cluster.md", "README.md")}
COMMANDS = [
    shlex.split(line[2:].rstrip("\\") + (" " + following.strip() if line.endswith("\\") else ""))
    for page in PAGES.values()
    for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    for line, following in zip(block.splitlines(), [*block.splitlines()[1:], ""], strict=True)
    if line.startswith("$ ")
]


def test_jobs_by_hand_are_shown():
    by_hand = [words for words in COMMANDS if "slurm/train.sbatch" in words]
    assert by_hand
    for words in by_hand:
        overrides = words[words.index("slurm/train.sbatch") + 1 :]
        assert run_train(*overrides, "trainer.mode=plan").returncode == 0


def test_every_key_of_the_launcher_is_explained():
    page = PAGES["docs/cluster.md"]
    for key in legal_keys():
        if key.startswith("launcher.") and key != "launcher.type":
            assert re.search(rf"`(launcher\.)?{key.removeprefix('launcher.')}`", page), key


def test_every_key_that_is_named_is_a_key():
    named = re.findall(r"`((?:launcher|trainer|checkpoint)\.[a-z_]+)", PAGES["docs/cluster.md"])
    assert named and set(named) <= set(legal_keys())
