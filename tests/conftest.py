"""What several files of tests are about: a model of transformers on the disk, and its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest


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
