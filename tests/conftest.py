"""What several files of tests are about: a model of transformers on the disk, and its checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# Under nohup and in the background of a script a signal is ignored, and by what this process starts too: an interrupted
# command would go on. With a handler here it has its own effect there.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A Mixtral under the hub's names, in several files. Not to be written to."""
    import hf_models

    return hf_models.saved("mixtral", tmp_path_factory.mktemp("hub") / "model", shard="300KB")


@pytest.fixture(scope="session")
def converted(hub, tmp_path_factory) -> Path:
    """The directory that it was converted to. Not to be written to."""
    from mixtrain.convert import to_megatron

    out = tmp_path_factory.mktemp("converted") / "model"
    to_megatron.convert(hub, out)
    return out
