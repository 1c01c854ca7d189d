"""Where checkpoints lie: Megatron-LM's names, what is there, and every change of it as one atomic step. No torch.

Rule: a directory named iter_NNNNNNN is whole from the moment it has that name. While it is written, replaced or deleted
it has another, which no reader looks at and the next run removes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mixtrain.checkpoint.integrity import MANIFEST

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # weights of no training run: Megatron-LM's name for what a converter writes
# bytes that the small files of a checkpoint and the headers of the large ones may take
MARGIN = 1 << 20
LEFTOVER = re.compile(r"iter_\d{7,}\.(saving|replaced|deleting)")


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / f"iter_{step:07d}"


def saving(directory: Path) -> Path:
    """The name of a checkpoint while it is written."""
    return directory.with_name(directory.name + ".saving")


def steps_in(run_dir: str | Path) -> list[int]:
    """The steps whose checkpoints lie in run_dir, newest first. Whether they are valid is not asked."""
    names = os.listdir(run_dir) if os.path.isdir(run_dir) else []
    found = [re.fullmatch(r"iter_(\d{7,})", name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest(given: str | Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest in a run directory, or a converter's; None if none."""
    given = Path(given)
    if (given / MANIFEST).is_file():
        return given
    if steps := steps_in(given):
        return path_of(given, steps[0])
    return given / RELEASE if (given / RELEASE).is_dir() else None


def tracked(run_dir: str | Path) -> int | None:
    """The step that the tracker names; None if there is no tracker, or garbage in it."""
    try:
        text = (Path(run_dir) / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() and text.isascii() else None


def commit(written: Path, step: int) -> Path:
    """Give what has been written its name and point the tracker at it; its path.

    Killed in between, there is either the old checkpoint of that step, or none of it and the one
    before.
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
    """Delete the oldest checkpoints but for `keep`; what there is to say of it, a line each.

    To be called when the newest has just been written. Of a checkpoint that is a link the link
    goes, and what it leads to is left: somebody has put it elsewhere.
    """
    said = []
    for step in [] if keep is None else steps_in(run_dir)[keep:]:
        path = path_of(run_dir, step)
        going = path.with_name(path.name + ".deleting")
        try:
            led = os.readlink(path) if path.is_symlink() else ""
            os.rename(path, going)  # killed while it deletes, no half of it has a checkpoint's name
        except OSError as error:
            said.append(f"warning: {path} could not be deleted ({error.strerror})")
            continue
        said += (
            [f"{path.name} was a link: it is removed, and {led} is left as it is"] if led else []
        )
        said += [f"warning: {left}"] if (left := remove(going)) else []
    return said


def remove(path: Path) -> str:
    """Remove a directory with all that is in it, a file, or a link but not what it leads to; "", or what was left."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # the rest of it
        return f"{error.filename or path} could not be deleted ({error.strerror})"
    return ""


def remove_leftovers(run_dir: str | Path) -> list[str]:
    """Remove what a killed run has left half done; its names. Only for who holds the run directory."""
    names = (
        [name for name in os.listdir(run_dir) if LEFTOVER.fullmatch(name)]
        if os.path.isdir(run_dir)
        else []
    )
    for name in names:
        remove(Path(run_dir) / name)
    return names


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole, and see it on the disk: a reader finds the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(directory: Path) -> None:
    """See the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
