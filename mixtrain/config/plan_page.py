"""The plan as its reader sees it: one page of text, 100 columns. No torch."""

from __future__ import annotations

from itertools import groupby
from textwrap import wrap

from mixtrain.config import lr_schedule
from mixtrain.config.activations import in_flight
from mixtrain.config.choices import DecayStyle
from mixtrain.config.memory import GIB
from mixtrain.config.plan import Plan
from mixtrain.config.transformer_fields import differences

WIDTH = 100  # columns
NAMES = 21  # of them, for what a row is about
DEVICES_GIB = {"80 GB": 79, "141 GB": 139}  # H100 and H200, the two that most plans are for
FORCED = (
    "FORCED BALANCE: experts are chosen at random, for measuring speed; the model learns"
    " nothing of use"
)
MOCK = "MOCK DATA: made-up tokens, for checking a layout or its speed; the losses mean nothing"


def render(plan: Plan) -> str:
    """The plan as lines of `what  value`, with MOCK on top where the data is mock, and then the warnings."""
    rows = [("run", f"{plan.config.name}, seed {plan.config.seed}"), ("  in", plan.config.run_dir)]
    rows += (
        _recipe(plan)
        + _ranks(plan)
        + _batch(plan)
        + _rate(plan)
        + _model(plan)
        + _memory(plan)
        + _defaults(plan)
    )
    lines = [f"{name:<{NAMES}}  {value}" for name, value in rows]
    return "\n".join([*banners(plan), *_warnings(plan), *lines])


def banners(plan: Plan) -> list[str]:
    """What must not be overlooked in the numbers that follow: in the plan, the log and, by their tags, the metrics."""
    return [text for tag, text in (("MOCK", MOCK), ("FORCED", FORCED)) if tag in tags(plan)]


def _warnings(plan: Plan) -> list[str]:
    """`warning: ...` for each, folded at WIDTH between words."""
    fold = {
        "width": WIDTH,
        "subsequent_indent": "  ",
        "break_long_words": False,
        "break_on_hyphens": False,
    }
    return [line for text in plan.warnings for line in wrap(f"warning: {text}", **fold)]


def tags(plan: Plan) -> list[str]:
    return ["MOCK"] * plan.is_mock + ["FORCED"] * plan.is_forced


def changed_mathematics(plan: Plan) -> list[str]:
    """The overrides that make of a named recipe another run: for the log, config.yaml and status.json."""
    return [str(change) for change in plan.changed_mathematics]


def _recipe(plan: Plan) -> list[tuple[str, str]]:
    """What was changed on top of the recipe: first what makes another model of it, then what does not."""
    if plan.recipe is None:
        return []
    rows = [("  changes mathematics", text) for text in changed_mathematics(plan)]
    rows += [("  changes execution", str(change)) for change in plan.changed_execution]
    return [("recipe", plan.recipe + ("" if rows else ", as it stands")), *rows]


def _defaults(plan: Plan) -> list[tuple[str, str]]:
    """Every field of TransformerConfig that is not at Megatron-Core's default, folded into lines."""
    found = differences(plan.config)
    if found is None:
        return [
            ("not at default", "megatron-core is not installed here, so its defaults are not known")
        ]
    lines = wrap(
        "; ".join(found), width=WIDTH - NAMES - 2, break_long_words=False, break_on_hyphens=False
    )
    return [("not at default" if number == 0 else "", line) for number, line in enumerate(lines)]


