"""Names, types and bounds of every key a user can set. No torch, no values.

Rule: this file names a key once, with its type and unit; values are in conf/ and recipes/ only.
Names of model, parallel, router, dispatcher and optimizer keys are Megatron-Core's fields; the
trainer's are NeMo's and Lightning's. Nothing changes a Config after `from_hydra` has returned it.
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

# mappings with the keys of Megatron-Core and of Slurm
FREE = ("model.extra", "launcher.sbatch_args")
SBATCH = "launcher.sbatch_args"
BLEND = "data.data_path"  # a list of prefixes that may contain numbers, their weights


def at_least(minimum: float) -> Any:
    """A required field of at least `minimum`; null is valid where the type allows it."""
    return field(default=MISSING, metadata={"minimum": minimum})


def above(bound: float) -> Any:
    return field(default=MISSING, metadata={"above": bound})


def within(minimum: float, below: float) -> Any:
    """A required field from `minimum` to less than `below`."""
    return field(default=MISSING, metadata={"minimum": minimum, "below": below})


@dataclass
class ModelConfig:
    num_layers: int | None = at_least(1)  # null: as few as the pipeline needs (see plan.resolve)
    hidden_size: int = at_least(1)
    # of a dense layer: Mixtral has none, but Megatron-Core requires the value
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
    hf_model: str | None = MISSING  # the Hugging Face model that these values describe
    extra: dict[str, Any] = field(default_factory=dict)  # any other field of TransformerConfig


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = at_least(1)
    pipeline_model_parallel_size: int = at_least(1)
    # model chunks per pipeline stage
    virtual_pipeline_model_parallel_size: int | None = at_least(2)
    context_parallel_size: int = at_least(1)
    expert_model_parallel_size: int = at_least(1)
    expert_tensor_parallel_size: int = at_least(1)
    sequence_parallel: bool = MISSING
    num_distributed_optimizer_instances: int = at_least(1)
    # Megatron-FSDP; null: its own data parallelism
    data_parallel_sharding_strategy: Sharding | None = MISSING
    num_layers_in_first_pipeline_stage: int | None = at_least(1)
    num_layers_in_last_pipeline_stage: int | None = at_least(1)
    account_for_embedding_in_pipeline_split: bool = MISSING  # count the embedding as a layer
    account_for_loss_in_pipeline_split: bool = MISSING  # count the output layer as a layer
    # Megatron's string, as in "Et*3|(tt|)*2tL"
    pipeline_model_parallel_layout: str | None = MISSING
    # faults of config/rules/upstream.py that do not stop the run
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
    moe_router_topk_scaling_factor: float | None = above(0)  # Megatron-Core takes 0 for None


@dataclass
class DispatcherConfig:
    moe_token_dispatcher_type: Dispatcher = MISSING
    moe_expert_capacity_factor: float | None = above(0)  # null: dropless
    moe_pad_expert_input_to_capacity: bool = MISSING
    moe_token_drop_policy: DropPolicy = MISSING
    moe_flex_dispatcher_backend: FlexBackend = MISSING  # only flex reads it
    # compute the shared expert during the token exchange
    moe_shared_expert_overlap: bool = MISSING


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
    # only WSD reads these two
    lr_wsd_decay_style: WsdDecayStyle = MISSING
    lr_wsd_decay_steps: int | None = at_least(1)  # steps of the last phase


@dataclass
class DataConfig:
    kind: DataKind = MISSING
    # Megatron's list: [prefix] or [weight, prefix, weight, prefix ...]
    data_path: list[str] | None = MISSING
    split: str = MISSING  # weights of train, validation and test, as in "90,5,5"
    seq_length: int = at_least(1)  # tokens
    tokenizer: str | None = MISSING  # a Hugging Face tokenizer directory
    path_to_cache: str = MISSING
    num_workers: int = at_least(0)  # prefetching processes per rank


@dataclass
class TrainerConfig:
    mode: Mode = MISSING
    accelerator: Accelerator = MISSING
    preflight: Preflight = MISSING  # auto: before a run on GPUs or several nodes
    devices: int | None = at_least(1)  # ranks per node; null: as few as the layout needs
    num_nodes: int = at_least(1)
    max_steps: int = at_least(1)
    micro_batch_size: int = at_least(1)  # sequences
    global_batch_size: int = at_least(1)  # sequences
    # Megatron's [first batch, increment, samples of the ramp-up]
    rampup_batch_size: list[int] | None = MISSING
    val_check_interval: int = at_least(1)  # steps
    limit_val_batches: int = at_least(0)  # global batches per validation; 0 never validates
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
    # a bad step has a loss or gradient that is not finite, or a norm above bad_step_grad_norm
    bad_step_policy: BadStep = MISSING
    bad_step_grad_norm: float | None = above(0)  # null: no upper bound
    # consecutive skipped steps that stop the run; only skip reads it
    bad_step_limit: int = at_least(1)
    # how long a rank may make no progress, or wait for another, before the job ends
    timeout_minutes: float = above(0)
    # must hold a rank's state and least activations; null does not check
    device_memory_gib: float | None = at_least(0)


@dataclass
class CheckpointConfig:
    save_interval: int | None = at_least(1)  # steps; null: only at the end of the run
    save_last: bool = MISSING  # save at the end of the run and on a stop request
    keep_last: int | None = at_least(1)  # number of checkpoints to keep; null: all
    async_save: bool = MISSING  # training continues while the files are written
    verify: Verify = MISSING  # before loading: every file's SHA-256, or only its size
    resume: Resume = MISSING  # auto: from the newest valid checkpoint, if there is one
    # consecutive runs that may start at the same step; null: no limit
    max_attempts: int | None = at_least(1)
    # a new run takes the weights, and nothing else, from this checkpoint
    load_weights: str | None = MISSING
    # model keys that may differ from those of load_weights
    acknowledge_differences: list[str] = MISSING


@dataclass
class LoggingConfig:
    tensorboard: bool = MISSING


@dataclass
class LauncherConfig:
    type: LauncherType = MISSING  # auto: this machine for one node, else Slurm
    partition: str | None = MISSING  # null: the cluster's default
    account: str | None = MISSING
    # a Slurm time, as in 2-00:00:00 or 90 (minutes); null: the partition's
    time: str | None = MISSING
    # null: trainer.devices if trainer.accelerator is gpu
    gpus_per_node: int | None = at_least(0)
    # a .sqsh file or an image name, for pyxis and enroot; null: no container
    container_image: str | None = MISSING
    # PATH, HOST:CONTAINER or HOST:CONTAINER:ro, in addition to the checkout
    container_mounts: list[str] = MISSING
    # a script that the job sources first; null: slurm/env.sh
    env_file: str | None = MISSING
    max_requeues: int = at_least(0)  # consecutive requeues without a new step
    # any other flag of sbatch, by its long name
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
        """Return the typed Config of a composed tree.

        Raises UserError with the `known` problems and every unknown, missing or illegal key.
        """
        schema = OmegaConf.structured(Config)
        problems = list(known or [])
        known_count = len(problems)
        try:
            tree = OmegaConf.to_container(composed, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(*problems, f"{error.full_key} cannot be resolved: {reason}") from None
        values = list(leaves(tree))
        unprintable = [p for key, value in values for p in characters.problems(key, value)]
        if unprintable:
            raise UserError(*problems, *unprintable)
        for key, value in values:
            problems += _set(schema, key, value)
        missing = sorted(OmegaConf.missing_keys(schema))
        named = {problem.split(" ")[0] for problem in problems}
        problems += [f"{key} has no value; type {key}=..." for key in missing if key not in named]
        problems += _out_of_bounds(schema)
        if len(problems) > known_count:
            raise UserError(*problems)
        return OmegaConf.to_object(schema)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf; a free mapping is one leaf."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in FREE:
            yield from leaves(value, key + ".")
        else:
            yield key, value


@cache
def legal_keys() -> dict[str, Any]:
    """Return {dotted key: type} of the whole schema, in the order of the dataclasses."""
    return {key: kind for key, kind, _ in _walk(Config)}


def is_text_key(key: str) -> bool:
    """Return whether the key takes a text or a list of texts."""
    kind = legal_keys()[key]
    types = {kind, *get_args(kind)}
    types |= {inner for argument in get_args(kind) for inner in get_args(argument)}
    return str in types and get_origin(kind) is not dict and key != BLEND


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    hints = get_type_hints(section)
    for entry in fields(section):
        if is_dataclass(hints[entry.name]):
            yield from _walk(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, hints[entry.name], entry


def unknown_key(key: str) -> str:
    """Return the problem of an unknown key, with similar keys by full name and by last part."""
    by_last_part = {}
    for name in legal_keys():
        by_last_part.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    similar = get_close_matches(key, list(legal_keys()), n=3, cutoff=0.75)
    for last in get_close_matches(key.rsplit(".", 1)[-1], list(by_last_part), n=2, cutoff=0.7):
        similar += [name for name in by_last_part[last] if name not in similar]
    hint = f"did you mean {' or '.join(similar[:3])}?"
    if not similar:
        hint = "`python train.py --help` lists all keys"
    return f"{key} is not a key of mixtrain; {hint}"


def describe(kind: Any) -> str:
    """Return a type as a noun phrase: `a whole number or null`, `one of cpu, gpu`."""
    arguments = get_args(kind)
    if type(None) in arguments:
        return f"{describe(arguments[0])} or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in names:
        return names[kind]
    return "a list, as in [a,b]" if "list" in str(kind) else "a mapping, as in {field: value}"


def _set(schema: DictConfig, key: str, value: Any) -> list[str]:
    """Set one leaf of the schema; return a problem if the key is unknown or the value illegal."""
    kinds = legal_keys()
    if key not in kinds:
        return [unknown_key(key)]
    if value == MISSING:
        return []
    if get_origin(kinds[key]) is list and value is not None and not isinstance(value, list):
        value = [value]  # a list of one item may be typed as the item
    try:
        if any(
            _is_converted(key, item) for item in (value if isinstance(value, list) else [value])
        ):
            raise ValidationError
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        advice = ""
        if is_text_key(key) and not isinstance(value, (list, dict)):
            advice = '; put it in quotes in a file: "1.10"'
        shown = "null" if value is None else value
        return [f"{key} = {shown} must be {describe(kinds[key])}{advice}"]
    return []


def _is_converted(key: str, value: Any) -> bool:
    """Return whether OmegaConf would convert the value to the key's type without an error.

    It converts true to the number 1 and 2.0 to 2, 2 to the bool true, 2 to the second name of a
    choice, and 1.10 to the text 1.1.
    """
    kind = legal_keys()[key]
    kind = get_args(kind)[0] if type(None) in get_args(kind) else kind
    kind = get_args(kind)[0] if get_origin(kind) is list else kind
    if kind is int:
        return isinstance(value, (bool, float))
    if kind is bool:
        return type(value) in (int, float)
    if kind is str:
        return isinstance(value, bool) or isinstance(value, float) and key != BLEND
    return isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, (int, float))


def _out_of_bounds(schema: DictConfig) -> Iterator[str]:
    for key, _, entry in _walk(Config):
        value = OmegaConf.select(schema, key)  # None: null, or missing
        for item in value if isinstance(value, ListConfig) else [value]:
            if isinstance(item, (int, float)) and (bound := _violated_bound(item, entry.metadata)):
                yield f"{key} = {item} must be {bound}"


def _violated_bound(value: float, bounds: Mapping[str, float]) -> str | None:
    """Return the bound that a number violates, or None."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "below 2^63"  # the limit of tensor sizes, steps and seeds
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
    """Return a Config value with enums as their names, as in YAML and Megatron-Core."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that `from_hydra` reads back to the same Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
