"""The host folders in a job's container: checkout, submission folder, launcher.container_mounts.

Rule: paths in the configuration are the container's, and must lie in a mount: a checkpoint written
elsewhere is lost with the container. No torch.
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
    """A folder of the host, its path in the container, and pyxis' options, such as `ro`."""

    host: str
    container: str
    options: str = ""

    def __str__(self) -> str:
        return ":".join(field for field in self if field)


def parse_mount(text: str) -> Mount:
    """Parse PATH, HOST:CONTAINER or HOST:CONTAINER:OPTIONS. UserError for anything else."""
    fields = text.split(":")
    if len(fields) > 3 or not all(fields) or not all(os.path.isabs(path) for path in fields[:2]):
        raise UserError(
            f"launcher.container_mounts: {text} must be /PATH, /HOST:/CONTAINER or"
            " /HOST:/CONTAINER:ro, all absolute"
        )
    return Mount(fields[0], *(fields[1:] or fields))


def mounts_of(
    config: Config, folder: Path, root: Path, config_dir: Path | None = None
) -> list[Mount]:
    """Return all mounts of a job submitted from `folder`, with the checkout in `root`.

    `config_dir` has the user's own options. Later mounts cover earlier ones.
    """
    paths = [str(path) for path in (root, folder, config_dir) if path]
    default = [Mount(path, path) for path in dict.fromkeys(paths)]
    given = [parse_mount(text) for text in config.launcher.container_mounts]
    taken = {mount.container for mount in given}
    return [mount for mount in default if mount.container not in taken] + given


def on_host(path: str, mounts: list[Mount]) -> str | None:
    """Return the host's path for a path in the container; None if it lies in no mount."""
    path = os.path.normpath(path)
    containing = [
        mount
        for mount in mounts
        if path == mount.container or path.startswith(mount.container.rstrip("/") + "/")
    ]
    if not containing:
        return None
    innermost = max(containing, key=lambda mount: len(mount.container))
    return os.path.normpath(innermost.host + path[len(innermost.container.rstrip("/")) :])


def paths_of(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, path) of everything that a run reads or writes."""
    yield "run_dir", config.run_dir
    yield "data.path_to_cache", config.data.path_to_cache
    if config.checkpoint.load_weights:
        yield "checkpoint.load_weights", config.checkpoint.load_weights
    if config.data.kind is DataKind.indexed:
        yield "data.tokenizer", config.data.tokenizer
        for prefix in parse_blend(config.data.data_path)[0]:
            yield "data.data_path", prefix


def hidden_path_problems(config: Config, folder: Path, mounts: list[Mount]) -> Iterator[str]:
    """Yield a message for each path that the container would not see."""
    for key, path in paths_of(config):
        if on_host(os.path.join(folder, path), mounts) is None:
            yield (
                f"{key} = {path} is in none of launcher.container_mounts, so the container would"
                f" not see it; add {os.path.dirname(os.path.join(folder, path)) or '/'} to them"
            )


def with_host_paths(config: Config, folder: Path, mounts: list[Mount]) -> Config:
    """Return the configuration with the host's paths, to check them outside the container."""

    def host_path(path: str | None) -> str | None:
        return path and (on_host(os.path.join(folder, path), mounts) or path)

    data = config.data
    if data.kind is DataKind.indexed:
        prefixes = set(parse_blend(data.data_path)[0])
        entries = [
            host_path(entry) if entry in prefixes else entry for entry in map(str, data.data_path)
        ]
        data = replace(data, data_path=entries, tokenizer=host_path(data.tokenizer))
    checkpoint = replace(config.checkpoint, load_weights=host_path(config.checkpoint.load_weights))
    return replace(config, run_dir=host_path(config.run_dir), data=data, checkpoint=checkpoint)
