"""The checkpoint directories of a run: their names, and atomic changes to them. No torch.

Rule: a directory named iter_NNNNNNN is complete from the moment it has that name. While it is
written, replaced or deleted it has another name, which readers ignore and the next run removes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mixtrain.checkpoint.integrity import MANIFEST

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # weights of no training run: Megatron-LM's name for what a converter writes
# bytes: for the small files of a checkpoint and the headers of the large ones
MARGIN = 1 << 20
LEFTOVER = re.compile(r"iter_\d{7,}\.(saving|replaced|deleting)")


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / f"iter_{step:07d}"


def saving_path(checkpoint: Path) -> Path:
    """Return the name of a checkpoint directory while it is written."""
    return checkpoint.with_name(checkpoint.name + ".saving")


def steps_in(run_dir: str | Path) -> list[int]:
    """Return the steps of the checkpoints in run_dir, newest first, without checking them."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    matches = [re.fullmatch(r"iter_(\d{7,})", name) for name in names]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def checkpoints_in(path: Path) -> list[Path]:
    """Return the checkpoints in a directory, newest first and release/ last, without checking."""
    release = [path / RELEASE] if (path / RELEASE).is_dir() else []
    return [path_of(path, step) for step in steps_in(path)] + release


def checkpoints_at(path: Path) -> list[Path]:
    """Return [path] if it is a checkpoint, else checkpoints_in. A path of a user means the first.

    For a UserError if there is none: no_checkpoint_at.
    """
    return [path] if (path / MANIFEST).is_file() else checkpoints_in(path)


def newest(path: str | Path) -> Path | None:
    """Return the checkpoint that a path means, without checking it; None if there is none."""
    return next(iter(checkpoints_at(Path(path))), None)


def no_checkpoint_at(path: str | Path) -> str:
    """Return the message that a path means no checkpoint."""
    if os.path.isdir(path):
        return f"{path} is not a checkpoint (iter_NNNNNNN, release), and holds none"
    return f"{path} is not a directory"


def tracked_step(run_dir: str | Path) -> int | None:
    """Return the step in the tracker file; None if the file is missing or does not hold a step."""
    try:
        text = (Path(run_dir) / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() and text.isascii() else None


def commit(written: Path, step: int) -> Path:
    """Rename a written directory to its final name and update the tracker; return its path.

    If killed midway, either the old checkpoint of that step remains, or none of that step and the
    previous one.
    """
    target = path_of(written.parent, step)
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():
        os.rename(target, replaced)
    os.rename(written, target)
    sync(target.parent)
    write_atomically(target.parent / TRACKER, f"{step}\n")
    remove(replaced)
    return target


def prune(run_dir: str | Path, keep: int | None) -> list[str]:
    """Delete the oldest checkpoints beyond `keep`; return log lines about links and failures.

    Call it after the newest checkpoint is written. If a checkpoint is a symbolic link, only the
    link is removed: the user has moved its target elsewhere.
    """
    messages = []
    for step in [] if keep is None else steps_in(run_dir)[keep:]:
        path = path_of(run_dir, step)
        deleting = path.with_name(path.name + ".deleting")
        try:
            link_target = os.readlink(path) if path.is_symlink() else ""
            # renamed first: if killed during deletion, no partial directory has a checkpoint's name
            os.rename(path, deleting)
        except OSError as error:
            messages.append(f"warning: {path} could not be deleted ({error.strerror})")
            continue
        if link_target:
            messages.append(f"{path.name} was a link: it is removed, and {link_target} is kept")
        if failure := remove(deleting):
            messages.append(f"warning: {failure}")
    return messages


def remove(path: Path) -> str:
    """Remove a tree, a file or a link (not its target); return "" or the error message."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # what else can be removed
        return f"{error.filename or path} could not be deleted ({error.strerror})"
    return ""


def remove_leftovers(run_dir: str | Path) -> list[str]:
    """Remove what a killed run left half done; return the names. The caller must own run_dir."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    leftovers = [name for name in names if LEFTOVER.fullmatch(name)]
    for name in leftovers:
        remove(Path(run_dir) / name)
    return leftovers


def write_atomically(path: Path, text: str) -> None:
    """Replace a file durably: a reader sees either the old text or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(directory: Path) -> None:
    """Flush the entries of a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
