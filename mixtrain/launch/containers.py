"""What a job's container sees of the host: the checkout, the folder of the submission, launcher.container_mounts.

Rule: a path of the configuration is meant as the container sees it, and must lie in a mount: a checkpoint that is
written anywhere else is gone with the container. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mixtrain.config.choices import DataKind
from mixtrain.config.data_blend import parse_blend
from mixtrain.config.schema import Config
from mixtrain.errors import UserError


class Mount(NamedTuple):
    """A folder of the host, and where it is in the container; `options` as pyxis takes them, `ro` say."""

    host: str
    container: str
    options: str = ""

    def __str__(self) -> str:
        return ":".join(part for part in self if part)


def parse(text: str) -> Mount:
    """PATH, HOST:CONTAINER or HOST:CONTAINER:OPTIONS. UserError for anything else."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts) or not all(os.path.isabs(path) for path in parts[:2]):
        raise UserError(
            f"launcher.container_mounts: {text} must be /PATH, /HOST:/CONTAINER or"
            " /HOST:/CONTAINER:ro, all absolute"
        )
    return Mount(parts[0], *(parts[1:] or parts))


def mounts_of(config: Config, folder: Path, root: Path) -> list[Mount]:
    """All mounts of a job that is submitted from `folder`, with the checkout in `root`; the later ones lie on top."""
    own = [Mount(path, path) for path in dict.fromkeys((str(root), str(folder)))]
    given = [parse(text) for text in config.launcher.container_mounts]
    taken = {mount.container for mount in given}
    return [mount for mount in own if mount.container not in taken] + given


def on_host(path: str, mounts: list[Mount]) -> str | None:
    """The host's path of what the container calls `path`; None if no mount holds it."""
    path = os.path.normpath(path)
    holding = [
        mount
        for mount in mounts
        if path == mount.container or path.startswith(mount.container.rstrip("/") + "/")
    ]
    if not holding:
        return None
    innermost = max(holding, key=lambda mount: len(mount.container))
    return os.path.normpath(innermost.host + path[len(innermost.container.rstrip("/")) :])


def paths_of(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of everything that a run reads or writes."""
    yield "run_dir", config.run_dir
    yield "data.path_to_cache", config.data.path_to_cache
    if config.checkpoint.load_weights:
        yield "checkpoint.load_weights", config.checkpoint.load_weights
    if config.data.kind is DataKind.indexed:
        yield "data.tokenizer", config.data.tokenizer
        for prefix in parse_blend(config.data.data_path)[0]:
            yield "data.data_path", prefix


def hidden(config: Config, folder: Path, mounts: list[Mount]) -> Iterator[str]:
    """A sentence for each path that the container would not see."""
    for key, path in paths_of(config):
        if on_host(os.path.join(folder, path), mounts) is None:
            yield (
                f"{key} = {path} is in none of launcher.container_mounts, so the container would"
                f" not see it; add {os.path.dirname(os.path.join(folder, path)) or '/'} to them"
            )


def as_on_host(config: Config, folder: Path, mounts: list[Mount]) -> Config:
    """The configuration with the host's paths, to look from outside at what the container will see."""

    def there(path: str | None) -> str | None:
        return path and (on_host(os.path.join(folder, path), mounts) or path)

    data = config.data
    if data.kind is DataKind.indexed:
        prefixes = set(parse_blend(data.data_path)[0])
        entries = [
            there(entry) if entry in prefixes else entry for entry in map(str, data.data_path)
        ]
        data = replace(data, data_path=entries, tokenizer=there(data.tokenizer))
    checkpoint = replace(config.checkpoint, load_weights=there(config.checkpoint.load_weights))
    return replace(config, run_dir=there(config.run_dir), data=data, checkpoint=checkpoint)