def _ranks(plan: Plan) -> list[tuple[str, str]]:
    parallel = plan.config.parallel
    trainer = plan.config.trainer
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    etp = parallel.expert_tensor_parallel_size
    ep = parallel.expert_model_parallel_size
    where = (
        f"{trainer.num_nodes} node{'s' * (trainer.num_nodes > 1)} of {trainer.devices}"
        f" ({trainer.accelerator.name})"
    )
    rows = [
        ("ranks", f"{plan.world_size} on {where}"),
        ("  dense grid", f"TP {tp} x CP {cp} x DP {plan.data_parallel_size} x PP {pp}"),
        ("  expert grid", f"ETP {etp} x EP {ep} x EDP {plan.expert_data_parallel_size} x PP {pp}"),
    ]
    return rows + _stages(plan) + [("  experts on ranks", line) for line in _expert_rows(plan)]


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """The ranks of each pipeline stage and what they hold; stages in a row that hold the same are one row."""
    if len(plan.layers) == 1:
        return []
    ranks = plan.world_size // len(plan.layers)
    first = _first_with_layers(plan)
    rows = []
    begin = 0
    for holds, group in groupby(range(len(plan.layers)), lambda stage: _holds(plan, stage, first)):
        end = begin + len(list(group)) - 1
        name = f"  stage {begin}" if begin == end else f"  stages {begin}-{end}"
        spans = f"{_span(begin * ranks, ranks)}" + f" to {_span(end * ranks, ranks)}" * (
            end > begin
        )
        rows.append((name, f"ranks {spans}: {holds}"))
        begin = end + 1
    return rows


def _holds(plan: Plan, stage: int, first: int) -> str:
    counts = plan.layers[stage]
    layers = f"{', '.join(map(str, counts))} layer{'s' * (counts != (1,))}"
    if len(counts) > 1:
        layers = f"chunks of {layers}"
        if len(set(counts)) == 1:
            layers = f"{len(counts)} chunks of {counts[0]} layer{'s' * (counts[0] != 1)}"
    ends = "embedding, " * (stage == 0), ", loss" * (stage == len(plan.layers) - 1)
    return f"{ends[0]}{layers}{ends[1]}" + f"; experts as on stage {first}" * (
        stage != first and sum(counts) > 0
    )


def _first_with_layers(plan: Plan) -> int:
    return next((stage for stage, row in enumerate(plan.layers) if sum(row)), 0)


def _expert_rows(plan: Plan, shown: int = 4) -> list[str]:
    """Which ranks hold the experts of a layer: a row an expert-parallel group of the first stage that has layers.

    Megatron-Core numbers ranks with ETP fastest, then EP, then EDP, then PP.
    """
    parallel = plan.config.parallel
    local = plan.num_local_experts
    group = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    count = plan.expert_data_parallel_size
    begin = _first_with_layers(plan) * plan.world_size // len(plan.layers)
    rows = [f"ranks {_span(begin + part * group, group)}" for part in range(min(count, shown))]
    rows[0] += (
        f": {local} expert{'s' * (local > 1)} of {plan.config.model.num_moe_experts} on each, in"
        " every layer"
    )
    rows[1:] = [row + ": a copy of these" for row in rows[1:]]
    if count > shown:
        rows[-1] += f"; {count - shown} more groups of {group}"
    return rows


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _batch(plan: Plan) -> list[tuple[str, str]]:
    trainer = plan.config.trainer
    data = plan.config.data
    source = ", ".join(data.data_path) if data.data_path else data.kind.name
    return [
        ("data", "MOCK" if plan.is_mock else source),
        (
            "batch",
            f"{trainer.global_batch_size} sequences of {data.seq_length} ="
            f" {plan.tokens_per_step:,} tokens a step",
        ),
        ("  microbatches", f"{plan.num_microbatches} of {trainer.micro_batch_size} on each rank"),
        (
            "steps",
            f"{trainer.max_steps:,} = {plan.samples[0] * data.seq_length:,} tokens{_rampup(plan)}",
        ),
    ]


