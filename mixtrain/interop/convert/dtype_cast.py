"""Weights from one dtype to another, where that loses no more than digits; what is no number is refused by name."""

from __future__ import annotations

import math
import sys

import torch

from mixtrain.errors import UserError

# --dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHOWN = 5  # tensors


class Casting:
    """To `dtype`. With `allow_nonfinite` NaN and infinite numbers are kept, and `nonfinite` has the tensors' names."""

    def __init__(self, dtype: torch.dtype, allow_nonfinite: bool = False):
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        self.nonfinite: set[str] = set()

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A part of the tensor `name` in the dtype: itself, if it is.

        UserError if there is NaN or infinity in it, or a number that is too large for the dtype.
        """
        found = tensor if tensor.dtype is self.dtype else tensor.to(self.dtype)
        if not _finite(found):
            self._judge(name, tensor, found)
        return found

    def _judge(self, name: str, tensor: torch.Tensor, found: torch.Tensor) -> None:
        before = tensor.isfinite()
        if not before.all():
            if not self.allow_nonfinite:
                what = "NaN" if tensor.isnan().any() else "an infinite number"
                raise UserError(
                    f"{name} has {what} in it: a damaged or diverged model? --allow-nonfinite"
                    " converts it"
                )
            self.nonfinite.add(name)
        if not found[before].isfinite().all():
            largest = tensor[before].abs().max().item()
            most = torch.finfo(self.dtype).max
            others = " or ".join(
                other for other in DTYPES if other not in ("fp16", NAMES[self.dtype])
            )
            raise UserError(
                f"{name} has {largest:g}, and {NAMES[self.dtype]} ends at {most:g}: use {others}"
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all are numbers. The least and the largest are NaN where any is: a tenth of the time of isfinite()."""
    return not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax())


def warn(names: set[str]) -> None:
    """Say which tensors have been converted although they hold what is no number."""
    if names:
        more = f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else ""
        print(
            f"warning: NaN or infinite numbers are in {', '.join(sorted(names)[:SHOWN])}{more}",
            file=sys.stderr,
        )
