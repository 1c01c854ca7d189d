"""Fixtures of several test files: a model of transformers on the disk, and its checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Under nohup and in the background of a script a signal is ignored, and by what this process starts
# too: an interrupted command would go on. With a handler here it has its own effect there.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# The files that take longest, in their order: begun first, so that two workers end at about the
# same time.
LONGEST = """
    test_launch test_resume test_parity test_bad_steps test_generate_command test_verify_conversion
    test_conversion test_stdlib test_recipes test_conversion_refusals test_checkpoint_faults
    test_checkpoint_tool test_classes test_run
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A Mixtral under the hub's names, in several files. Not to be written to."""
    import hf_models

    return hf_models.saved("mixtral", tmp_path_factory.mktemp("hub") / "model", shard="300KB")


@pytest.fixture(scope="session")
def converted(hub, tmp_path_factory) -> Path:
    """The directory that it was converted to. Not to be written to."""
    from mixtrain.interop.convert import to_megatron

    out = tmp_path_factory.mktemp("converted") / "model"
    to_megatron.convert(hub, out)
    return out
