"""Read the files of a Hugging Face model and check them before any tensor is read.

Rule: only config.json and safetensors files are read. No code from the directory runs: a pickle is
refused by its name.
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
from mixtrain.interop.convert import unsupported_models
from mixtrain.system import untrusted_json
from mixtrain.system.links import file_in
from mixtrain.system.mmap_tensor import map_tensor
from mixtrain.system.untrusted_json import LARGE, Count, InvalidJson, Name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# safetensors' names of the dtypes that weights may have
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_CONFIG = 1 << 20  # bytes: run_state.json of the checkpoint keeps a part of it
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
SHOWN = 5  # problems of a kind


class SafetensorsIndex(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[Name, Name]  # tensor -> file


class SafetensorsEntry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: Name
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements start..stop of the flattened tensor, mapped from the file."""
        offset = self.offset + start * self.dtype.itemsize
        return map_tensor(self.path, offset, (stop - start,), self.dtype)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json. UserError if there is none, or the model is of an unsupported kind."""
    unsupported_models.refuse(directory)
    return untrusted_json.read(
        directory / CONFIG, most=MAX_CONFIG, missing="a Hugging Face model has one"
    )


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of the whole model. UserError naming the file that is wrong."""
    weight_map = _read_weight_map(directory)
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not file_in(directory, name)]:
        lines = [f"{directory / name} is missing, and {INDEX} names it" for name in missing[:SHOWN]]
        if len(missing) > SHOWN:
            lines.append(f"... and {len(missing) - SHOWN} more files")
        raise UserError(*lines)
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        tensors |= _read_file(directory / name, expected)
    return tensors


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Return tensor -> file, from the index or from the only file."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    unsupported_models.refuse(directory)
    index = directory / INDEX
    single = file_in(directory, SINGLE)
    if single and index.is_file():
        raise UserError(
            f"{directory} has both {SINGLE} and {INDEX}: which is the model? remove the other"
        )
    if not index.is_file():
        name = SINGLE if single else _only_file(directory)
        return dict.fromkeys(_read_header(directory / name), name)
    weight_map = untrusted_json.read(index, SafetensorsIndex, most=LARGE)["weight_map"]
    for file in sorted(set(weight_map.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise UserError(f"{index} leads out of its directory, to {file}")
        if not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file}, which is not a safetensors file")
    return weight_map


def _only_file(directory: Path) -> str:
    """Return the only safetensors file. UserError if there are none or several."""
    paths = sorted(directory.iterdir())
    files = [path.name for path in paths if path.suffix == ".safetensors"]
    if not files:
        if pickles := [path for path in paths if path.suffix in PICKLE_SUFFIXES]:
            raise UserError(
                f"{pickles[0]} is a pickle, which could run any code: give safetensors files"
            )
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}")
    if len(files) > 1 or SHARD.search(files[0]):
        raise UserError(
            f"{directory} has {files[0]}{_and_more(files)}, but no {INDEX}, which lists the tensors"
            " of each file"
        )
    if file_in(directory, files[0]) is None:
        raise UserError(f"{directory / files[0]} is missing")
    return files[0]


def _read_file(path: Path, expected: set[str]) -> dict[str, StoredTensor]:
    """Return the tensors of a file. UserError if they are not the ones that the index lists."""
    tensors = _read_header(path)
    if missing := sorted(expected - set(tensors)):
        raise UserError(f"{path} lacks {missing[0]}, which {INDEX} lists{_and_more(missing)}")
    if unlisted := sorted(set(tensors) - expected):
        raise UserError(
            f"{path} has {unlisted[0]}, which {INDEX} does not list{_and_more(unlisted)}"
        )
    return tensors


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of one file."""
    try:
        # the library checks the header, the sizes, and that there is no overlap and no gap
        with safe_open(path, "pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = untrusted_json.parse(file.read(length))
        entries.pop("__metadata__", None)
        if problem := untrusted_json.problem(entries, dict[Name, SafetensorsEntry]):
            raise InvalidJson(problem)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    dtypes = {name: entry["dtype"] for name, entry in entries.items()}
    if quantised := unsupported_models.quantised_tensor(dtypes):
        raise UserError(f"{path}: {quantised}")
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise UserError(f"{path}: {name} is {dtype}; weights are {', '.join(DTYPES)}")
    data_start = 8 + length
    return {
        name: StoredTensor(
            path,
            data_start + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for name, entry in entries.items()
    }
