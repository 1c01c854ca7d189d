"""Compute the layers of each pipeline stage: even, uneven, or from a layout string. No torch.

Rule: the numbers equal Megatron-Core's get_num_layers_to_build; where it would refuse, `problems`
returns the reason.
"""

from __future__ import annotations

import re

from mixtrain.config.schema import ParallelConfig

Stages = tuple[tuple[int, ...], ...]  # [stage][chunk]: decoder layers
SIZES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
FLAGS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def stages(parallel: ParallelConfig, num_layers: int) -> Stages:
    """Return the decoder layers of each chunk, rounded down where a rule refuses the split."""
    if parallel.pipeline_model_parallel_layout:
        return _from_layout(parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    per_stage = _per_stage(parallel, num_layers)
    counts = [[layers // chunks for _ in range(chunks)] for layers in per_stage]
    counts[0][0] -= parallel.account_for_embedding_in_pipeline_split
    counts[-1][-1] -= parallel.account_for_loss_in_pipeline_split
    return tuple(tuple(row) for row in counts)


def problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    """Return why the layers do not fit the stages; empty if they do."""
    if parallel.pipeline_model_parallel_layout:
        return _layout_problems(parallel, num_layers)
    # the division makes no sense with keys that are refused
    return _uneven_problems(parallel) or _division_problems(parallel, num_layers)


def chunks_of_layout(parallel: ParallelConfig) -> int | None:
    """Return the layout string's chunks per stage; None for one, or without a layout string."""
    if not parallel.pipeline_model_parallel_layout:
        return None
    count = len(segments(parallel.pipeline_model_parallel_layout))
    chunks = count // parallel.pipeline_model_parallel_size
    return chunks if chunks > 1 else None


def segments(layout: str) -> list[str]:
    """Expand a layout string: `Et*2|(t|)*2L` becomes Ett, t, t, L. Commas have no meaning."""
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    return text.split("|")


def fewest_layers(parallel: ParallelConfig) -> int:
    """Return the fewest layers that fill every chunk; two without a pipeline."""
    if parallel.pipeline_model_parallel_layout:
        return "".join(segments(parallel.pipeline_model_parallel_layout)).count("t")
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return 2
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    non_layers = _counted_as_layers(parallel)
    per_chunk = 2 if non_layers else 1  # the chunk with the embedding also keeps a layer
    inner = pp - (first is not None) - (last is not None)
    return (first or 0) + (last or 0) + inner * vpp * per_chunk - non_layers


def _counted_as_layers(parallel: ParallelConfig) -> int:
    """Return how many of embedding and output layer count as layers."""
    return (
        parallel.account_for_embedding_in_pipeline_split
        + parallel.account_for_loss_in_pipeline_split
    )


def _per_stage(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """Return the layers of each stage, including an embedding or output layer counted as one."""
    pp = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    total = num_layers + _counted_as_layers(parallel)
    inner = pp - (first is not None) - (last is not None)
    per_stage = max(0, total - (first or 0) - (last or 0)) // inner if inner > 0 else 0
    counts = [per_stage] * pp
    counts[0] = first if first is not None else counts[0]
    counts[-1] = last if last is not None else counts[-1]
    return counts


def _uneven_problems(parallel: ParallelConfig) -> list[str]:
    problems = []
    sizes = [key for key in SIZES if getattr(parallel, key) is not None]
    flags = [key for key in FLAGS if getattr(parallel, key)]
    if sizes and flags:
        problems.append(
            f"parallel.{sizes[0]} and parallel.{flags[0]} cannot be set together; use one kind of"
            " uneven split"
        )
    if (sizes or flags) and parallel.pipeline_model_parallel_size == 1:
        problems.append(
            f"parallel.{(sizes + flags)[0]} needs parallel.pipeline_model_parallel_size of 2 or"
            " more, not 1"
        )
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    for key in sizes:
        if (size := getattr(parallel, key)) % vpp:
            below = size // vpp * vpp
            near = " or ".join(str(number) for number in (below, below + vpp) if number)
            problems.append(
                f"parallel.{key} = {size} must be a multiple of VPP = {vpp}; use {near}"
            )
    return problems


def _division_problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    """Check that the layers without those of fixed stages divide over the other stages' chunks."""
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    fixed = (first or 0) + (last or 0)
    non_layers = _counted_as_layers(parallel)
    left = num_layers + non_layers - fixed
    inner = pp - (first is not None) - (last is not None)
    if inner == 0:
        if left == 0:
            return []
        return [
            f"model.num_layers = {num_layers}, but the first and the last stage, all of PP ="
            f" {pp}, hold {first}+{last} = {fixed}; use {fixed}"
        ]
    chunks = inner * vpp
    if left > 0 and left % chunks == 0:  # 0: the inner stages would have no layer
        return []
    below = max(0, left) // chunks * chunks
    near = {number + num_layers - left for number in (below or chunks, below + chunks)}
    uneven = ""
    if fixed or non_layers:
        uneven = f" ({left} where the first and last stage leave {inner} stages)"
    return [
        f"model.num_layers = {num_layers}{uneven} must be a multiple of PP*VPP = {inner}*{vpp};"
        f" use {' or '.join(str(number) for number in sorted(near) if number > 0)}"
    ]


def _from_layout(parallel: ParallelConfig) -> Stages:
    chunks = segments(parallel.pipeline_model_parallel_layout)
    pp = parallel.pipeline_model_parallel_size
    return tuple(
        tuple(chunk.count("t") for chunk in chunks[stage::pp]) or (0,) for stage in range(pp)
    )


def _layout_problems(parallel: ParallelConfig, num_layers: int) -> list[str]:
    key = "parallel.pipeline_model_parallel_layout"
    text = parallel.pipeline_model_parallel_layout
    chunks = segments(text)
    pp = parallel.pipeline_model_parallel_size
    joined = "".join(chunks)
    single_ends = joined.count("E") == joined.count("L") == 1
    problems = []
    if wrong := sorted(set(joined) - set("EtL")):
        problems.append(
            f'{key} has "{wrong[0]}"; E is the embedding, t a layer, L the loss, | the next stage'
        )
    elif not (joined.startswith("E") and joined.endswith("L") and single_ends):
        problems.append(f"{key} = {text} must begin with its only E and end with its only L")
    if joined.count("t") != num_layers:
        problems.append(f"{key} has {joined.count('t')} layers, model.num_layers = {num_layers}")
    if len(chunks) % pp:
        problems.append(f"{key} has {len(chunks)} segments, which must be a multiple of PP = {pp}")
    vpp = parallel.virtual_pipeline_model_parallel_size
    implied = chunks_of_layout(parallel)
    if vpp is not None and vpp != implied and len(chunks) % pp == 0:
        problems.append(
            f"parallel.virtual_pipeline_model_parallel_size = {vpp}, but the layout has"
            f" {implied or 1}; use null"
        )
    if uneven := [name for name in (*SIZES, *FLAGS) if getattr(parallel, name)]:
        problems.append(f"parallel.{uneven[0]} cannot be set together with {key}")
    return problems
