"""Which layers a pipeline stage holds: even, uneven, or as a layout string says. No torch.

Rule: the same numbers as Megatron-Core's get_num_layers_to_build, or the reason why it would
refuse.
"""

from __future__ import annotations

import re

from mixtrain.config.schema import ParallelConfig

Stages = tuple[tuple[int, ...], ...]  # [stage][chunk]: decoder layers


def stages(parallel: ParallelConfig, num_layers: int) -> Stages:
    """Decoder layers of each chunk of each stage, rounded down where they do not divide (a rule refuses that)."""
    if parallel.pipeline_model_parallel_layout:
        return _from_layout(parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    per_stage = _per_stage(parallel, num_layers)
    counts = [[layers // chunks for _ in range(chunks)] for layers in per_stage]
    counts[0][0] -= parallel.account_for_embedding_in_pipeline_split
    counts[-1][-1] -= parallel.account_for_loss_in_pipeline_split
    return tuple(tuple(row) for row in counts)


def problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    """Why these layers do not go into these stages; empty where they do."""
    if parallel.pipeline_model_parallel_layout:
        return _layout_problems(parallel, num_layers)
    # the second is arithmetic with keys that the first has refused: whatever it said would be
    # nonsense
    return _uneven_problems(parallel) or _even_problems(parallel, num_layers)


def chunks_of_layout(parallel: ParallelConfig) -> int | None:
    """Virtual stages that the layout string implies, or None where it has one segment a stage (or no layout)."""
    if not parallel.pipeline_model_parallel_layout:
        return None
    chunks = (
        len(segments(parallel.pipeline_model_parallel_layout))
        // parallel.pipeline_model_parallel_size
    )
    return chunks if chunks > 1 else None


def segments(layout: str) -> list[str]:
    """The layout string unrolled: `Et*2|(t|)*2L` is Ett, t, t, L. Commas are decoration."""
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda found: found.group(1) * int(found.group(2)), text)
    return text.split("|")


def fewest_layers(parallel: ParallelConfig) -> int:
    """The fewest layers that fill every chunk; two where there is no pipeline."""
    if parallel.pipeline_model_parallel_layout:
        return "".join(segments(parallel.pipeline_model_parallel_layout)).count("t")
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return 2
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    standing_in = (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    each = 2 if standing_in else 1  # a chunk whose place the embedding takes keeps a layer
    between = pp - (first is not None) - (last is not None)
    return (first or 0) + (last or 0) + between * vpp * each - standing_in


def _per_stage(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Layers of each stage, an embedding or loss that takes the place of a layer counted as one."""
    pp = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    total = (
        num_layers
        + parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    between = pp - (first is not None) - (last is not None)
    each = max(0, total - (first or 0) - (last or 0)) // between if between > 0 else 0
    counts = [each] * pp
    counts[0] = first if first is not None else counts[0]
    counts[-1] = last if last is not None else counts[-1]
    return counts


def _uneven_problems(parallel: ParallelConfig) -> list[str]:
    found = []
    sizes = [key for key in SIZES if getattr(parallel, key) is not None]
    flags = [key for key in FLAGS if getattr(parallel, key)]
    if sizes and flags:
        found.append(
            f"parallel.{sizes[0]} and parallel.{flags[0]} cannot be set together; use one kind of"
            " uneven split"
        )
    if (sizes or flags) and parallel.pipeline_model_parallel_size == 1:
        found.append(
            f"parallel.{(sizes + flags)[0]} needs parallel.pipeline_model_parallel_size of 2 or"
            " more, not 1"
        )
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    for key in sizes:
        if (size := getattr(parallel, key)) % vpp:
            below = size // vpp * vpp
            near = " or ".join(str(number) for number in (below, below + vpp) if number)
            found.append(f"parallel.{key} = {size} must be a multiple of VPP = {vpp}; use {near}")
    return found


def _even_problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    """The layers that are left must divide over the stages that are left, and each stage over its chunks."""
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    ends = (first or 0) + (last or 0)
    extra = (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )
    left = num_layers + extra - ends
    between = pp - (first is not None) - (last is not None)
    if between == 0:
        said = (
            f"model.num_layers = {num_layers}, but the first and the last stage, all of PP ="
            f" {pp}, hold"
        )
        return [f"{said} {first}+{last} = {ends}; use {ends}"] if left else []
    parts = between * vpp
    if left > 0 and left % parts == 0:  # no stage between may be left with nothing
        return []
    below = max(0, left) // parts * parts
    near = {number + num_layers - left for number in (below or parts, below + parts)}
    uneven = (
        f" ({left} where the first and last stage leave {between} stages)" if ends or extra else ""
    )
    return [
        f"model.num_layers = {num_layers}{uneven} must be a multiple of PP*VPP = {between}*{vpp};"
        f" use {' or '.join(str(number) for number in sorted(near) if number > 0)}"
    ]


def _from_layout(parallel: ParallelConfig) -> Stages:
    parts = segments(parallel.pipeline_model_parallel_layout)
    pp = parallel.pipeline_model_parallel_size
    return tuple(tuple(part.count("t") for part in parts[stage::pp]) or (0,) for stage in range(pp))


def _layout_problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    key = "parallel.pipeline_model_parallel_layout"
    text = parallel.pipeline_model_parallel_layout
    parts = segments(text)
    pp = parallel.pipeline_model_parallel_size
    joined = "".join(parts)
    found = []
    if wrong := sorted(set(joined) - set("EtL")):
        found.append(
            f'{key} has "{wrong[0]}"; E is the embedding, t a layer, L the loss, | the next stage'
        )
    elif not (
        joined.startswith("E")
        and joined.endswith("L")
        and joined.count("E") == joined.count("L") == 1
    ):
        found.append(f"{key} = {text} must begin with its only E and end with its only L")
    if joined.count("t") != num_layers:
        found.append(f"{key} has {joined.count('t')} layers, model.num_layers = {num_layers}")
    if len(parts) % pp:
        found.append(f"{key} has {len(parts)} segments, which must be a multiple of PP = {pp}")
    vpp = parallel.virtual_pipeline_model_parallel_size
    implied = chunks_of_layout(parallel)
    if vpp is not None and vpp != implied and len(parts) % pp == 0:
        found.append(
            f"parallel.virtual_pipeline_model_parallel_size = {vpp}, but the layout has"
            f" {implied or 1}; use null"
        )
    if others := [name for name in (*SIZES, *FLAGS) if getattr(parallel, name)]:
        found.append(f"parallel.{others[0]} cannot be set together with {key}")
    return found


SIZES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
FLAGS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