def _rate(plan: Plan) -> list[tuple[str, str]]:
    """The learning rate at the first step, after warm-up and at the last, and how many steps each phase has."""
    optimizer = plan.config.optimizer
    steps = plan.config.trainer.max_steps
    parts = lr_schedule.phases(plan.config)
    warmup = optimizer.lr_warmup_steps
    end = optimizer.lr_decay_steps
    rates = [f"{lr_schedule.rate(optimizer, 0):.2e} at the first step"]
    if 0 < warmup < steps - 1:
        rates.append(f"{lr_schedule.rate(optimizer, warmup):.2e} after warm-up")
    rates.append(f"{lr_schedule.rate(optimizer, steps - 1):.2e} at the last")
    decays = optimizer.lr_decay_style is not DecayStyle.constant
    elsewhere = f"; decay ends at step {end:,}" * (decays and end > steps > warmup)
    return [
        ("learning rate", ", ".join(rates)),
        (
            "  phases",
            ", ".join(f"{name} {count:,} step{'s' * (count > 1)}" for name, count in parts)
            + elsewhere,
        ),
    ]


def _rampup(plan: Plan) -> str:
    ramp = plan.config.trainer.rampup_batch_size
    return f"; batch from {ramp[0]} by {ramp[1]} over {ramp[2]:,} sequences" if ramp else ""


def _model(plan: Plan) -> list[tuple[str, str]]:
    model = plan.config.model
    router = plan.config.router
    trainer = plan.config.trainer
    recompute = trainer.recompute_granularity.name if trainer.recompute_granularity else "none"
    dense, expert = plan.rank_parameters[plan.heaviest_stage]
    return [
        (
            "model",
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_moe_experts}"
            f" experts (top-{model.moe_router_topk}), FFN {model.moe_ffn_hidden_size}, vocabulary"
            f" {model.vocab_size}",
        ),
        (
            "",
            f"{model.transformer_impl.name}, {trainer.precision.name}, router"
            f" {'+'.join(kind.name for kind in router.moe_router_load_balancing_type)},"
            f" {plan.config.dispatcher.moe_token_dispatcher_type.name}, recompute {recompute}",
        ),
        (
            "parameters",
            f"{plan.total_parameters:,} in all, {plan.active_parameters:,} active per token",
        ),
        ("  on a rank", f"{dense + expert:,} = {dense:,} dense + {expert:,} of experts"),
    ]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    state = plan.state_bytes
    several = len(plan.layers) > 1
    sizes = dict(DEVICES_GIB)
    if plan.config.trainer.device_memory_gib is not None:
        sizes["trainer.device_memory_gib"] = plan.config.trainer.device_memory_gib
    beside = ", ".join(
        f"{state / GIB / size:.0%} of {name}{_given(name, size)}" for name, size in sizes.items()
    )
    stage = f", stage {plan.heaviest_stage}" * several
    fullest = plan.fullest_stage
    passes = len(
        in_flight(len(plan.layers), fullest, len(plan.layers[fullest]), plan.num_microbatches)
    )
    where = f" on stage {fullest}, forward passes in flight: {passes}" * several
    kept = _amount(plan.stage_activation_bytes[fullest])
    return [
        (
            "state on a rank",
            f"{_amount(state)} (weights, gradients, optimizer{stage}; activations come on top)",
        ),
        ("  activations", f"at least {kept}{where}"),
        ("  beside", beside),
        (
            "  optimizer shards",
            f"dense over {plan.dense_shard} ranks, experts over {plan.expert_shard}",
        ),
        ("checkpoints", _checkpoints(plan)),
    ]


def _amount(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _checkpoints(plan: Plan) -> str:
    """How many bytes, how often, how many are kept."""
    settings = plan.config.checkpoint
    if not plan.saves:
        return "none"
    often = [f"every {settings.save_interval:,} steps"] if settings.save_interval else []
    often += ["at the end"] * settings.save_last
    kept = f", {settings.keep_last} kept" if settings.keep_last else ", all kept"
    return (
        f"{_amount(plan.checkpoint_bytes)} each,"
        f" {' and '.join(often)}{kept}{', beside training' * settings.async_save}"
    )


def _given(name: str, size: float) -> str:
    return f" = {size:g}" if "." in name else ""
