"""Tokenizer directories: training one, and asking one its vocabulary size and end-of-document id.

The rule it keeps: a tokenizer is a Hugging Face directory (tokenizer.json, tokenizer_config.json), read here as JSON
alone, so that a configuration is checked against it before torch or transformers is imported; and its vocabulary
has the size that was asked for, never silently another one (the embedding is cut by it downstream).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from mixtrain import untrusted_json
from mixtrain.errors import UserError
from mixtrain.links import copy, file_in
from mixtrain.untrusted_json import LARGE, whole

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and the end-of-document token
TOKENIZER = "tokenizer"  # the directory beside checkpoints
# What transformers writes of a tokenizer, and how it generates: text, and nothing that is ever run.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json merges.txt
    chat_template.jinja chat_template.json generation_config.json
""".split()
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Id = whole(0, 2**31 - 1)
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}  # without one of them there is no tokenizer


class Added(TypedDict):
    """A token beside the vocabulary."""

    content: str
    id: Id


class Model(TypedDict):
    vocab: NotRequired[dict[str, Id] | list[tuple[str, float]]]  # Unigram's: a token's id is its place


class TokenizerJson(TypedDict):
    """tokenizer.json, as far as it is read."""

    model: NotRequired[Model]
    added_tokens: NotRequired[list[Added] | None]


class Written(TypedDict):
    """A token as older versions of transformers write it."""

    content: str


Special = NotRequired[str | Written | None]


class Settings(TypedDict):
    """tokenizer_config.json and special_tokens_map.json, as far as they are read."""

    bos_token: Special
    eos_token: Special
    pad_token: Special


def train_bpe(texts: Iterator[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on the texts and save it as a Hugging Face tokenizer directory.

    Id 0 is `<|endoftext|>` and ids 1 to 256 are the bytes, so that every text can be encoded. The same texts give the
    same bytes on disk. Raises UserError where the texts hold too few merges to fill the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"vocabulary size {vocab_size} is too small for a byte-level tokenizer, "
            f"which has 256 bytes and {END_OF_DOCUMENT}; the smallest is {SMALLEST_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise UserError(
            f"the text is too small for a vocabulary of {vocab_size} tokens: it holds only {reached}; "
            f"ask for at most {reached} or add text"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=True)  # its own save() says of a full disk what nobody can catch
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,  # else transformers 4 decodes to other spaces
        "model_max_length": 1 << 30,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tokenizer_vocab_size(directory: Path) -> int:
    """The highest token id plus one, added tokens included: the smallest model.vocab_size that can take every id."""
    return max(token_ids(directory).values()) + 1


def tokenizer_eod_id(directory: Path) -> int:
    """The id of the token that ends a document: the tokenizer's eos_token, or UserError where it names none."""
    directory = Path(directory)
    ids = token_ids(directory)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        token = _text(_settings(path).get("eos_token")) if path.is_file() else None
        if token is not None:
            if token not in ids:
                raise UserError(f"{path}: eos_token {token!r} is not in the vocabulary of {directory}/tokenizer.json")
            return ids[token]
    raise UserError(f"{directory}: tokenizer_config.json names no eos_token, and a document must end with one")


def tokenizer_sha256(directory: Path) -> str:
    """The sha256 of tokenizer.json, which alone decides the ids of a text."""
    return hashlib.sha256(_tokenizer_json(directory).read_bytes()).hexdigest()


def load_tokenizer(directory: Path):
    """The `tokenizers.Tokenizer` of the directory, set to encode whole documents and nothing but their text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_tokenizer_json(directory)))
    tokenizer.no_truncation()  # a saved max_length would cut documents short without a word
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells a special token stays text: it ends no document
    return tokenizer


def _tokenizer_json(directory: Path) -> Path:
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory}: no tokenizer.json there; give a Hugging Face tokenizer directory")
    return path


def _settings(path: Path) -> Settings:
    return untrusted_json.read(path, Settings, most=LARGE)


def _text(token: str | Written | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def token_ids(directory: Path) -> dict[str, int]:
    """Every token and its id: the model's vocabulary (a mapping, or Unigram's list of pairs) and the added tokens."""
    path = _tokenizer_json(directory)
    content = untrusted_json.read(path, TokenizerJson, most=LARGE)
    vocab = content.get("model", {}).get("vocab")
    if isinstance(vocab, list):
        vocab = {pair[0]: index for index, pair in enumerate(vocab)}
    if not vocab:
        raise UserError(f"{path}: no vocabulary under model.vocab")
    return {**vocab, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Name -> where it lies, of the tokenizer files in a directory; {} if no vocabulary is among them.

    UserError if one is no regular file, or a link that leads out of the directory (links.py).
    """
    found = {name: path for name in TOKENIZER_FILES if (path := file_in(Path(directory), name))}
    return found if found.keys() & VOCABULARIES else {}


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files that are in `source` to the directory `target`; their names. None is looked into.

    UserError as of tokenizer_files, or if `target` is no directory of its own: nothing is written through a link.
    """
    found = tokenizer_files(source)
    if not found or (target.is_dir() and target.samefile(source)):
        return list(found)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is a link or a file, where the tokenizer is to be copied to; take it away")
    target.mkdir(exist_ok=True)
    for name, path in found.items():
        copy(path, target / name)
    return list(found)


def special_ids(tokenizer: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of a tokenizer, where it has them: what config.json repeats."""
    path = tokenizer / "tokenizer_config.json"
    values = _settings(path) if path.is_file() else {}
    ids, found = token_ids(tokenizer) if (tokenizer / "tokenizer.json").is_file() else {}, {}
    for name in SPECIAL_IDS:
        token = _text(values.get(name.removesuffix("_id")))
        if token in ids:
            found[name] = ids[token]
    return found
