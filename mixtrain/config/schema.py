"""The names, types and single-field rules of every key a user can set. No torch, no values.

Rule: a key is named here once, with its type and unit; its value stands in conf/ or recipes/ and
nowhere else. Names of model, parallel, router, dispatcher and optimizer keys are Megatron-Core's
own fields; the trainer's are NeMo/Lightning's. A Config is never written to after `from_hydra`
returned it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mixtrain import characters
from mixtrain.config.choices import (
    Accelerator,
    AttnBackend,
    BadStep,
    Balancing,
    DataKind,
    DecayStyle,
    Dispatcher,
    DropPolicy,
    FlexBackend,
    Fp8Recipe,
    Granularity,
    LauncherType,
    Mode,
    OptimizerName,
    Precision,
    Preflight,
    QkLayernormOver,
    RecomputeMethod,
    Resume,
    RouterDtype,
    ScoreFunction,
    Sharding,
    TransformerImpl,
    Verify,
    WsdDecayStyle,
)
from mixtrain.errors import UserError

# mappings whose keys are others': Megatron-Core's, Slurm's
FREE = ("model.extra", "launcher.sbatch_args")
SBATCH = "launcher.sbatch_args"
WEIGHED = "data.data_path"  # a list of texts that has numbers in it


def at_least(minimum: float) -> Any:
    """A required field whose value may not be below `minimum` (null passes where the type allows it)."""
    return field(default=MISSING, metadata={"minimum": minimum})


def above(bound: float) -> Any:
    return field(default=MISSING, metadata={"above": bound})


def within(minimum: float, below: float) -> Any:
    """From `minimum`, and below `below`."""
    return field(default=MISSING, metadata={"minimum": minimum, "below": below})


@dataclass
class ModelConfig:
    num_layers: int | None = at_least(1)  # null: as few as the pipeline needs (see plan.resolve)
    hidden_size: int = at_least(1)
    # a dense layer's; Mixtral has none, Megatron-Core asks for it all the same
    ffn_hidden_size: int = at_least(1)
    num_attention_heads: int = at_least(1)
    num_query_groups: int = at_least(1)
    kv_channels: int = at_least(1)  # the size of one head
    num_moe_experts: int = at_least(1)
    moe_router_topk: int = at_least(1)
    moe_ffn_hidden_size: int = at_least(1)
    moe_shared_expert_intermediate_size: int | None = at_least(1)
    vocab_size: int = at_least(1)
    max_position_embeddings: int = at_least(1)
    rotary_base: int = at_least(1)
    layernorm_epsilon: float = above(0)
    init_method_std: float = at_least(0)
    untie_embeddings_and_output_weights: bool = MISSING
    qk_layernorm: bool = MISSING
    # of qk_layernorm: each head's values, or a token's whole query (or key) projection
    qk_layernorm_over: QkLayernormOver = MISSING
    add_qkv_bias: bool = MISSING
    moe_shared_expert_gate: bool = MISSING  # a sigmoid weighs the shared expert for each token
    transformer_impl: TransformerImpl = MISSING
    # auto: PyTorch's or Transformer Engine's own choice; fused: cuDNN
    attention_backend: AttnBackend = MISSING
    moe_grouped_gemm: bool = MISSING
    hf_model: str | None = MISSING  # the Hugging Face model whose facts these are
    extra: dict[str, Any] = field(default_factory=dict)  # any other field of TransformerConfig


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = at_least(1)
    pipeline_model_parallel_size: int = at_least(1)
    virtual_pipeline_model_parallel_size: int | None = at_least(2)  # model chunks a pipeline stage
    context_parallel_size: int = at_least(1)
    expert_model_parallel_size: int = at_least(1)
    expert_tensor_parallel_size: int = at_least(1)
    sequence_parallel: bool = MISSING
    num_distributed_optimizer_instances: int = at_least(1)
    # Megatron-FSDP; null: its own data parallelism
    data_parallel_sharding_strategy: Sharding | None = MISSING
    num_layers_in_first_pipeline_stage: int | None = at_least(1)
    num_layers_in_last_pipeline_stage: int | None = at_least(1)
    # the embedding takes the place of a layer
    account_for_embedding_in_pipeline_split: bool = MISSING
    account_for_loss_in_pipeline_split: bool = MISSING  # and so does the output layer
    # Megatron's string, as in "Et*3|(tt|)*2tL"
    pipeline_model_parallel_layout: str | None = MISSING
    # names of config/rules/upstream.py whose layouts may run all the same
    acknowledged_faults: list[str] = MISSING


@dataclass
class RouterConfig:
    moe_router_load_balancing_type: list[Balancing] = MISSING  # one or several
    moe_aux_loss_coeff: list[float] = at_least(0)  # one for each type
    moe_z_loss_coeff: float | None = at_least(0)
    moe_input_jitter_eps: float | None = at_least(0)
    moe_router_score_function: ScoreFunction = MISSING
    moe_router_pre_softmax: bool = MISSING
    moe_router_enable_expert_bias: bool = MISSING
    moe_router_bias_update_rate: float = at_least(0)
    moe_router_force_load_balancing: bool = MISSING
    moe_router_dtype: RouterDtype | None = MISSING
    # groups of experts; a token goes to a few of them
    moe_router_num_groups: int | None = at_least(1)
    moe_router_group_topk: int | None = at_least(1)
    moe_router_topk_scaling_factor: float | None = above(0)  # 0 would be none to Megatron-Core


@dataclass
class DispatcherConfig:
    moe_token_dispatcher_type: Dispatcher = MISSING
    moe_expert_capacity_factor: float | None = above(0)  # null: dropless
    moe_pad_expert_input_to_capacity: bool = MISSING
    moe_token_drop_policy: DropPolicy = MISSING
    moe_flex_dispatcher_backend: FlexBackend = MISSING  # only flex reads it
    moe_shared_expert_overlap: bool = MISSING  # the shared expert computes while tokens travel


@dataclass
class OptimizerConfig:
    optimizer: OptimizerName = MISSING
    lr: float = at_least(0)
    min_lr: float = at_least(0)
    weight_decay: float = at_least(0)
    adam_beta1: float = within(0, 1)
    adam_beta2: float = within(0, 1)
    adam_eps: float = above(0)
    clip_grad: float = at_least(0)  # largest global gradient norm; 0 does not clip
    use_distributed_optimizer: bool = MISSING
    overlap_grad_reduce: bool = MISSING
    overlap_param_gather: bool = MISSING
    grad_reduce_in_fp32: bool = MISSING
    # parameters in a gradient bucket; null: Megatron-Core chooses
    bucket_size: int | None = at_least(1)
    optimizer_cpu_offload: bool = MISSING
    optimizer_offload_fraction: float = at_least(0)
    lr_decay_style: DecayStyle = MISSING
    lr_warmup_steps: int | None = at_least(0)  # null: lr_warmup_fraction of lr_decay_steps
    lr_warmup_fraction: float | None = at_least(0)
    lr_decay_steps: int | None = at_least(1)  # null: trainer.max_steps
    lr_wsd_decay_style: WsdDecayStyle = MISSING  # only WSD reads it, and the next
    lr_wsd_decay_steps: int | None = at_least(1)  # steps of its last phase


@dataclass
class DataConfig:
    kind: DataKind = MISSING
    # Megatron's list: [prefix] or [weight, prefix, weight, prefix ...]
    data_path: list[str] | None = MISSING
    split: str = MISSING  # parts of train, validation and test, as in "90,5,5"
    seq_length: int = at_least(1)  # tokens
    tokenizer: str | None = MISSING  # a Hugging Face tokenizer directory
    path_to_cache: str = MISSING
    num_workers: int = at_least(0)  # processes that read ahead, a rank


@dataclass
class TrainerConfig:
    mode: Mode = MISSING
    accelerator: Accelerator = MISSING
    preflight: Preflight = MISSING  # auto: before a run on GPUs or several nodes
    devices: int | None = at_least(1)  # ranks a node; null: as few as the layout needs
    num_nodes: int = at_least(1)
    max_steps: int = at_least(1)
    micro_batch_size: int = at_least(1)  # sequences
    global_batch_size: int = at_least(1)  # sequences
    # Megatron's [first batch, increment, samples until the whole]
    rampup_batch_size: list[int] | None = MISSING
    val_check_interval: int = at_least(1)  # steps
    limit_val_batches: int = at_least(0)  # global batches a validation; 0 never validates
    log_every_n_steps: int = at_least(1)
    precision: Precision = MISSING
    fp8_recipe: Fp8Recipe = MISSING  # only precision fp8 reads it
    recompute_granularity: Granularity | None = MISSING
    recompute_method: RecomputeMethod | None = MISSING
    recompute_num_layers: int | None = at_least(1)
    recompute_modules: list[str] | None = MISSING
    fine_grained_activation_offloading: bool = MISSING
    offload_modules: list[str] | None = MISSING
    deterministic: bool = MISSING
    bad_step_policy: BadStep = (
        # what to do when a loss or gradient is not finite, or the norm above the next bound
        MISSING
    )
    bad_step_grad_norm: float | None = above(0)  # null: any finite norm is good
    # steps skipped in a row before the run stops; only skip reads it
    bad_step_limit: int = at_least(1)
    # how long a rank may stand still, or wait for another, before the job ends
    timeout_minutes: float = above(0)
    # a rank's state and least activations must fit; null does not check
    device_memory_gib: float | None = at_least(0)


@dataclass
class CheckpointConfig:
    save_interval: int | None = at_least(1)  # steps; null: only when the run ends
    save_last: bool = MISSING  # write one when the run ends, or is asked to stop
    keep_last: int | None = at_least(1)  # how many are kept; null: all
    async_save: bool = MISSING  # training goes on while the files are written
    verify: Verify = MISSING  # before loading: every file's SHA-256, or only its size
    resume: Resume = MISSING  # auto: from the newest valid one if there is any
    # runs in a row that may start at the same step; null: no limit
    max_attempts: int | None = at_least(1)
    # a new run starts from the weights of this checkpoint, and of nothing else
    load_weights: str | None = MISSING
    # keys of the model that may differ from those weights' own
    acknowledge_differences: list[str] = MISSING


@dataclass
class LoggingConfig:
    tensorboard: bool = MISSING


@dataclass
class LauncherConfig:
    type: LauncherType = MISSING  # auto: this machine where one node is asked, else Slurm
    partition: str | None = MISSING  # null: the cluster's default
    account: str | None = MISSING
    time: str | None = MISSING  # Slurm's, as in 2-00:00:00 or 90 (minutes); null: the partition's
    # null: trainer.devices where trainer.accelerator is gpu
    gpus_per_node: int | None = at_least(0)
    # a .sqsh file or a registry's name, as pyxis and enroot take it; null: none
    container_image: str | None = MISSING
    # PATH, HOST:CONTAINER or HOST:CONTAINER:ro, beside the checkout
    container_mounts: list[str] = MISSING
    # a script that the job sources before anything else; null: slurm/env.sh
    env_file: str | None = MISSING
    max_requeues: int = at_least(0)  # returns in a row of a job that came no step further
    # any other flag of sbatch, by its name
    sbatch_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    name: str = MISSING
    seed: int = within(0, 2**31)
    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    dispatcher: DispatcherConfig = field(default_factory=DispatcherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    @staticmethod
    def from_hydra(composed: DictConfig, known: list[str] | None = None) -> Config:
        """The typed Config of what Hydra composed.

        A UserError lists every key that does not belong or fit, after the problems that are `known`
        already.
        """
        schema = OmegaConf.structured(Config)
        problems = list(known or [])
        found = len(problems)
        try:
            tree = OmegaConf.to_container(composed, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(*problems, f"{error.full_key} cannot be resolved: {reason}") from None
        every = list(leaves(tree))
        if unprintable := [
            problem for key, value in every for problem in characters.problems(key, value)
        ]:
            raise UserError(*problems, *unprintable)
        for key, value in every:
            problems += _set(schema, key, value)
        missing = sorted(OmegaConf.missing_keys(schema))
        named = {problem.split(" ")[0] for problem in problems}
        problems += [f"{key} has no value; type {key}=..." for key in missing if key not in named]
        problems += _out_of_bounds(schema)
        if len(problems) > found:
            raise UserError(*problems)
        return OmegaConf.to_object(schema)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; a free mapping is one leaf, its own keys are not ours."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in FREE:
            yield from leaves(value, key + ".")
        else:
            yield key, value


@cache
def legal_keys() -> dict[str, Any]:
    """Every key of the schema with its type, dotted, in the order of the dataclasses."""
    return {key: kind for key, kind, _ in _walk(Config)}


def holds_text(key: str) -> bool:
    """The key's value is a text, or a list of texts alone."""
    kind = legal_keys()[key]
    inner = {
        kind,
        *get_args(kind),
        *(part for argument in get_args(kind) for part in get_args(argument)),
    }
    return str in inner and get_origin(kind) is not dict and key != WEIGHED


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    hints = get_type_hints(section)
    for entry in fields(section):
        if is_dataclass(hints[entry.name]):
            yield from _walk(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, hints[entry.name], entry


def nearest(key: str, known: list[str]) -> str:
    """The end of an error about an unknown key: the likeliest names, by whole key and by last part."""
    by_last = {}
    for name in known:
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    found = get_close_matches(key, known, n=3, cutoff=0.75)
    for last in get_close_matches(key.rsplit(".", 1)[-1], list(by_last), n=2, cutoff=0.7):
        found += [name for name in by_last[last] if name not in found]
    return (
        f"; did you mean {' or '.join(found[:3])}?"
        if found
        else "; `python train.py --help` lists what there is"
    )


def unknown_key(key: str) -> str:
    """The problem text for a key that the schema does not have."""
    return f"{key} is not a key of mixtrain" + nearest(key, list(legal_keys()))


def describe(kind: Any) -> str:
    """A type as a user reads it: `a whole number or null`, `one of cpu, gpu`."""
    arguments = get_args(kind)
    if type(None) in arguments:
        return f"{describe(arguments[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(
        kind, "a list, as in [a,b]" if "list" in str(kind) else "a mapping, as in {field: value}"
    )


