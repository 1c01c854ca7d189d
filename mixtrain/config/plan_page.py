"""Render a plan as one page of text, 100 columns wide. No torch."""

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
NAME_WIDTH = 21  # columns of a row's name
DEVICES_GIB = {"80 GB": 79, "141 GB": 139}  # H100 and H200
FORCED = (
    "FORCED BALANCE: experts are chosen at random, for measuring speed; the model learns"
    " nothing of use"
)
MOCK = "MOCK DATA: made-up tokens, for checking a layout or its speed; the losses mean nothing"


def render(plan: Plan) -> str:
    """Return the page: MOCK and FORCED banners, warnings, then rows of `name  value`."""
    rows = [("run", f"{plan.config.name}, seed {plan.config.seed}"), ("  in", plan.config.run_dir)]
    for section in (_recipe, _ranks, _batch, _rate, _model, _memory, _defaults):
        rows += section(plan)
    lines = [f"{name:<{NAME_WIDTH}}  {value}" for name, value in rows]
    return "\n".join([*banners(plan), *_warnings(plan), *lines])


def banners(plan: Plan) -> list[str]:
    """Return the banners for the plan and the log; the metrics have the tags."""
    return [text for tag, text in (("MOCK", MOCK), ("FORCED", FORCED)) if tag in tags(plan)]


def _warnings(plan: Plan) -> list[str]:
    """Return each warning as `warning: ...`, folded between words at WIDTH."""
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
    """Return the changes of the recipe's mathematics, for the log, config.yaml and status.json."""
    return [str(change) for change in plan.changed_mathematics]


def _recipe(plan: Plan) -> list[tuple[str, str]]:
    """Return the recipe and the changes to it: mathematics first, then execution."""
    if plan.recipe is None:
        return []
    rows = [("  changes mathematics", text) for text in changed_mathematics(plan)]
    rows += [("  changes execution", str(change)) for change in plan.changed_execution]
    return [("recipe", plan.recipe + ("" if rows else ", unchanged")), *rows]


def _defaults(plan: Plan) -> list[tuple[str, str]]:
    """Return the fields of TransformerConfig that are not at Megatron-Core's default, folded."""
    fields = differences(plan.config)
    if fields is None:
        return [
            ("not at default", "megatron-core is not installed here, so its defaults are not known")
        ]
    width = WIDTH - NAME_WIDTH - 2
    lines = wrap("; ".join(fields), width, break_long_words=False, break_on_hyphens=False)
    return [("not at default" if number == 0 else "", line) for number, line in enumerate(lines)]


def _ranks(plan: Plan) -> list[tuple[str, str]]:
    layout = plan.layout
    trainer = plan.config.trainer
    where = (
        f"{trainer.num_nodes} node{'s' * (trainer.num_nodes > 1)} of {trainer.devices}"
        f" ({trainer.accelerator.name})"
    )
    rows = [
        ("ranks", f"{plan.world_size} on {where}"),
        ("  dense grid", f"TP {layout.tp} x CP {layout.cp} x DP {layout.dp} x PP {layout.pp}"),
        ("  expert grid", f"ETP {layout.etp} x EP {layout.ep} x EDP {layout.edp} x PP {layout.pp}"),
    ]
    return rows + _stages(plan) + [("  experts on ranks", line) for line in _expert_rows(plan)]


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """Return the ranks and layers of each pipeline stage; equal neighbours share a row."""
    if len(plan.layers) == 1:
        return []
    ranks = plan.world_size // len(plan.layers)
    first = _first_with_layers(plan)
    rows = []
    begin = 0
    stages = range(len(plan.layers))
    for content, group in groupby(stages, lambda stage: _content(plan, stage, first)):
        end = begin + len(list(group)) - 1
        name = f"  stage {begin}"
        spans = _span(begin * ranks, ranks)
        if end > begin:
            name = f"  stages {begin}-{end}"
            spans += f" to {_span(end * ranks, ranks)}"
        rows.append((name, f"ranks {spans}: {content}"))
        begin = end + 1
    return rows


