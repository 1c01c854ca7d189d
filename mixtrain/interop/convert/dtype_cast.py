"""Cast weights to another dtype; refuse NaN, infinity and overflow by the tensor's name."""

from __future__ import annotations

import math
import sys

import torch

from mixtrain.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --dtype
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHOWN = 5  # tensors


class DtypeCast:
    """Cast tensors to `dtype`.

    With `allow_nonfinite`, NaN and infinity are kept and `nonfinite` collects the tensors' names.
    """

    def __init__(self, dtype: torch.dtype, allow_nonfinite: bool = False):
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        self.nonfinite: set[str] = set()

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a part of the tensor `name` in the dtype; no copy if it has the dtype already.

        UserError if it has NaN or infinity, or a number too large for the dtype.
        """
        cast = tensor if tensor.dtype is self.dtype else tensor.to(self.dtype)
        if not _all_finite(cast):
            self._check(name, tensor, cast)
        return cast

    def _check(self, name: str, tensor: torch.Tensor, cast: torch.Tensor) -> None:
        finite = tensor.isfinite()
        if not finite.all():
            if not self.allow_nonfinite:
                what = "NaN" if tensor.isnan().any() else "an infinite number"
                raise UserError(
                    f"{name} has {what} in it: a damaged or diverged model? --allow-nonfinite"
                    " converts it"
                )
            self.nonfinite.add(name)
        if not cast[finite].isfinite().all():
            largest = tensor[finite].abs().max().item()
            limit = torch.finfo(self.dtype).max
            dtype = NAMES[self.dtype]
            wider = " or ".join(name for name in DTYPES if name not in ("fp16", dtype))
            raise UserError(f"{name} has {largest:g}, and {dtype} ends at {limit:g}: use {wider}")


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity; aminmax takes a tenth of the time of isfinite."""
    # NaN in the tensor makes both NaN
    return not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax())


def warn_nonfinite(names: set[str]) -> None:
    """Print a warning that lists converted tensors with NaN or infinite numbers."""
    if names:
        more = f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else ""
        print(
            f"warning: NaN or infinite numbers are in {', '.join(sorted(names)[:SHOWN])}{more}",
            file=sys.stderr,
        )
