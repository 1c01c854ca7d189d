"""Mistral's own tokenizer files, as mistral-common has them, and Hugging Face directories made of
them.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from mixtrain.data.convert_tokenizer import convert

DATA = Path(find_spec("mistral_common").submodule_search_locations[0], "data")
V1 = DATA / "tokenizer.model.v1"
V2 = DATA / "mistral_instruct_tokenizer_240216.model.v2"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = DATA / "tekken_240911.json"
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{"
    " message.content }} [/INST]{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor"
    " %}"
)


def as_published(folder: Path, file: Path = V1) -> Path:
    """The tokenizer of a file with the settings that the hub's repository of Mixtral has."""
    convert(file, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "chat_template": CHAT}
    path.write_text(json.dumps(settings))
    return folder
