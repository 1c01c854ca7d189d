"""Rules about precision, recompute, the optimizer and the schedule. No torch."""

from __future__ import annotations

import math
from difflib import get_close_matches

from mixtrain.config import model_differences, pipeline_split
from mixtrain.config.choices import (
    Accelerator,
    DecayStyle,
    Granularity,
    OptimizerName,
    Precision,
    RecomputeMethod,
    Sharding,
    TransformerImpl,
)
from mixtrain.config.key_effects import FORWARD
from mixtrain.config.plan import Plan
from mixtrain.config.rules.nearest import (
    Problems,
    batch_sizes,
    dense_ranks_fit,
    must_divide,
    near_divisors,
    near_multiples,
    nearest,
)

OFFLOAD_MODULES = (
    "attn_norm",
    "attn_proj",
    "core_attn",
    "expert_fc1",
    "mlp_norm",
    "moe_act",
    "qkv_linear",
)
SELECTIVE_MODULES = ("core_attn", "layernorm", "moe", "moe_act", "shared_experts")


def query_groups_divide_heads(plan: Plan) -> Problems:
    model = plan.config.model
    groups = model.num_query_groups
    heads = model.num_attention_heads
    yield from must_divide("model.num_query_groups", groups, "model.num_attention_heads", heads)


def head_size_is_even(plan: Plan) -> Problems:
    if (size := plan.config.model.kv_channels) % 2:
        yield (
            f"model.kv_channels = {size} must be even, because rotary positions rotate pairs; use"
            f" {near_multiples(size, 2)}"
        )


def acknowledged_differences_are_keys(plan: Plan) -> Problems:
    for key in model_differences.unknown(plan.config):
        near = get_close_matches(key, [*FORWARD, model_differences.TOKENIZER], n=1, cutoff=0.3)
        yield (
            f"{model_differences.KEY} has {key}; {f'did you mean {near[0]}? ' if near else ''}the"
            f" keys are {model_differences.EXTRA}FIELD, {', '.join(FORWARD)},"
            f" {model_differences.TOKENIZER}"
        )


