"""Lists the parallel layouts that the rules allow, up to LAPTOP_RANKS ranks. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mixtrain.config.choices import Dispatcher
from mixtrain.config.laptop_layout import LAPTOP_RANKS
from mixtrain.config.layout import Layout
from mixtrain.config.plan import Plan
from mixtrain.config.planner import make_plan
from mixtrain.config.schema import Config
from mixtrain.errors import UserError

SIZES = [2**power for power in range(LAPTOP_RANKS.bit_length())]  # 1, 2, 4, 8


@dataclass(frozen=True)
class ParityLayout(Layout):
    """A layout with the two settings of its communication that are compared, too."""

    instances: int = 1  # of the distributed optimizer; 2: hybrid shard
    dispatcher: Dispatcher = Dispatcher.alltoall

    @property
    def ranks(self) -> int:
        return self.dense_grid * self.dp

    @property
    def axes(self) -> tuple[str, ...]:
        return super().axes + ("hybrid shard",) * (self.instances > 1)

    def __str__(self) -> str:
        shard = f"xhybrid shard {self.instances}" * (self.instances > 1)
        return f"{super().__str__()}{shard}, {self.dispatcher.name}"

    def applied_to(self, config: Config) -> Config:
        """Return the configuration at this layout."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            context_parallel_size=self.cp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=self.tp > 1,
            num_distributed_optimizer_instances=self.instances,
        )
        dispatcher = replace(config.dispatcher, moe_token_dispatcher_type=self.dispatcher)
        trainer = replace(config.trainer, devices=self.ranks, num_nodes=1)
        return replace(config, parallel=parallel, dispatcher=dispatcher, trainer=trainer)


def all_layouts() -> Iterator[ParityLayout]:
    """Yield every combination of sizes that fits its ranks, for any model; fewest ranks first."""
    for ranks in SIZES:
        sizes = [size for size in SIZES if size <= ranks]
        for tp, cp, pp, ep, etp in product(sizes, repeat=5):
            if tp * cp * pp > ranks or ep * etp * pp > ranks:
                continue
            expert_copies = ranks // (ep * etp * pp)
            for vpp, instances, dispatcher in product(
                (1, 2) if pp > 1 else (1,),
                (1, 2) if expert_copies > 1 else (1,),
                (Dispatcher.alltoall, Dispatcher.allgather),
            ):
                split = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
                yield ParityLayout.on(ranks, **split, instances=instances, dispatcher=dispatcher)


def legal_plan(config: Config) -> Plan | None:
    """Return the plan of a configuration; None if the rules refuse it."""
    try:
        return make_plan(config)
    except UserError:
        return None
