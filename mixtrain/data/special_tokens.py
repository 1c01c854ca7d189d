"""Reads the special tokens and the chat template beside tokenizer.json. No torch.

Rule: reads only JSON and text, in the same order as transformers; runs no code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.untrusted_json import LARGE, integer

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT = "default"  # name of the one to use of several chat templates
Id = integer(0, 2**31 - 1)


class TokenObject(TypedDict):
    """A token in the format of older versions of transformers."""

    content: str


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


Special = NotRequired[str | TokenObject | None]


class TokenizerSettings(TypedDict):
    """The keys of tokenizer_config.json and special_tokens_map.json that are read."""

    bos_token: Special
    eos_token: Special
    unk_token: Special
    sep_token: Special
    pad_token: Special
    cls_token: Special
    mask_token: Special
    chat_template: NotRequired[str | list[NamedTemplate] | None]
    auto_map: NotRequired[Any]


class GenerationConfig(TypedDict):
    """The keys of generation_config.json that are read."""

    eos_token_id: NotRequired[Id | list[Id] | None]


def read_settings(path: Path) -> TokenizerSettings:
    """Return the settings of a file; {} if it does not exist."""
    return untrusted_json.read(path, TokenizerSettings, most=LARGE) if path.is_file() else {}


def special_tokens(directory: Path) -> dict[str, str]:
    """Return {bos_token, eos_token, ...: text}; tokenizer_config.json overrides the map."""
    tokens: dict[str, str] = {}
    for settings in (read_settings(directory / MAP), read_settings(directory / CONFIG)):
        for name in NAMES:
            if token := settings.get(name):
                tokens[name] = token["content"] if isinstance(token, dict) else token
    return tokens


def refuse_code(directory: Path) -> None:
    """Raise UserError if the tokenizer needs its own code: tokenizer.json may give other ids."""
    if read_settings(directory / CONFIG).get("auto_map"):
        raise UserError(
            f"{directory / CONFIG}: auto_map: cannot read the tokenizer, which needs its own code;"
            " no code beside a tokenizer is run. If tokenizer.json is sufficient, remove auto_map"
        )


def chat_template(directory: Path) -> str | None:
    """Return chat_template.jinja, else the template (or "default") of tokenizer_config.json."""
    path = directory / TEMPLATE
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    template = read_settings(directory / CONFIG).get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}.get(DEFAULT)
    return template


def ends_of_text(directory: Path) -> list[int]:
    """Return the eos_token_id(s) of generation_config.json; [] if there is none."""
    path = directory / "generation_config.json"
    ids = untrusted_json.read(path, GenerationConfig).get("eos_token_id") if path.exists() else None
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
