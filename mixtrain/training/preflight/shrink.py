"""Shrink the recipe to the parity certificate's sizes, for its layout and one CPU rank. No torch.

Rule: settings that may change a number stay the recipe's: router, dispatcher, sharding, recompute,
layer implementation. Only sizes, precision and what a CPU has no kernels for change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from omegaconf import OmegaConf

from mixtrain.config import layout_sensitive
from mixtrain.config.choices import Accelerator, AttnBackend, Dispatcher, TransformerImpl
from mixtrain.config.compose import CONF
from mixtrain.config.plan import Plan, derive, resolve
from mixtrain.config.planner import make_plan
from mixtrain.config.rules.upstream import triggered_faults
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra
from mixtrain.errors import UserError

# sections taken from conf/shrink/parity.yaml; the layout is not
SIZES = ("model", "data", "trainer", "optimizer")
TOKENS = 8  # per sequence: few expert choices, so that none is near a tie
FEWEST_EXPERTS = 8  # or 2 * topk if that is more

# fmt: off
UNSPLIT = {  # parallel settings, besides the sizes, that split a model
    "virtual_pipeline_model_parallel_size":       None,
    "sequence_parallel":                          False,
    "data_parallel_sharding_strategy":            None,
    "num_layers_in_first_pipeline_stage":         None,
    "num_layers_in_last_pipeline_stage":          None,
    "account_for_embedding_in_pipeline_split":    False,
    "account_for_loss_in_pipeline_split":         False,
    "pipeline_model_parallel_layout":             None,
}
# fmt: on


class ShrunkPlans(NamedTuple):
    layout: Plan  # at the run's layout, on its hardware
    one_rank: Plan  # on one CPU rank


def shrink(plan: Plan) -> ShrunkPlans | str:
    """Return both plans, or the reason why this layout cannot compute what one rank does."""
    config = _small_config(plan)
    if broken := layout_sensitive.exceeded_limits(config):
        return f"{broken[0][0].name}: {broken[0][0].why}"
    if upstream_faults := triggered_faults(derive(resolve(config))):
        return f"megatron-core, {upstream_faults[0].file}: {upstream_faults[0].wrong}"
    try:
        one_rank = _on_one_rank(config, plan.data_parallel_size)
        return ShrunkPlans(make_plan(config), make_plan(one_rank))
    except UserError as error:
        return error.problems[0]


def _small_config(plan: Plan) -> Config:
    config = plan.config
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    small = OmegaConf.to_container(OmegaConf.load(CONF / "shrink" / "parity.yaml"))
    for section in SIZES:
        tree[section] |= {
            key: value for key, value in small[section].items() if key in tree[section]
        }
    # fixed, so that runs with these settings share one cached reference
    tree |= {"name": "preflight", "run_dir": "preflight"}
    trainer = config.trainer
    tree["trainer"] |= {
        "mode": "train",
        "accelerator": trainer.accelerator.name,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "global_batch_size": _sequences(plan),
    }
    tokens = max(TOKENS, 2 * plan.layout.tp * plan.layout.cp)
    tree["data"] |= {"seq_length": tokens, "data_path": None, "tokenizer": None}
    tree["model"] |= _layers_and_experts(config, tree["model"], tokens)
    if (
        config.dispatcher.moe_token_dispatcher_type is Dispatcher.flex
    ):  # its kernels do not take fp32
        tree["dispatcher"]["moe_token_dispatcher_type"] = Dispatcher.alltoall.name
    return from_hydra(OmegaConf.create(tree))


def _sequences(plan: Plan) -> int:
    """Return the fewest sequences of a step: one per rank; VPP needs PP microbatches of each."""
    has_virtual_stages = plan.config.parallel.virtual_pipeline_model_parallel_size
    return plan.layout.dp * (plan.layout.pp if has_virtual_stages else 1)


def _layers_and_experts(config: Config, small: dict, tokens: int) -> dict:
    """Return the fewest layers that the pipeline needs and the fewest experts that EP can split."""
    tp = config.parallel.tensor_model_parallel_size
    ep = config.parallel.expert_model_parallel_size
    fewest = max(FEWEST_EXPERTS, 2 * config.model.moe_router_topk)
    sizes = {
        "num_layers": None,
        "max_position_embeddings": max(tokens, small["max_position_embeddings"]),
        "num_moe_experts": min(config.model.num_moe_experts, -(-fewest // ep) * ep),
    }
    if small["num_query_groups"] % tp:
        sizes |= {"num_query_groups": tp, "num_attention_heads": tp}
    return sizes


def _on_one_rank(config: Config, data_parallel_size: int) -> Config:
    sizes = [
        name for name in vars(config.parallel) if name.endswith(("_parallel_size", "_instances"))
    ]
    parallel = replace(config.parallel, **dict.fromkeys(sizes, 1))
    model = replace(
        config.model,
        num_layers=resolve(config).model.num_layers,
        transformer_impl=TransformerImpl.torch,
        attention_backend=AttnBackend.auto,
    )
    trainer = replace(config.trainer, accelerator=Accelerator.cpu, devices=1, num_nodes=1)
    # as many microbatches as the layout has, each of all its data-parallel ranks
    if layout_sensitive.counts_over_a_step(config):
        trainer = replace(trainer, micro_batch_size=trainer.micro_batch_size * data_parallel_size)
    return replace(config, parallel=replace(parallel, **UNSPLIT), model=model, trainer=trainer)
