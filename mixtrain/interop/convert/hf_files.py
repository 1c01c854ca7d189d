"""A directory with a model of Hugging Face: what is in its files, all of it checked before a tensor is looked at.

Rule: config.json and safetensors alone are read. Nothing there is ever run: a pickle is refused by its name.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from mixtrain.errors import UserError
from mixtrain.interop.convert import strangers
from mixtrain.system import untrusted_json
from mixtrain.system.links import file_in
from mixtrain.system.mmap_tensor import map_tensor
from mixtrain.system.untrusted_json import LARGE, Count, InvalidJson, Name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# safetensors' names of what weights are kept in
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_CONFIG = 1 << 20  # bytes: what of it is kept must fit into the checkpoint's run_state.json
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
SHOWN = 5  # problems of a kind


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[Name, Name]  # tensor -> file


class Entry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: Name
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, start: int, stop: int) -> torch.Tensor:
        """The elements start..stop of the flat tensor: a window on the file."""
        return map_tensor(
            self.path, self.offset + start * self.dtype.itemsize, (stop - start,), self.dtype
        )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. UserError if there is none, or the directory is of another kind than a model of Hugging Face."""
    strangers.refuse(directory)
    return untrusted_json.read(
        directory / CONFIG, most=MOST_CONFIG, missing="a Hugging Face model has one"
    )


def read_tensors(directory: Path) -> dict[str, Stored]:
    """Name -> where it lies, of every tensor of the model. UserError naming the file that is wrong."""
    weight_map = _weight_map(directory)
    if missing := [
        name for name in sorted(set(weight_map.values())) if not file_in(directory, name)
    ]:
        said = [f"{directory / name} is missing, and {INDEX} names it" for name in missing[:SHOWN]]
        raise UserError(
            *said, *([f"... and {len(missing) - SHOWN} more files"] if len(missing) > SHOWN else [])
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        found |= _file(
            directory / name, {tensor for tensor, file in weight_map.items() if file == name}
        )
    return found


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> file, from the index, or as the only file has them."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory")
    strangers.refuse(directory)
    index = directory / INDEX
    whole = file_in(directory, SINGLE)
    if whole and index.is_file():
        raise UserError(
            f"{directory} has both {SINGLE} and {INDEX}: which is the model? take one away"
        )
    if not index.is_file():
        name = SINGLE if whole else _only_file(directory)
        return dict.fromkeys(_header(directory / name), name)
    weight_map = untrusted_json.read(index, Index, most=LARGE)["weight_map"]
    for file in sorted(set(weight_map.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise UserError(f"{index} leads out of its directory, to {file}")
        if not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file}, which is not a safetensors file")
    return weight_map


def _only_file(directory: Path) -> str:
    """The one safetensors file of a directory that has no file of the usual names. UserError if there is not one."""
    found = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors")
    if not found:
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{directory / pickles[0]} is a pickle, which could run anything: give safetensors"
                " files"
            )
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}")
    if len(found) > 1 or SHARD.search(found[0]):
        raise UserError(
            f"{directory} has {found[0]}{_more(found)}, but no {INDEX}, which says what is in each"
            " file"
        )
    if file_in(directory, found[0]) is None:
        raise UserError(f"{directory / found[0]} is missing")
    return found[0]


def _file(path: Path, expected: set[str]) -> dict[str, Stored]:
    """The tensors of a file, which must be those that the index says."""
    header = _header(path)
    if missing := sorted(expected - set(header)):
        raise UserError(f"{path} has no {missing[0]}, where {INDEX} has it" + _more(missing))
    if spare := sorted(set(header) - expected):
        raise UserError(f"{path} has {spare[0]}, which {INDEX} does not name" + _more(spare))
    return header


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _header(path: Path) -> dict[str, Stored]:
    """Name -> where it lies, of the tensors of one file."""
    try:
        # the library's own checks: the header, the sizes, no overlap and no gap
        with safe_open(path, "pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = untrusted_json.parse(file.read(length))
        entries.pop("__metadata__", None)
        if wrong := untrusted_json.problem(entries, dict[Name, Entry]):
            raise InvalidJson(wrong)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    if quantised := strangers.quantised({name: entry["dtype"] for name, entry in entries.items()}):
        raise UserError(f"{path}: {quantised}")
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; weights are {', '.join(DTYPES)}")
    return {
        name: Stored(
            path,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for name, entry in entries.items()
    }
