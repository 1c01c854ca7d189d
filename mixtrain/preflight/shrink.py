"""The recipe at the sizes of the parity certificate: at its own layout, and on one CPU rank. No torch.

Rule: what may change a number stays the recipe's: router, dispatcher, sharding, recompute, implementation of the
layers. Sizes, precision and what a CPU has no kernels for do not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from omegaconf import OmegaConf

from mixtrain import limits
from mixtrain.compose import CONF
from mixtrain.config import Accelerator, AttnBackend, Config, Dispatcher, ParallelConfig, TransformerImpl
from mixtrain.errors import UserError
from mixtrain.plan import Plan, derive, make_plan, resolve
from mixtrain.rules.upstream import present

SIZES = ("model", "data", "trainer", "optimizer")  # of conf/shrink/parity.yaml; its layout is the certificate's own
TOKENS = 8  # of a sequence: few choices of experts, so that none is near a tie
LEAST = 8  # experts, or twice as many as a token goes to


class Shrunk(NamedTuple):
    here: Plan  # at the run's layout, on its hardware
    one: Plan  # one CPU rank


def shrunk(plan: Plan) -> Shrunk | str:
    """Both plans, or the reason why this layout must compute something else than one rank."""
    config = _sizes(plan.config)
    if beyond := limits.broken(config, plan.data_parallel_size):
        return f"{beyond[0][0].name}: {beyond[0][0].why}"
    if met := present(derive(resolve(config))):
        return f"megatron-core, {met[0].file}: {met[0].wrong}"
    try:
        return Shrunk(make_plan(config), make_plan(_on_one_rank(config)))
    except UserError as error:
        return error.problems[0]


def _sizes(config: Config) -> Config:
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    small = OmegaConf.to_container(OmegaConf.load(CONF / "shrink" / "parity.yaml"))
    tree |= {"name": "preflight", "run_dir": "preflight"}  # the same result for every run of these switches
    kept = config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes
    for section in SIZES:
        tree[section] |= {key: value for key, value in small.get(section, {}).items() if key in tree[section]}
    parallel, model, data, trainer = config.parallel, tree["model"], tree["data"], tree["trainer"]
    trainer |= {"accelerator": kept[0].name, "devices": kept[1], "num_nodes": kept[2], "mode": "train"}
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    tokens = max(TOKENS, 2 * tp * cp)
    data |= {"seq_length": tokens, "data_path": None, "tokenizer": None}
    model |= {"num_layers": None, "max_position_embeddings": max(tokens, model["max_position_embeddings"])}
    if model["num_query_groups"] % tp:
        model |= {"num_query_groups": tp, "num_attention_heads": tp}
    ep = parallel.expert_model_parallel_size
    fewest = max(LEAST, 2 * model["moe_router_topk"])
    model["num_moe_experts"] = min(config.model.num_moe_experts, -(-fewest // ep) * ep)
    copies = kept[1] * kept[2] // (tp * cp * pp)
    trainer["global_batch_size"] = copies * (pp if parallel.virtual_pipeline_model_parallel_size else 1)
    if tree["dispatcher"]["moe_token_dispatcher_type"] == Dispatcher.flex.name:  # its kernels take no fp32
        tree["dispatcher"]["moe_token_dispatcher_type"] = Dispatcher.alltoall.name
    return Config.from_hydra(OmegaConf.create(tree))


def _on_one_rank(config: Config) -> Config:
    parallel = replace(
        config.parallel,
        **dict.fromkeys([name for name in vars(config.parallel) if name.endswith(("_parallel_size", "_instances"))], 1),
    )
    parallel = replace(parallel, virtual_pipeline_model_parallel_size=None, sequence_parallel=False, **_NO_STAGES)
    layers = resolve(config).model.num_layers
    model = replace(
        config.model,
        num_layers=layers,
        transformer_impl=TransformerImpl.torch,
        attention_backend=AttnBackend.auto,
    )
    trainer = replace(config.trainer, accelerator=Accelerator.cpu, devices=1, num_nodes=1)
    return replace(config, parallel=parallel, model=model, trainer=trainer)


_NO_STAGES = {
    "data_parallel_sharding_strategy": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
}
assert set(_NO_STAGES) <= set(ParallelConfig.__dataclass_fields__)
