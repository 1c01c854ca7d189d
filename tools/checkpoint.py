"""Look at checkpoints: what there is, whether it is whole, what is in it.

    python tools/checkpoint.py list runs/laptop                  every one: step, layout, size,
      valid or why not
    python tools/checkpoint.py verify runs/laptop                hash every file of all, or of one
      iter_NNNNNNN
    python tools/checkpoint.py inspect runs/laptop/iter_0000100  its tensors, shapes and dtypes
      (--match TEXT)

`list` and `inspect` compare the sizes of the files that hold tensors and hash the others; `list
--full` hashes all. Exit codes: 0, 1 something is damaged, 2 there is nothing to look at.
"""

import argparse
import os
import re
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402

from mixtrain.checkpoint import directory, integrity, state  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, REFUSED, UserError, print_problems  # noqa: E402
from mixtrain.system.closed_pipe import run_main  # noqa: E402
from mixtrain.system.console import Console  # noqa: E402

LETTERS = {
    "tensor": "TP",
    "pipeline": "PP",
    "context": "CP",
    "expert": "EP",
    "expert_tensor": "ETP",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["list", "verify", "inspect"])
    parser.add_argument("path", help="a run directory, or one checkpoint in it")
    parser.add_argument("--full", action="store_true", help="list: hash the files, too")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="inspect: only keys with TEXT in them"
    )
    given = parser.parse_args(arguments)
    try:
        paths = checkpoints(Path(given.path))
        if given.verb == "inspect":
            return inspect(paths[0], given.match)
        return list_all(paths, given.full) if given.verb == "list" else verify(paths)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means, newest first."""
    if (
        re.fullmatch(rf"(iter_\d{{7,}}|{directory.RELEASE})(\.saving)?", path.resolve().name)
        and path.is_dir()
    ):
        return [path]
    found = [directory.path_of(path, step) for step in directory.steps_in(path)]
    if (path / directory.RELEASE).is_dir():
        found.append(path / directory.RELEASE)
    if not found:
        raise UserError(
            f"{path} is no checkpoint and no directory that holds one (iter_NNNNNNN, release)"
        )
    return found


def list_all(paths: list[Path], full: bool) -> int:
    """A line for each checkpoint."""
    table = Table(box=None, pad_edge=False, header_style="")
    for name, justify in (
        ("step", "right"),
        ("layout", "left"),
        ("size", "right"),
        ("state", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")
    damaged = False
    for path in paths:
        wrong = integrity.problem(path, full)
        damaged |= bool(wrong)
        size = sum(entry.stat().st_size for entry in path.iterdir())
        name = path.name.removeprefix("iter_").lstrip("0") or "0"
        table.add_row(name, layout_of(path), f"{size / 2**20:,.1f} MiB", wrong or "valid")
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
    return FAULT if damaged else FINISHED


def layout_of(path: Path) -> str:
    """The layout that wrote a checkpoint, as in `EP 4 on 4 ranks`."""
    try:
        layout = state.read(path).layout
    except ValueError:
        return "?"
    if not layout:
        return "weights alone"
    sizes = [
        f"{letters} {layout.get(name, 1)}"
        for name, letters in LETTERS.items()
        if layout.get(name, 1) > 1
    ]
    ranks = layout.get("world_size", 1)
    return f"{' x '.join(sizes) or 'DP'} on {ranks} rank{'s' * (ranks > 1)}"


def verify(paths: list[Path]) -> int:
    """Hash every file; a line for each checkpoint."""
    damaged = False
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    for path in paths:
        with Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as progress:
            total = sum(entry.stat().st_size for entry in path.iterdir())
            task = progress.add_task(path.name, total=total)
            wrong = integrity.problem(
                path, full=True, heartbeat=lambda p=progress, t=task: p.advance(t, integrity.BLOCK)
            )
        damaged |= bool(wrong)
        print(f"{path}: {wrong or 'valid'}")
    return FAULT if damaged else FINISHED


def inspect(path: Path, match: str) -> int:
    """The tensors of a checkpoint: key, shape, dtype; and how many bytes they are."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # takes seconds

    from mixtrain.checkpoint import safe

    total = count = 0
    for key, kind in sorted(safe.read_metadata(path).state_dict_metadata.items()):
        if not isinstance(kind, TensorStorageMetadata) or match not in key:
            continue
        dtype = kind.properties.dtype
        total = total + kind.size.numel() * dtype.itemsize
        count = count + 1
        shape = f"[{', '.join(map(str, kind.size))}]"
        print(f"{str(dtype).removeprefix('torch.'):<8} {shape:<20} {key}")
    print(f"{count} tensors, {total / 2**20:,.1f} MiB, in {path}")
    # Megatron-LM's
    wrong = (
        integrity.problem(path, full=False) if os.path.lexists(path / integrity.MANIFEST) else ""
    )
    if wrong:
        print(wrong)
    return FAULT if wrong else FINISHED


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