def _set(schema: DictConfig, key: str, value: Any) -> list[str]:
    """Set one leaf of the schema; the problem, if it does not belong or fit."""
    kinds = legal_keys()
    if key not in kinds:
        return [unknown_key(key)]
    if value == MISSING:
        return []
    if get_origin(kinds[key]) is list and value is not None and not isinstance(value, list):
        value = [value]  # a required list may be typed as its only item
    try:
        if any(
            _is_another_type(key, part) for part in (value if isinstance(value, list) else [value])
        ):
            raise ValidationError
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        advice = '; quote what is one: "1.10" in a file' * (
            holds_text(key) and not isinstance(value, (list, dict))
        )
        return [
            f"{key} = {'null' if value is None else value} must be {describe(kinds[key])}{advice}"
        ]
    return []


def _is_another_type(key: str, value: Any) -> bool:
    """What OmegaConf would turn into a value of the key's type, though its writer meant something else.

    It makes true 1 and 2.0 2 of a whole number, 2 true of a bool, 2 the second name of a choice, and 1.10 the text 1.1.
    """
    kind = legal_keys()[key]
    kind = get_args(kind)[0] if type(None) in get_args(kind) else kind
    kind = get_args(kind)[0] if get_origin(kind) is list else kind
    if kind is int:
        return isinstance(value, (bool, float))
    if kind is bool:
        return type(value) in (int, float)
    if kind is str:
        return isinstance(value, bool) or isinstance(value, float) and key != WEIGHED
    return isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, (int, float))


def _out_of_bounds(schema: DictConfig) -> Iterator[str]:
    for key, _, entry in _walk(Config):
        value = OmegaConf.select(schema, key)  # None: null, or missing
        for part in value if isinstance(value, ListConfig) else [value]:
            if isinstance(part, (int, float)) and (wrong := _bound(part, entry.metadata)):
                yield f"{key} = {part} must be {wrong}"


def _bound(value: float, bounds: Mapping[str, float]) -> str | None:
    """What a number must be and is not, or None."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "below 2^63"  # what a tensor's size, a step and a seed can be
    if not math.isfinite(value):
        return "a finite number"
    if "minimum" in bounds and value < bounds["minimum"]:
        return f"at least {bounds['minimum']}"
    if "above" in bounds and value <= bounds["above"]:
        return f"above {bounds['above']}"
    if "below" in bounds and value >= bounds["below"]:
        return f"below {bounds['below']}"
    return None


def plain(value: Any) -> Any:
    """A Config value as plain YAML and Megatron-Core have it: enums by name, everything else as it is."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `from_hydra` reads back to the same Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