def _content(plan: Plan, stage: int, first: int) -> str:
    """Return the layers of a stage; `first` is the first stage with layers."""
    counts = plan.layers[stage]
    layers = f"{', '.join(map(str, counts))} layer{'s' * (counts != (1,))}"
    if len(counts) > 1:
        layers = f"chunks of {layers}"
        if len(set(counts)) == 1:
            layers = f"{len(counts)} chunks of {counts[0]} layer{'s' * (counts[0] != 1)}"
    if stage == 0:
        layers = f"embedding, {layers}"
    if stage == len(plan.layers) - 1:
        layers += ", loss"
    if stage != first and sum(counts) > 0:
        layers += f"; experts as on stage {first}"
    return layers


def _first_with_layers(plan: Plan) -> int:
    return next((stage for stage, chunks in enumerate(plan.layers) if sum(chunks)), 0)


def _expert_rows(plan: Plan, shown: int = 4) -> list[str]:
    """Return a row per expert-parallel group of the first stage with layers, at most `shown`.

    Megatron-Core numbers ranks with ETP fastest, then EP, then EDP, then PP.
    """
    local = plan.num_local_experts
    group = plan.layout.ep * plan.layout.etp
    count = plan.layout.edp
    begin = _first_with_layers(plan) * plan.world_size // len(plan.layers)
    rows = [f"ranks {_span(begin + number * group, group)}" for number in range(min(count, shown))]
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
    """Return the learning rate at the first step, after warm-up and at the last; the phases."""
    optimizer = plan.config.optimizer
    steps = plan.config.trainer.max_steps
    phases = ", ".join(
        f"{name} {count:,} step{'s' * (count > 1)}"
        for name, count in lr_schedule.phases(plan.config)
    )
    warmup = optimizer.lr_warmup_steps
    end = optimizer.lr_decay_steps
    rates = [f"{lr_schedule.rate(optimizer, 0):.2e} at the first step"]
    if 0 < warmup < steps - 1:
        rates.append(f"{lr_schedule.rate(optimizer, warmup):.2e} after warm-up")
    rates.append(f"{lr_schedule.rate(optimizer, steps - 1):.2e} at the last")
    decays = optimizer.lr_decay_style is not DecayStyle.constant
    if decays and end > steps > warmup:
        phases += f"; decay ends at step {end:,}"
    return [("learning rate", ", ".join(rates)), ("  phases", phases)]


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
            "  experts",
            f"{model.num_layers * model.num_moe_experts:,} experts ({model.num_layers} layers x"
            f" {model.num_moe_experts})",
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
    shares = ", ".join(
        f"{state / GIB / size:.0%} of {name}{_given(name, size)}" for name, size in sizes.items()
    )
    stage = f", stage {plan.heaviest_stage}" * several
    fullest = plan.fullest_stage
    chunks = len(plan.layers[fullest])
    passes = len(in_flight(len(plan.layers), fullest, chunks, plan.num_microbatches))
    where = f" on stage {fullest}, forward passes in flight: {passes}" * several
    activations = _amount(plan.stage_activation_bytes[fullest])
    return [
        (
            "state on a rank",
            f"{_amount(state)} (weights, gradients, optimizer{stage}; activations come on top)",
        ),
        ("  activations", f"at least {activations}{where}"),
        ("  beside", shares),
        (
            "  optimizer shards",
            f"dense over {plan.dense_shard} ranks, experts over {plan.expert_shard}",
        ),
        ("checkpoints", _checkpoints(plan)),
    ]


def _amount(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _checkpoints(plan: Plan) -> str:
    """Return the size, the interval and the number of checkpoints kept."""
    settings = plan.config.checkpoint
    if not plan.saves:
        return "none"
    times = [f"every {settings.save_interval:,} steps"] if settings.save_interval else []
    times += ["at the end"] * settings.save_last
    kept = f", {settings.keep_last} kept" if settings.keep_last else ", all kept"
    background = ", beside training" * settings.async_save
    return f"{_amount(plan.checkpoint_bytes)} each, {' and '.join(times)}{kept}{background}"


def _given(name: str, size: float) -> str:
    return f" = {size:g}" if "." in name else ""
