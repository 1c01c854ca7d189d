"""Names, types, bounds and effects of every key a user can set. No torch, no values.

Rule: this file declares a key once, with its type, unit, bounds and effect; values are in conf/ and
recipes/ only. Names of model, parallel, router, dispatcher and optimizer keys are Megatron-Core's
fields; the trainer's are NeMo's and Lightning's. typed_config.py makes a Config, and nothing
changes it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING

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

# mappings with the keys of Megatron-Core and of Slurm
FREE = ("model.extra", "launcher.sbatch_args")
SBATCH = "launcher.sbatch_args"
BLEND = "data.data_path"  # a list of prefixes that may contain numbers, their weights

# What a key changes.
MATHEMATICS = "mathematics"  # the resulting model, by more than the order of additions
EXECUTION = "execution"  # the same model, faster, smaller or elsewhere (docs/parity.md)
RECORDS = "records"  # what is written, and when


def mathematics(**metadata: Any) -> Any:
    return _key(effect=MATHEMATICS, **metadata)


def forward_pass(**bounds: float) -> Any:
    """Return a field of mathematics: of the forward pass, unseen in the shapes of the weights.

    A loss, a jitter or a dtype belongs to a training: weights are not for one of them.
    """
    return mathematics(is_forward=True, **bounds)


def execution(**bounds: float) -> Any:
    return _key(effect=EXECUTION, **bounds)


def records(**metadata: Any) -> Any:
    return _key(effect=RECORDS, **metadata)


def _key(default_factory: Any = None, **metadata: Any) -> Any:
    """Return a required field, or one with a default; null is valid where the type allows it.

    Bounds of numbers: `minimum` (or more), `above`, `below`.
    """
    if default_factory:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=MISSING, metadata=metadata)


@dataclass
class ModelConfig:
    # null: as few as the pipeline needs (see plan.resolve)
    num_layers: int | None = mathematics(minimum=1)
    hidden_size: int = mathematics(minimum=1)
    # of a dense layer: Mixtral has none, but Megatron-Core requires the value
    ffn_hidden_size: int = mathematics(minimum=1)
    num_attention_heads: int = forward_pass(minimum=1)
    num_query_groups: int = forward_pass(minimum=1)
    kv_channels: int = forward_pass(minimum=1)  # the size of one head
    num_moe_experts: int = mathematics(minimum=1)
    moe_router_topk: int = forward_pass(minimum=1)
    moe_ffn_hidden_size: int = mathematics(minimum=1)
    moe_shared_expert_intermediate_size: int | None = mathematics(minimum=1)
    vocab_size: int = mathematics(minimum=1)
    max_position_embeddings: int = mathematics(minimum=1)
    rotary_base: int = forward_pass(minimum=1)
    layernorm_epsilon: float = forward_pass(above=0)
    init_method_std: float = mathematics(minimum=0)
    untie_embeddings_and_output_weights: bool = forward_pass()
    qk_layernorm: bool = forward_pass()
    # of qk_layernorm: each head's values, or a token's whole query (or key) projection
    qk_layernorm_over: QkLayernormOver = forward_pass()
    add_qkv_bias: bool = forward_pass()
    # a sigmoid weighs the shared expert for each token
    moe_shared_expert_gate: bool = forward_pass()
    transformer_impl: TransformerImpl = execution()
    # auto: PyTorch's or Transformer Engine's own choice; fused: cuDNN
    attention_backend: AttnBackend = execution()
    moe_grouped_gemm: bool = execution()
    hf_model: str | None = records()  # the Hugging Face model that these values describe
    # any other field of TransformerConfig
    extra: dict[str, Any] = mathematics(default_factory=dict)


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = execution(minimum=1)
    pipeline_model_parallel_size: int = execution(minimum=1)
    # model chunks per pipeline stage
    virtual_pipeline_model_parallel_size: int | None = execution(minimum=2)
    context_parallel_size: int = execution(minimum=1)
    expert_model_parallel_size: int = execution(minimum=1)
    expert_tensor_parallel_size: int = execution(minimum=1)
    sequence_parallel: bool = execution()
    num_distributed_optimizer_instances: int = execution(minimum=1)
    # Megatron-FSDP; null: its own data parallelism
    data_parallel_sharding_strategy: Sharding | None = execution()
    num_layers_in_first_pipeline_stage: int | None = execution(minimum=1)
    num_layers_in_last_pipeline_stage: int | None = execution(minimum=1)
    account_for_embedding_in_pipeline_split: bool = execution()  # count the embedding as a layer
    account_for_loss_in_pipeline_split: bool = execution()  # count the output layer as a layer
    # Megatron's string, as in "Et*3|(tt|)*2tL"
    pipeline_model_parallel_layout: str | None = execution()
    # faults of config/rules/upstream.py that do not stop the run
    acknowledged_faults: list[str] = mathematics()


@dataclass
class RouterConfig:
    moe_router_load_balancing_type: list[Balancing] = forward_pass()  # one or several
    moe_aux_loss_coeff: list[float] = mathematics(minimum=0)  # one for each type
    moe_z_loss_coeff: float | None = mathematics(minimum=0)
    moe_input_jitter_eps: float | None = mathematics(minimum=0)
    moe_router_score_function: ScoreFunction = forward_pass()
    moe_router_pre_softmax: bool = forward_pass()
    moe_router_enable_expert_bias: bool = forward_pass()
    moe_router_bias_update_rate: float = mathematics(minimum=0)
    moe_router_force_load_balancing: bool = forward_pass()
    moe_router_dtype: RouterDtype | None = mathematics()
    # groups of experts; a token goes to a few of them
    moe_router_num_groups: int | None = forward_pass(minimum=1)
    moe_router_group_topk: int | None = forward_pass(minimum=1)
    # Megatron-Core takes 0 for None
    moe_router_topk_scaling_factor: float | None = forward_pass(above=0)


@dataclass
class DispatcherConfig:
    moe_token_dispatcher_type: Dispatcher = execution()
    moe_expert_capacity_factor: float | None = forward_pass(above=0)  # null: dropless
    moe_pad_expert_input_to_capacity: bool = execution()
    moe_token_drop_policy: DropPolicy = forward_pass()
    moe_flex_dispatcher_backend: FlexBackend = execution()  # only flex reads it
    # compute the shared expert during the token exchange
    moe_shared_expert_overlap: bool = execution()


@dataclass
class OptimizerConfig:
    optimizer: OptimizerName = mathematics()
    lr: float = mathematics(minimum=0)
    min_lr: float = mathematics(minimum=0)
    weight_decay: float = mathematics(minimum=0)
    adam_beta1: float = mathematics(minimum=0, below=1)
    adam_beta2: float = mathematics(minimum=0, below=1)
    adam_eps: float = mathematics(above=0)
    clip_grad: float = mathematics(minimum=0)  # largest global gradient norm; 0 does not clip
    use_distributed_optimizer: bool = execution()
    overlap_grad_reduce: bool = execution()
    overlap_param_gather: bool = execution()
    grad_reduce_in_fp32: bool = mathematics()
    # parameters in a gradient bucket; null: Megatron-Core chooses
    bucket_size: int | None = execution(minimum=1)
    optimizer_cpu_offload: bool = execution()
    optimizer_offload_fraction: float = execution(minimum=0)
    lr_decay_style: DecayStyle = mathematics()
    # null: lr_warmup_fraction of lr_decay_steps
    lr_warmup_steps: int | None = mathematics(minimum=0)
    lr_warmup_fraction: float | None = mathematics(minimum=0)
    lr_decay_steps: int | None = mathematics(minimum=1)  # null: trainer.max_steps
    # only WSD reads these two
    lr_wsd_decay_style: WsdDecayStyle = mathematics()
    lr_wsd_decay_steps: int | None = mathematics(minimum=1)  # steps of the last phase


@dataclass
class DataConfig:
    kind: DataKind = mathematics()
    # Megatron's list: [prefix] or [weight, prefix, weight, prefix ...]
    data_path: list[str] | None = mathematics()
    split: str = mathematics()  # weights of train, validation and test, as in "90,5,5"
    seq_length: int = mathematics(minimum=1)  # tokens
    tokenizer: str | None = mathematics()  # a Hugging Face tokenizer directory
    path_to_cache: str = records()
    num_workers: int = execution(minimum=0)  # prefetching processes per rank


@dataclass
class TrainerConfig:
    mode: Mode = records()
    accelerator: Accelerator = execution()
    preflight: Preflight = records()  # auto: before a run on GPUs or several nodes
    devices: int | None = execution(minimum=1)  # ranks per node; null: as few as the layout needs
    num_nodes: int = execution(minimum=1)
    max_steps: int = mathematics(minimum=1)
    # sequences; mathematics: an auxiliary loss is the mean over microbatches
    micro_batch_size: int = mathematics(minimum=1)
    global_batch_size: int = mathematics(minimum=1)  # sequences
    # Megatron's [first batch, increment, samples of the ramp-up]
    rampup_batch_size: list[int] | None = mathematics()
    val_check_interval: int = records(minimum=1)  # steps
    limit_val_batches: int = records(minimum=0)  # global batches per validation; 0 never validates
    log_every_n_steps: int = records(minimum=1)
    precision: Precision = mathematics()
    fp8_recipe: Fp8Recipe = mathematics()  # only precision fp8 reads it
    recompute_granularity: Granularity | None = execution()
    recompute_method: RecomputeMethod | None = execution()
    recompute_num_layers: int | None = execution(minimum=1)
    recompute_modules: list[str] | None = execution()
    fine_grained_activation_offloading: bool = execution()
    offload_modules: list[str] | None = execution()
    deterministic: bool = execution()
    # a bad step has a loss or gradient that is not finite, or a norm above bad_step_grad_norm
    bad_step_policy: BadStep = mathematics()
    bad_step_grad_norm: float | None = mathematics(above=0)  # null: no upper bound
    # consecutive skipped steps that stop the run; only skip reads it
    bad_step_limit: int = mathematics(minimum=1)
    # how long a rank may make no progress, or wait for another, before the job ends
    timeout_minutes: float = execution(above=0)
    # must hold a rank's state and least activations; null does not check
    device_memory_gib: float | None = execution(minimum=0)


@dataclass
class CheckpointConfig:
    save_interval: int | None = records(minimum=1)  # steps; null: only at the end of the run
    save_last: bool = records()  # save at the end of the run and on a stop request
    keep_last: int | None = records(minimum=1)  # number of checkpoints to keep; null: all
    async_save: bool = records()  # training continues while the files are written
    verify: Verify = records()  # before loading: every file's SHA-256, or only its size
    resume: Resume = records()  # auto: from the newest valid checkpoint, if there is one
    # consecutive runs that may start at the same step; null: no limit
    max_attempts: int | None = records(minimum=1)
    # a new run takes the weights, and nothing else, from this checkpoint
    load_weights: str | None = mathematics()
    # model keys that may differ from those of load_weights
    acknowledge_differences: list[str] = mathematics()


@dataclass
class LoggingConfig:
    tensorboard: bool = records()


@dataclass
class LauncherConfig:
    type: LauncherType = records()  # auto: this machine for one node, else Slurm
    partition: str | None = records()  # null: the cluster's default
    account: str | None = records()
    # a Slurm time, as in 2-00:00:00 or 90 (minutes); null: the partition's
    time: str | None = records()
    # null: trainer.devices if trainer.accelerator is gpu
    gpus_per_node: int | None = records(minimum=0)
    # a .sqsh file or an image name, for pyxis and enroot; null: no container
    container_image: str | None = records()
    # PATH, HOST:CONTAINER or HOST:CONTAINER:ro, in addition to the checkout
    container_mounts: list[str] = records()
    # a script that the job sources first; null: slurm/env.sh
    env_file: str | None = records()
    max_requeues: int = records(minimum=0)  # consecutive requeues without a new step
    # any other flag of sbatch, by its long name
    sbatch_args: dict[str, Any] = records(default_factory=dict)


@dataclass
class Config:
    name: str = records()
    seed: int = mathematics(minimum=0, below=2**31)
    run_dir: str = records()
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


@cache
def legal_keys() -> dict[str, Any]:
    """Return {dotted key: type} of the whole schema, in the order of the dataclasses."""
    return {key: kind for key, kind, _ in _walk(Config)}


@cache
def key_metadata() -> dict[str, Mapping[str, Any]]:
    """Return {dotted key: bounds and effect} of the whole schema."""
    return {key: entry.metadata for key, _, entry in _walk(Config)}


def _walk(section: type, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    hints = get_type_hints(section)
    for entry in fields(section):
        if is_dataclass(hints[entry.name]):
            yield from _walk(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, hints[entry.name], entry
