"""The recipe at the sizes of the parity certificate: at its own layout, and on one CPU rank. No torch.

Rule: what may change a number stays the recipe's: router, dispatcher, sharding, recompute, implementation of the
layers. Sizes, precision and what a CPU has no kernels for do not.
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
from mixtrain.errors import UserError

# of conf/shrink/parity.yaml; its layout is the certificate's own
SIZES = ("model", "data", "trainer", "optimizer")
TOKENS = 8  # of a sequence: few choices of experts, so that none is near a tie
LEAST = 8  # experts, or twice as many as a token goes to


# fmt: off
WHOLE = {  # what else splits a model
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


class Shrunk(NamedTuple):
    here: Plan  # at the run's layout, on its hardware
    one: Plan  # one CPU rank


def shrunk(plan: Plan) -> Shrunk | str:
    """Both plans, or the reason why this layout must compute something else than one rank."""
    config = _sizes(plan)
    if beyond := layout_sensitive.exceeded_limits(config, plan.data_parallel_size):
        return f"{beyond[0][0].name}: {beyond[0][0].why}"
    if met := triggered_faults(derive(resolve(config))):
        return f"megatron-core, {met[0].file}: {met[0].wrong}"
    try:
        return Shrunk(make_plan(config), make_plan(_on_one_rank(config, plan.data_parallel_size)))
    except UserError as error:
        return error.problems[0]


def _sizes(plan: Plan) -> Config:
    config = plan.config
    tree = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    small = OmegaConf.to_container(OmegaConf.load(CONF / "shrink" / "parity.yaml"))
    for section in SIZES:
        tree[section] |= {
            key: value for key, value in small[section].items() if key in tree[section]
        }
    # the same result for every run of these switches
    tree |= {"name": "preflight", "run_dir": "preflight"}
    trainer = config.trainer
    tree["trainer"] |= {
        "mode": "train",
        "accelerator": trainer.accelerator.name,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "global_batch_size": _sequences(plan),
    }
    tokens = max(
        TOKENS,
        2 * config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size,
    )
    tree["data"] |= {"seq_length": tokens, "data_path": None, "tokenizer": None}
    tree["model"] |= _layers_and_experts(config, tree["model"], tokens)
    if config.dispatcher.moe_token_dispatcher_type is Dispatcher.flex:  # its kernels take no fp32
        tree["dispatcher"]["moe_token_dispatcher_type"] = Dispatcher.alltoall.name
    return Config.from_hydra(OmegaConf.create(tree))


def _sequences(plan: Plan) -> int:
    """The fewest of a step: one a rank, and for virtual stages as many microbatches as stages."""
    parallel = plan.config.parallel
    stages = (
        parallel.pipeline_model_parallel_size
        if parallel.virtual_pipeline_model_parallel_size
        else 1
    )
    return plan.data_parallel_size * stages


def _layers_and_experts(config: Config, small: dict, tokens: int) -> dict:
    """As few layers as the pipeline needs, as few experts as the layout lets be split."""
    tp = config.parallel.tensor_model_parallel_size
    ep = config.parallel.expert_model_parallel_size
    fewest = max(LEAST, 2 * config.model.moe_router_topk)
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
    if layout_sensitive.counts_over_a_step(config):  # as many microbatches, each that of all ranks
        trainer = replace(trainer, micro_batch_size=trainer.micro_batch_size * data_parallel_size)
    return replace(config, parallel=replace(parallel, **WHOLE), model=model, trainer=trainer)
