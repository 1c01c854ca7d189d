"""A Config as the fields of Megatron-Core's TransformerConfig, and where they differ from its defaults. No torch.

Rule: a section's key reaches TransformerConfig because it has the same name; only what differs is written out here.
The defaults are read from the installed source, never imported and never copied.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path

from mixtrain.config.choices import Precision
from mixtrain.config.key_effects import show
from mixtrain.config.schema import Config, plain

SOURCES = ("model_parallel_config.py", "transformer/transformer_config.py")
CLASSES = ("ModelParallelConfig", "TransformerConfig")
# whose keys are TransformerConfig's fields
SECTIONS = ("model", "parallel", "router", "dispatcher", "trainer")
UNKNOWN = object()  # a default that is computed
TYPES = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}
# defaults that are a name in the source, where transformer_fields has another for it
NAMED = {"float32": "fp32"}

# What makes a transformer a Mixtral, whatever its sizes; and fusions that need packages
# Megatron-Core can do without.
ARCHITECTURE = {
    "gated_linear_unit": True,
    "activation_func": "silu",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    # else parts of the model ask for CUDA instead of following the meta device
    "use_cpu_initialization": True,
    "perform_initialization": False,  # engine/weight_init.py draws the weights
}


def transformer_fields(config: Config, extra: bool = True) -> dict[str, object]:
    """Every field of TransformerConfig that a Config sets; functions and dtypes by name (silu, bf16).

    Not `extra`: without what model.extra says.
    """
    # without Megatron-Core every key counts as a field: nothing is built of it
    known = transformer_config_defaults()
    own = {
        name: value
        for section in SECTIONS
        for name, value in vars(getattr(config, section)).items()
    }
    values = {
        name: plain(value)
        for name, value in own.items()
        if (known is None or name in known) and name != "transformer_impl"
    }
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        if len(values[name]) == 1:
            values[name] = values[name][0]  # sinkhorn and none are only known as a single value
    # our own router (engine/layers/balanced_router.py), unknown to Megatron-Core
    if values["moe_router_load_balancing_type"] == "balanced":
        values["moe_router_load_balancing_type"] = "none"
    precision = config.trainer.precision
    if precision is Precision.fp8:
        values |= {"fp8": "hybrid"}
    elif known:
        values |= {"fp8_recipe": known["fp8_recipe"]}
    dtype = "fp32" if precision is Precision.fp32 else "bf16"
    values |= {"bf16": dtype == "bf16", "params_dtype": dtype, "pipeline_dtype": dtype}
    values |= {"deterministic_mode": config.trainer.deterministic}
    if config.parallel.virtual_pipeline_model_parallel_size:
        # batched messages silently mix activations up with the interleaved schedule on two stages
        # (0.16 and 0.19)
        values["batch_p2p_comm"] = False
    return values | ARCHITECTURE | (config.model.extra if extra else {})


def transformer_config_defaults() -> dict[str, object] | None:
    """Field -> default of the installed TransformerConfig, read from its source; None if it is not installed."""
    lines = _source()
    return None if lines is None else {name: _value(line.value) for name, line in lines.items()}


@cache
def _source() -> dict[str, ast.AnnAssign] | None:
    """Field -> its line in the installed source."""
    found = importlib.util.find_spec("megatron")
    if not found:
        return None
    root = Path(next(iter(found.submodule_search_locations))) / "core"
    if not root.is_dir():
        return None
    fields: dict[str, ast.AnnAssign] = {}
    for name in SOURCES:
        for node in ast.parse((root / name).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in CLASSES:
                fields |= {
                    line.target.id: line for line in node.body if isinstance(line, ast.AnnAssign)
                }
    return fields


def takes(name: str, value: object) -> str | None:
    """What a field's value must be, in words, where this is none; None where it fits, and without Megatron-Core."""
    lines = _source()
    if lines is None or fits(value, lines[name].annotation):
        return None
    return _words(lines[name].annotation)


def fits(value: object, kind: ast.expr) -> bool:
    """Whether a value as YAML has it is of a type as the source writes it: Optional[Union[int, List[int]]]."""
    name, parts = _parts(kind)
    match name:
        case "Optional":
            return value is None or fits(value, parts[0])
        case "Union":
            return any(fits(value, part) for part in parts)
        case "Literal":
            return any((type(value), value) == (type(part.value), part.value) for part in parts)
        case "list" | "List":
            return isinstance(value, list) and all(fits(part, parts[0]) for part in value)
        case "Tuple":
            whole = isinstance(value, list) and len(value) == len(parts)
            return whole and all(fits(part, kind) for part, kind in zip(value, parts, strict=True))
        case "float":
            return type(value) in (int, float) and math.isfinite(value)
    return name in TYPES and type(value) is TYPES[name][0]


def _words(kind: ast.expr) -> str:
    name, parts = _parts(kind)
    match name:
        case "Optional":
            return f"{_words(parts[0])} or null"
        case "Union":
            return " or ".join(dict.fromkeys(words for part in parts if (words := _words(part))))
        case "Literal":
            return "one of " + ", ".join(str(part.value) for part in parts)
        case "list" | "List":
            return f"a list, each {_words(parts[0])}"
        case "Tuple":
            return f"a list of {len(parts)}, each {_words(parts[0])}"
    return TYPES[name][1] if name in TYPES else ""


def _parts(kind: ast.expr) -> tuple[str, list[ast.expr]]:
    """A type's name and what stands in its brackets."""
    if not isinstance(kind, ast.Subscript):
        return getattr(kind, "id", ""), []
    return getattr(kind.value, "id", ""), kind.slice.elts if isinstance(
        kind.slice, ast.Tuple
    ) else [kind.slice]


def _value(node: ast.expr | None) -> object:
    """A default as it stands in the source: a literal, the last part of a name, or the `default` of a field(...)."""
    if isinstance(node, ast.Call):
        given = [keyword.value for keyword in node.keywords if keyword.arg == "default"]
        node = given[0] if given else None
    if isinstance(node, ast.Attribute):  # torch.float32, F.gelu
        return NAMED.get(node.attr, node.attr)
    try:
        return ast.literal_eval(node) if node is not None else UNKNOWN
    except ValueError:
        return UNKNOWN


def differences(config: Config) -> list[str] | None:
    """`field = value (default: ...)` for every field that is not at its default; None without Megatron-Core."""
    defaults = transformer_config_defaults()
    if defaults is None:
        return None
    return [
        f"{name} = {show(value)} (default: {'computed' if default is UNKNOWN else show(default)})"
        for name, value in transformer_fields(config).items()
        if (default := defaults.get(name, UNKNOWN)) != value
    ]
