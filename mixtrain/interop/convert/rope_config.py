"""What a config.json says of positions: the rotary embedding's base, and how far back a token looks. No torch.

Rule: every spelling of transformers 4 and 5 that means the plain embedding and the whole past is read; another meaning
is refused by its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixtrain.config.key_effects import show

MOST_THETA = 2**53  # whole numbers in a double
# What a mapping of the rotary embedding may have beside its base, with the values that change
# nothing.
PLAIN = {
    "rope_type": ["default", None],
    "type": ["default", None],
    "partial_rotary_factor": [1, None],
    "factor": [1, None],
}
KEYS = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
)


def rope(values: Mapping[str, Any], name: str, absent: float) -> tuple[float, list[str]]:
    """(the base, what stands against it): of transformers 5's key, or transformers 4's two. `absent`: the default."""
    bases = {}
    wrong = []
    if "rope_theta" in values:
        bases["rope_theta"] = values["rope_theta"]
    for key in ("rope_parameters", "rope_scaling"):
        there = values.get(key) or {}
        if not isinstance(there, Mapping):
            wrong.append(f"{key} = {show(there)} is not a mapping")
            continue
        if "rope_theta" in there:
            bases[f"{key}.rope_theta"] = there["rope_theta"]
        wrong += _more_than_plain(key, there, name)
    if values.get("partial_rotary_factor", 1) not in PLAIN["partial_rotary_factor"]:
        wrong.append(
            f"partial_rotary_factor = {show(values['partial_rotary_factor'])}: mixtrain's {name}"
            " has 1.0"
        )
    for key, theta in bases.items():
        if (
            isinstance(theta, bool)
            or not isinstance(theta, (int, float))
            or not 0 < theta <= MOST_THETA
        ):
            return 0.0, [
                *wrong,
                f"{key} = {show(theta)} is not a number above 0, up to {MOST_THETA:,}",
            ]
    if values.get("rope_scaling") and "rope_parameters.rope_theta" in bases:
        others = [theta for key, theta in bases.items() if key != "rope_parameters.rope_theta"]
        there = bases["rope_parameters.rope_theta"]
        instead = (others or [absent])[-1]
        if there != instead:
            return 0.0, [
                *wrong,
                f"rope_parameters.rope_theta = {there}, but rope_scaling takes the place of"
                f" rope_parameters in transformers, with rope_theta = {instead}; leave"
                " rope_scaling out",
            ]
    (first, theta), *others = [*bases.items()] or [("", absent)]
    wrong += [f"{first} = {theta}, but {key} = {other}" for key, other in others if other != theta]
    if theta != int(theta):
        wrong.append(f"{first} = {theta}: model.rotary_base is a whole number")
    return theta, wrong


def has_base(values: Mapping[str, Any]) -> bool:
    """Whether a config.json names the base at all."""
    there = [values, *(values.get(key) for key in ("rope_parameters", "rope_scaling"))]
    return any("rope_theta" in part for part in there if isinstance(part, Mapping))


def _more_than_plain(key: str, there: Mapping[str, Any], name: str) -> Iterator[str]:
    """What of a mapping is not the plain embedding."""
    for part, value in there.items():
        if part == "rope_theta" or (part in PLAIN and value in PLAIN[part]):
            continue
        if key == "rope_scaling":
            yield f"rope_scaling = {show(there)}: mixtrain's {name} has null"
            return
        yield (
            f"{key}.{part} = {show(value)}: mixtrain's {name} has"
            f" {show(PLAIN.get(part, ['none'])[0])}"
        )


def window(values: Mapping[str, Any], name: str, switched: bool) -> list[str]:
    """What is wrong with a sliding window. `switched`: it counts where use_sliding_window is true alone.

    A window that is no shorter than the longest sequence hides nothing.
    """
    switch = values.get("use_sliding_window", False)
    if switched and not isinstance(switch, bool):
        return [f"use_sliding_window = {show(switch)} is not true or false"]
    size = values["sliding_window"]
    longest = values["max_position_embeddings"]
    if size is None or (switched and not switch):
        return []
    if (
        isinstance(size, int)
        and not isinstance(size, bool)
        and isinstance(longest, int)
        and size >= longest
    ):
        return []
    return [f"sliding_window = {show(size)}: mixtrain's {name} has null"]