def overlap_requirements_hold(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.overlap_param_gather:
        for key in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(optimizer, key):
                yield (
                    f"optimizer.overlap_param_gather = true needs optimizer.{key} = true; it is"
                    " false"
                )


def distributed_optimizer_is_adam(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.use_distributed_optimizer and optimizer.optimizer is not OptimizerName.adam:
        yield (
            f"optimizer.optimizer = {optimizer.optimizer.name} needs"
            " optimizer.use_distributed_optimizer = false: Megatron-Core's supports only adam"
        )


def full_recompute_is_complete(plan: Plan) -> Problems:
    trainer = plan.config.trainer
    full = trainer.recompute_granularity is Granularity.full
    for key in ("recompute_method", "recompute_num_layers"):
        value = getattr(trainer, key)
        if full and value is None:
            yield (
                f"trainer.recompute_granularity = full needs trainer.{key}; it is null"
                " (uniform and 1 recompute everything)"
            )
        if not full and value is not None:
            yield (
                f"trainer.{key} is set, but only trainer.recompute_granularity = full uses it;"
                " use null"
            )


def full_recompute_fits_every_chunk(plan: Plan) -> Problems:
    """Check recompute_num_layers against every chunk that has layers.

    Uniform: it divides the layers of a chunk, because 0.16 runs past the last layer (0.19 shortens
    the last unit). Block: a chunk has at least so many layers.
    """
    trainer = plan.config.trainer
    size = trainer.recompute_num_layers
    if pipeline_split.problems(plan.config.parallel, plan.config.model.num_layers):
        return
    if trainer.recompute_granularity is not Granularity.full or not size:
        return
    uniform = trainer.recompute_method is RecomputeMethod.uniform
    chunks = [
        (layers, stage, chunk)
        for stage, row in enumerate(plan.layers)
        for chunk, layers in enumerate(row)
        if layers
    ]
    wrong = [entry for entry in chunks if (entry[0] % size if uniform else size > entry[0])]
    if not wrong:
        return
    layers, stage, chunk = wrong[0]
    where = f" of pipeline stage {stage}" if len(plan.layers) > 1 else ""
    where += f", chunk {chunk}" if len(plan.layers[0]) > 1 else ""
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    counts = [entry[0] for entry in chunks]
    use = near_divisors(size, math.gcd(*counts)) if uniform else min(counts)
    yield (
        f"trainer.recompute_num_layers = {size} does not fit the {layers} layers{where}{more};"
        f" use {use}"
    )


def selective_recompute_names_modules(plan: Plan) -> Problems:
    trainer = plan.config.trainer
    selective = trainer.recompute_granularity is Granularity.selective
    modules = trainer.recompute_modules
    if bool(modules) != selective:
        granularity = (
            trainer.recompute_granularity.name if trainer.recompute_granularity else "null"
        )
        yield (
            f"trainer.recompute_modules = {modules or 'null'} does not fit"
            f" trainer.recompute_granularity = {granularity}: selective needs a list of"
            f" {', '.join(SELECTIVE_MODULES)}, any other value needs null"
        )
    for name in modules or []:
        if name not in SELECTIVE_MODULES:
            yield (
                f"trainer.recompute_modules has {name}; the modules are"
                f" {', '.join(SELECTIVE_MODULES)}"
            )
    if "moe_act" in (modules or []) and not plan.config.model.moe_grouped_gemm:
        yield (
            "trainer.recompute_modules has moe_act, which needs model.moe_grouped_gemm = true;"
            " it is false"
        )


def fp8_needs_transformer_engine(plan: Plan) -> Problems:
    implementation = plan.config.model.transformer_impl
    if plan.config.trainer.precision is not Precision.fp8:
        return
    if implementation is not TransformerImpl.transformer_engine:
        yield (
            "trainer.precision = fp8 needs model.transformer_impl = transformer_engine,"
            f" not {implementation.name}"
        )
    if plan.config.trainer.accelerator is Accelerator.cpu:
        yield "trainer.precision = fp8 needs trainer.accelerator = gpu, not cpu"


def offload_needs_transformer_engine(plan: Plan) -> Problems:
    trainer = plan.config.trainer
    optimizer = plan.config.optimizer
    model = plan.config.model
    modules = trainer.offload_modules
    offloads = trainer.fine_grained_activation_offloading
    if offloads != bool(modules):
        yield (
            f"trainer.offload_modules = {modules or 'null'} does not fit"
            f" trainer.fine_grained_activation_offloading = {str(offloads).lower()}: true needs a"
            f" list of {', '.join(OFFLOAD_MODULES)}, false needs null"
        )
    for name in modules or []:
        if name not in OFFLOAD_MODULES:
            yield (
                f"trainer.offload_modules has {name}; the modules are {', '.join(OFFLOAD_MODULES)}"
            )
    if "attn_proj" in (modules or []) and "core_attn" not in modules:
        yield "trainer.offload_modules has attn_proj, whose input core_attn produces; give both"
    if modules and model.transformer_impl is not TransformerImpl.transformer_engine:
        yield (
            "trainer.fine_grained_activation_offloading = true needs model.transformer_impl ="
            f" transformer_engine, not {model.transformer_impl.name}"
        )
    if offloads and trainer.recompute_granularity is Granularity.full:
        yield (
            "trainer.fine_grained_activation_offloading = true has nothing to offload under"
            " full recompute; use false"
        )
    for key, on in (
        ("trainer.fine_grained_activation_offloading", offloads),
        ("optimizer.optimizer_cpu_offload", optimizer.optimizer_cpu_offload),
    ):
        if on and trainer.accelerator is Accelerator.cpu:
            yield f"{key} = true moves memory off a GPU, but trainer.accelerator = cpu; use false"


def optimizer_offload_is_consistent(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    fraction = optimizer.optimizer_offload_fraction
    if fraction > 1:
        yield f"optimizer.optimizer_offload_fraction = {fraction} must be at most 1"
    if optimizer.optimizer_cpu_offload != (fraction > 0):
        yield (
            f"optimizer.optimizer_cpu_offload = {str(optimizer.optimizer_cpu_offload).lower()} and"
            f" optimizer.optimizer_offload_fraction = {fraction} contradict; use both or neither"
        )
    if optimizer.optimizer_cpu_offload and not optimizer.use_distributed_optimizer:
        yield (
            "optimizer.optimizer_cpu_offload = true needs optimizer.use_distributed_optimizer ="
            " true; it is false"
        )


def fsdp_requirements_hold(plan: Plan) -> Problems:
    key = "parallel.data_parallel_sharding_strategy"
    parallel = plan.config.parallel
    if not (strategy := parallel.data_parallel_sharding_strategy):
        return
    if plan.config.trainer.accelerator is Accelerator.cpu:
        yield (
            f"{key} = {strategy.name}: Megatron-FSDP does not run on the CPU"
            " (trainer.accelerator = cpu); use null"
        )
    if not plan.config.optimizer.use_distributed_optimizer:
        yield (
            f"{key} = {strategy.name} needs optimizer.use_distributed_optimizer = true; it is false"
        )
    if parallel.pipeline_model_parallel_size > 1:
        size = parallel.pipeline_model_parallel_size
        yield (
            f"{key} = {strategy.name} is for parallel.pipeline_model_parallel_size = 1, not {size}"
        )
    hybrid = parallel.num_distributed_optimizer_instances > 1
    if hybrid and strategy is not Sharding.optim_grads_params:
        yield (
            f"{key} = {strategy.name}: hybrid sharding needs optim_grads_params; or one"
            " optimizer instance"
        )


def fsdp_saves_nothing_yet(plan: Plan) -> Problems:
    sharding = plan.config.parallel.data_parallel_sharding_strategy
    if sharding and (plan.saves or plan.config.checkpoint.load_weights):
        yield (
            f"parallel.data_parallel_sharding_strategy = {sharding.name}: checkpoints of"
            " Megatron-FSDP have a format of their own, which mixtrain does not write or read; use"
            " checkpoint=none, or null"
        )


def rampup_reaches_the_batch(plan: Plan) -> Problems:
    """Check every batch of the ramp as batch_over_ranks and virtual_pipeline_needs_pipeline do."""
    trainer = plan.config.trainer
    key = "trainer.rampup_batch_size"
    if trainer.rampup_batch_size is None:
        return
    if len(trainer.rampup_batch_size) != 3 or min(trainer.rampup_batch_size) < 1:
        yield (
            f"{key} = {list(trainer.rampup_batch_size)} must be [first batch, increment,"
            " samples], all 1 or more"
        )
        return
    (first, increment, _) = trainer.rampup_batch_size
    (full, micro, dp) = batch_sizes(plan)
    unit = micro * dp
    name = "trainer.micro_batch_size * data parallel size"
    if plan.config.parallel.virtual_pipeline_model_parallel_size:
        unit *= plan.config.parallel.pipeline_model_parallel_size
        name += " * PP of a virtual pipeline"
    # other rules report this
    if full % unit or not dense_ranks_fit(plan):
        return
    use = nearest(first, range(unit, full, unit)) or "null"
    if first >= full:
        yield (
            f"{key}: its first batch {first} must be below trainer.global_batch_size = {full};"
            f" use {use}"
        )
    elif first % unit:
        yield f"{key}: its first batch {first} must be a multiple of {name} = {unit}; use {use}"
    elif (rest := full - first) % increment or increment % unit:
        use = nearest(increment, [size for size in range(unit, rest + 1, unit) if rest % size == 0])
        condition = f"be a multiple of {name} = {unit}"
        if rest % increment:
            condition = f"divide trainer.global_batch_size - {first} = {rest}"
        yield f"{key}: its increment {increment} must {condition}; use {use}"


def schedule_is_complete(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    fraction = optimizer.lr_warmup_fraction
    wsd = optimizer.lr_decay_style is DecayStyle.WSD
    if fraction is not None and not 0 <= fraction < 1:
        yield f"optimizer.lr_warmup_fraction = {fraction} must be from 0 to below 1"
    if wsd and optimizer.lr_wsd_decay_steps is None:
        yield (
            "optimizer.lr_decay_style = WSD needs optimizer.lr_wsd_decay_steps, how long it"
            " decays; it is null"
        )
    if not wsd and optimizer.lr_wsd_decay_steps is not None:
        yield (
            f"optimizer.lr_wsd_decay_steps = {optimizer.lr_wsd_decay_steps}, but only WSD reads"
            " it; use null"
        )
    stable = optimizer.lr_decay_steps - optimizer.lr_warmup_steps
    if wsd and (optimizer.lr_wsd_decay_steps or 0) > stable:
        yield (
            f"optimizer.lr_wsd_decay_steps = {optimizer.lr_wsd_decay_steps} must be at most the"
            f" optimizer.lr_decay_steps after warm-up = {stable}"
        )


def warmup_ends_before_decay(plan: Plan) -> Problems:
    optimizer = plan.config.optimizer
    if optimizer.lr_warmup_steps >= optimizer.lr_decay_steps:
        yield (
            f"optimizer.lr_warmup_steps = {optimizer.lr_warmup_steps} must be below"
            f" optimizer.lr_decay_steps = {optimizer.lr_decay_steps}"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} must be at most optimizer.lr = {optimizer.lr}"


RULES = [
    query_groups_divide_heads,
    head_size_is_even,
    acknowledged_differences_are_keys,
    overlap_requirements_hold,
    distributed_optimizer_is_adam,
    full_recompute_is_complete,
    full_recompute_fits_every_chunk,
    selective_recompute_names_modules,
    fp8_needs_transformer_engine,
    offload_needs_transformer_engine,
    optimizer_offload_is_consistent,
    fsdp_requirements_hold,
    fsdp_saves_nothing_yet,
    rampup_reaches_the_batch,
    schedule_is_complete,
    warmup_ends_before_decay,
]
