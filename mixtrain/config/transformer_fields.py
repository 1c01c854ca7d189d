"""Convert a Config to fields of Megatron-Core's TransformerConfig, and list changed ones. No torch.

Rule: a key sets the field of the same name; this file has only the exceptions. The defaults come
from the installed source, without an import and without a copy of them.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from functools import cache
from pathlib import Path

from mixtrain.config.choices import Precision
from mixtrain.config.key_effects import show
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import plain

SOURCES = ("model_parallel_config.py", "transformer/transformer_config.py")
CLASSES = ("ModelParallelConfig", "TransformerConfig")
# sections with keys that are fields of TransformerConfig
SECTIONS = ("model", "parallel", "router", "dispatcher", "trainer")
UNKNOWN = object()  # a computed default
TYPES = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}
# names of defaults in the source -> their names in transformer_fields
NAMED = {"float32": "fp32"}

# Mixtral's architecture at every size, and fusions switched off that need optional packages
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
    # otherwise parts of the model use CUDA instead of the meta device
    "use_cpu_initialization": True,
    "perform_initialization": False,  # engine/weight_init.py draws the weights
}


def transformer_fields(config: Config, extra: bool = True) -> dict[str, object]:
    """Return all fields that a Config sets; functions and dtypes by name (silu, bf16).

    extra: include model.extra.
    """
    # without Megatron-Core every key counts as a field; nothing is built from the result
    known = transformer_config_defaults()
    values = {
        name: plain(value)
        for section in SECTIONS
        for name, value in vars(getattr(config, section)).items()
        if (known is None or name in known) and name != "transformer_impl"
    }
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        if len(values[name]) == 1:
            values[name] = values[name][0]  # a list may not have sinkhorn or none
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
        # 0.16 and 0.19: on two stages of the interleaved schedule, batched messages silently mix up
        # activations
        values["batch_p2p_comm"] = False
    return values | ARCHITECTURE | (config.model.extra if extra else {})


def transformer_config_defaults() -> dict[str, object] | None:
    """Return {field: default} from the source of TransformerConfig; None if it is not installed."""
    lines = _source()
    return None if lines is None else {name: _default(line.value) for name, line in lines.items()}


@cache
def _source() -> dict[str, ast.AnnAssign] | None:
    """Return {field: its assignment in the installed source}."""
    spec = importlib.util.find_spec("megatron")
    if not spec:
        return None
    root = Path(next(iter(spec.submodule_search_locations))) / "core"
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


def wrong_type(name: str, value: object) -> str | None:
    """Return the type that a field needs if the value does not have it, as a noun phrase, or None.

    Without Megatron-Core it is None.
    """
    lines = _source()
    if lines is None or has_type(value, lines[name].annotation):
        return None
    return _describe(lines[name].annotation)


def has_type(value: object, annotation: ast.expr) -> bool:
    """Return whether a YAML value has a type such as Optional[Union[int, List[int]]]."""
    name, arguments = _name_and_arguments(annotation)
    match name:
        case "Optional":
            return value is None or has_type(value, arguments[0])
        case "Union":
            return any(has_type(value, member) for member in arguments)
        case "Literal":
            return any((type(value), value) == (type(a.value), a.value) for a in arguments)
        case "list" | "List":
            return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
        case "Tuple":
            if not isinstance(value, list) or len(value) != len(arguments):
                return False
            return all(map(has_type, value, arguments))
        case "float":
            return type(value) in (int, float) and math.isfinite(value)
    return name in TYPES and type(value) is TYPES[name][0]


def _describe(annotation: ast.expr) -> str:
    name, arguments = _name_and_arguments(annotation)
    match name:
        case "Optional":
            return f"{_describe(arguments[0])} or null"
        case "Union":
            return " or ".join(dict.fromkeys(filter(None, map(_describe, arguments))))
        case "Literal":
            return "one of " + ", ".join(str(argument.value) for argument in arguments)
        case "list" | "List":
            return f"a list, each {_describe(arguments[0])}"
        case "Tuple":
            return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    return TYPES[name][1] if name in TYPES else ""


def _name_and_arguments(annotation: ast.expr) -> tuple[str, list[ast.expr]]:
    """Split an annotation into the name of the type and the arguments in brackets."""
    if not isinstance(annotation, ast.Subscript):
        return getattr(annotation, "id", ""), []
    inner = annotation.slice
    arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    return getattr(annotation.value, "id", ""), arguments


def _default(node: ast.expr | None) -> object:
    """Return a literal, the last part of a name, the `default` of a field(...), or UNKNOWN."""
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
    """Return `field = value (default: ...)` of each changed field; None without Megatron-Core."""
    defaults = transformer_config_defaults()
    if defaults is None:
        return None
    return [
        f"{name} = {show(value)} (default: {'computed' if default is UNKNOWN else show(default)})"
        for name, value in transformer_fields(config).items()
        if (default := defaults.get(name, UNKNOWN)) != value
    ]
