"""Read the rotary embedding's base and the sliding window from a config.json. No torch.

Rule: every spelling of transformers 4 and 5 that means the plain embedding and full attention is
accepted; any other meaning is refused by its key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mixtrain.config.key_effects import show

MAX_THETA = 2**53  # a double holds all whole numbers up to this
# Entries that rope_parameters and rope_scaling may have beside rope_theta, with the values that
# mean the plain embedding.
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


def rope_base(values: Mapping[str, Any], name: str, default: float) -> tuple[float, list[str]]:
    """Return (the base, problems), from the key of transformers 5 or the two of transformers 4.

    `name`: the model's name in messages. `default`: the base where config.json has none.
    """
    bases = {}
    problems = []
    if "rope_theta" in values:
        bases["rope_theta"] = values["rope_theta"]
    for key in ("rope_parameters", "rope_scaling"):
        parameters = values.get(key) or {}
        if not isinstance(parameters, Mapping):
            problems.append(f"{key} = {show(parameters)} is not a mapping")
            continue
        if "rope_theta" in parameters:
            bases[f"{key}.rope_theta"] = parameters["rope_theta"]
        problems += _rope_type_problems(key, parameters, name)
    factor = values.get("partial_rotary_factor", 1)
    if factor not in PLAIN["partial_rotary_factor"]:
        problems.append(f"partial_rotary_factor = {show(factor)}: mixtrain's {name} has 1.0")
    for key, theta in bases.items():
        is_number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        if not is_number or not 0 < theta <= MAX_THETA:
            wrong = f"{key} = {show(theta)} is not a number above 0, up to {MAX_THETA:,}"
            return 0.0, [*problems, wrong]
    if values.get("rope_scaling") and "rope_parameters.rope_theta" in bases:
        # transformers reads rope_scaling instead of rope_parameters
        ignored = bases["rope_parameters.rope_theta"]
        used = [base for key, base in bases.items() if key != "rope_parameters.rope_theta"]
        effective = (used or [default])[-1]
        if ignored != effective:
            return 0.0, [
                *problems,
                f"rope_parameters.rope_theta = {ignored}, but transformers reads rope_scaling"
                f" instead of rope_parameters, with rope_theta = {effective}; leave rope_scaling"
                " out",
            ]
    (first_key, theta), *rest = [*bases.items()] or [("", default)]
    problems += [
        f"{first_key} = {theta}, but {key} = {base}" for key, base in rest if base != theta
    ]
    if theta != int(theta):
        problems.append(f"{first_key} = {theta}: model.rotary_base is a whole number")
    return theta, problems


def has_base(values: Mapping[str, Any]) -> bool:
    """Whether a config.json has the base under any of its keys."""
    mappings = [values, values.get("rope_parameters"), values.get("rope_scaling")]
    return any("rope_theta" in part for part in mappings if isinstance(part, Mapping))


def _rope_type_problems(key: str, parameters: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the entries of a mapping that change the plain embedding."""
    for entry, value in parameters.items():
        if entry == "rope_theta" or (entry in PLAIN and value in PLAIN[entry]):
            continue
        if key == "rope_scaling":
            yield f"rope_scaling = {show(parameters)}: mixtrain's {name} has null"
            return
        plain = show(PLAIN[entry][0]) if entry in PLAIN else "none"
        yield f"{key}.{entry} = {show(value)}: mixtrain's {name} has {plain}"


def window_problems(values: Mapping[str, Any], name: str, has_switch: bool) -> list[str]:
    """Return the problems with the sliding window.

    `has_switch`: the window is off unless use_sliding_window is true. A window of at least
    max_position_embeddings has no effect and is accepted.
    """
    switch = values.get("use_sliding_window", False)
    if has_switch and not isinstance(switch, bool):
        return [f"use_sliding_window = {show(switch)} is not true or false"]
    window = values["sliding_window"]
    longest = values["max_position_embeddings"]
    if window is None or (has_switch and not switch):
        return []
    are_numbers = isinstance(window, int) and isinstance(longest, int)
    if are_numbers and not isinstance(window, bool) and window >= longest:
        return []
    return [f"sliding_window = {show(window)}: mixtrain's {name} has null"]
