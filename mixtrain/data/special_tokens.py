"""What lies beside tokenizer.json: which tokens begin and end a text, and the chat template. No torch.

Rule: read as JSON and text alone, in the order in which transformers looks; nothing is run.
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
DEFAULT = "default"  # of several chat templates
Id = integer(0, 2**31 - 1)


class Written(TypedDict):
    """A token as older versions of transformers write it."""

    content: str


class Named(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


Special = NotRequired[str | Written | None]


class Settings(TypedDict):
    """tokenizer_config.json and special_tokens_map.json, as far as they are read."""

    bos_token: Special
    eos_token: Special
    unk_token: Special
    sep_token: Special
    pad_token: Special
    cls_token: Special
    mask_token: Special
    chat_template: NotRequired[str | list[Named] | None]
    auto_map: NotRequired[Any]


class GenerationConfig(TypedDict):
    """generation_config.json, as far as it is read."""

    eos_token_id: NotRequired[Id | list[Id] | None]


def read(path: Path) -> Settings:
    """The settings of a file; none where there is no such file."""
    return untrusted_json.read(path, Settings, most=LARGE) if path.is_file() else {}


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token ... and the text of each that the directory names, tokenizer_config.json first."""
    found: dict[str, str] = {}
    for settings in (read(directory / MAP), read(directory / CONFIG)):
        for name in NAMES:
            if token := settings.get(name):
                found[name] = token["content"] if isinstance(token, dict) else token
    return found


def refuse_code(directory: Path) -> None:
    """UserError if the tokenizer is code of its own: what its ids are, tokenizer.json does not say."""
    if read(directory / CONFIG).get("auto_map"):
        raise UserError(
            f"{directory / CONFIG}: auto_map: cannot read the tokenizer, which wants code of its"
            " own; no code that lies beside a tokenizer is run. If tokenizer.json alone is meant,"
            " take auto_map out"
        )


def chat_template(directory: Path) -> str | None:
    """The chat template: of a file of its own, else of tokenizer_config.json; of several the one named default."""
    path = directory / TEMPLATE
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = read(directory / CONFIG).get("chat_template")
    return (
        {each["name"]: each["template"] for each in found}.get(DEFAULT)
        if isinstance(found, list)
        else found
    )


def ends_of_text(directory: Path) -> list[int]:
    """The tokens that end a text by the generation_config.json of a model, where there is one."""
    path = directory / "generation_config.json"
    ids = untrusted_json.read(path, GenerationConfig).get("eos_token_id") if path.exists() else None
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
