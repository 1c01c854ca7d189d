"""One file per model family of Hugging Face: tensors, config.json, published models. No torch.

A family's file defines FAMILY. To add one, add its file and an option of conf/model.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from mixtrain.config.families.family import Family
from mixtrain.config.schema import Config

MODULES = [name for _, name, _ in pkgutil.iter_modules(__path__) if name != "family"]
# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (import_module(f"{__name__}.{name}").FAMILY for name in MODULES)
}


def family_of(config: Config) -> Family:
    """Return the family that has the tensors of a Config, or differs in the fewest keys."""
    return min(FAMILIES.values(), key=lambda family: len(family.unmet(config, family.features)))
