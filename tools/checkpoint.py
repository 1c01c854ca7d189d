"""List, verify and inspect checkpoints.

    python tools/checkpoint.py list runs/laptop
        step, layout, size and state (valid, or what is wrong) of every checkpoint
    python tools/checkpoint.py verify runs/laptop
        hash every file of all checkpoints, or of one (runs/laptop/iter_0000100)
    python tools/checkpoint.py inspect runs/laptop/iter_0000100 [--match TEXT]
        tensors, shapes and dtypes of one checkpoint, or of the newest in a run directory

`list` and `inspect` check the sizes of files with tensors and hash the others; `list --full` hashes
all. Exit codes: 0, 1 a checkpoint is damaged, 2 there is no checkpoint.
"""

import argparse
import os
import re
import sys
from pathlib import Path

# works in a checkout without installation
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
    parser.add_argument("--full", action="store_true", help="list: hash all files")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="inspect: only keys that contain TEXT"
    )
    options = parser.parse_args(arguments)
    try:
        paths = checkpoints(Path(options.path))
        if options.verb == "inspect":
            return inspect(paths[0], options.match)
        return list_all(paths, options.full) if options.verb == "list" else verify(paths)
    except UserError as error:
        print_problems(error.problems)
        return REFUSED


def checkpoints(path: Path) -> list[Path]:
    """Return `path` if it is a checkpoint, else the checkpoints in it, newest first."""
    name = path.resolve().name
    if re.fullmatch(rf"(iter_\d{{7,}}|{directory.RELEASE})(\.saving)?", name) and path.is_dir():
        return [path]
    paths = directory.checkpoints_in(path)
    if not paths:
        raise UserError(
            f"{path} is neither a checkpoint nor a directory of some (iter_NNNNNNN, release)"
        )
    return paths


def list_all(paths: list[Path], full: bool) -> int:
    """Print a line for each checkpoint."""
    table = Table(box=None, pad_edge=False, header_style="")
    columns = {"step": "right", "layout": "left", "size": "right", "state": "left"}
    for name, justify in columns.items():
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
    """Return the layout that wrote a checkpoint, for example `EP 4 on 4 ranks`."""
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
    """Hash every file; print a line for each checkpoint."""
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
    """Print dtype, shape and key of the tensors of a checkpoint, and their total size."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # takes seconds

    from mixtrain.checkpoint import safe

    total = count = 0
    for key, tensor in sorted(safe.read_metadata(path).state_dict_metadata.items()):
        if not isinstance(tensor, TensorStorageMetadata) or match not in key:
            continue
        dtype = tensor.properties.dtype
        total += tensor.size.numel() * dtype.itemsize
        count += 1
        shape = f"[{', '.join(map(str, tensor.size))}]"
        print(f"{str(dtype).removeprefix('torch.'):<8} {shape:<20} {key}")
    print(f"{count} tensors, {total / 2**20:,.1f} MiB, in {path}")
    # Megatron-LM's checkpoints have no manifest
    has_manifest = os.path.lexists(path / integrity.MANIFEST)
    wrong = integrity.problem(path, full=False) if has_manifest else ""
    if wrong:
        print(wrong)
    return FAULT if wrong else FINISHED


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
