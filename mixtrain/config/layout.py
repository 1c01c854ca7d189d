"""The parallel sizes of a run by their short names. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from mixtrain.config.schema import Config

AXES = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; 1: not split. DP and EDP follow from the ranks and the other sizes."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1  # of the dense parameters, without context parallel ranks
    edp: int = 1  # of the experts

    @classmethod
    def on(cls, ranks: int, **sizes: Any) -> Self:
        """Return the layout of `sizes` on `ranks` ranks; round DP and EDP down, to at least 1."""
        layout = cls(**sizes)
        dp = max(1, ranks // layout.dense_grid)
        return cls(**sizes, dp=dp, edp=max(1, ranks // layout.expert_grid))

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the layout of a Config; trainer.devices = null counts as 1."""
        parallel = config.parallel
        return cls.on(
            (config.trainer.devices or 1) * config.trainer.num_nodes,
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            vpp=parallel.virtual_pipeline_model_parallel_size or 1,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_parallel_size,
        )

    @property
    def dense_grid(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def expert_grid(self) -> int:
        return self.etp * self.ep * self.pp

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes by the names of their axes, without EDP."""
        return {axis.upper(): getattr(self, axis) for axis in AXES}

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the names of the axes that are split, e.g. ("TP", "EP")."""
        return tuple(name for name, size in self.sizes.items() if size > 1)

    def __str__(self) -> str:
        """Return the sizes of the axes that are split, e.g. TP2xPP4xEP4."""
        split = [f"{name}{size}" for name, size in self.sizes.items() if size > 1]
        return "x".join(split) or "one rank"
