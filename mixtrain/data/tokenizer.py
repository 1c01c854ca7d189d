"""Hugging Face tokenizer directories: trains, reads, loads and copies them.

Rule: vocabulary size and special ids are read from tokenizer.json and tokenizer_config.json as
JSON, so a configuration is checked before torch or transformers is imported. A trained tokenizer
has exactly the requested vocabulary size, since the embedding depends on it.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mixtrain.data.special_tokens import Id, refuse_code, special_tokens
from mixtrain.errors import UserError
from mixtrain.system import untrusted_json
from mixtrain.system.links import copy, file_in
from mixtrain.system.untrusted_json import LARGE

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCAB_SIZE = 257  # the 256 bytes and the end-of-document token
TOKENIZER = "tokenizer"  # the directory beside checkpoints
# Files that transformers writes for a tokenizer and for generation: data only, no code.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model
    vocab.json merges.txt chat_template.jinja chat_template.json generation_config.json
""".split()
# files of Mistral's own formats, which tools/convert_tokenizer.py reads
MISTRAL_FILES = ("tokenizer.model*", "*.model.v*", "tekken*.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# a tokenizer has at least one of these files
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}


class AddedToken(TypedDict):
    """A token outside the model's vocabulary."""

    content: str
    id: Id


class TokenizerModel(TypedDict):
    # Unigram's vocabulary is a list: a token's id is its index
    vocab: NotRequired[dict[str, Id] | list[tuple[str, float]]]
    byte_fallback: NotRequired[bool | None]


class TokenizerJson(TypedDict):
    """The keys of tokenizer.json that are read."""

    model: NotRequired[TokenizerModel]
    added_tokens: NotRequired[list[AddedToken] | None]
    normalizer: NotRequired[Any]
    pre_tokenizer: NotRequired[Any]


def train_bpe(texts: Iterator[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on the texts and save it as a Hugging Face tokenizer directory.

    Id 0 is `<|endoftext|>` and ids 1 to 256 are the bytes, so every text can be encoded. The same
    texts give the same files. Raises UserError if the texts have too few merges to fill the
    vocabulary.
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
            f"the text is too small for a vocabulary of {vocab_size} tokens: it holds only"
            f" {reached}; ask for at most {reached} or add text"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=True)  # save() raises no OSError for a full disk
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,  # True makes transformers 4 change spaces
        "model_max_length": 1 << 30,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def tokenizer_vocab_size(directory: Path) -> int:
    """Return the highest token id plus one, with added tokens: the minimum model.vocab_size."""
    return max(token_ids(directory).values()) + 1


def tokenizer_eod_id(directory: Path) -> int:
    """Return the id of the eos_token, which ends a document. UserError if there is none."""
    ids = token_ids(directory)
    token = special_tokens(Path(directory)).get("eos_token")
    if token is None:
        raise UserError(
            f"{directory}: tokenizer_config.json names no eos_token, and a document must end with"
            " one"
        )
    if token not in ids:
        raise UserError(
            f"{directory}: eos_token {token!r} is not in the vocabulary of its tokenizer.json"
        )
    return ids[token]


def splits_as_gpt2(directory: Path) -> bool:
    """Return whether the tokenizer splits a text before the merges exactly as GPT-2's does."""
    path = _tokenizer_json(directory)
    content = untrusted_json.read(path, TokenizerJson, most=LARGE)
    pre_tokenizer = content.get("pre_tokenizer") or {}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    settings = {key: pre_tokenizer.get(key) for key in gpt2}
    return content.get("normalizer") is None and settings == gpt2


def has_scores(directory: Path) -> bool:
    """Return whether tokenizer.model has the scores that a tokenizer with byte fallback needs.

    tokenizer.json has no scores. True for a tokenizer without byte fallback.
    """
    content = untrusted_json.read(_tokenizer_json(directory), TokenizerJson, most=LARGE)
    if not content.get("model", {}).get("byte_fallback"):
        return True
    return (Path(directory) / "tokenizer.model").is_file()


def tokenizer_sha256(directory: Path) -> str:
    """Return the sha256 of tokenizer.json, which determines the ids of a text."""
    return hashlib.sha256(_tokenizer_json(directory).read_bytes()).hexdigest()


def load_tokenizer(directory: Path, parse_special_tokens: bool = False):
    """Return the `tokenizers.Tokenizer` of a directory's tokenizer.json, without truncation.

    All code loads tokenizers through this function: transformers 5 rebuilds some classes from the
    vocabulary and then gives other ids. Text that spells a special token stays text and ends no
    document, unless `parse_special_tokens`. The post_processor determines the tokens around a
    prompt (add_special_tokens); add_bos_token is not read, as in transformers 5. Raises UserError.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_json(directory)
    refuse_code(Path(directory))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(f"tokenizers cannot read the tokenizer {path}: {error}") from None
    tokenizer.no_truncation()  # a saved max_length would truncate documents silently
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special_tokens
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = dict.fromkeys(special_tokens(Path(directory)).values())
    missing = [token for token in named if token not in added]
    tokenizer.add_special_tokens(
        [token for token in missing if tokenizer.token_to_id(token) is not None]
    )
    return tokenizer


def special_pattern(tokenizer) -> re.Pattern[str]:
    """Return a pattern that finds the first special token spelled in a text."""
    special = sorted(
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    )
    # reversed: of two tokens with a common prefix the longer one must come first
    return re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")


def _tokenizer_json(directory: Path) -> Path:
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(no_tokenizer_message(Path(directory)))
    return path


def no_tokenizer_message(path: Path) -> str:
    """Return why a path is not a Hugging Face tokenizer directory, and how to make one from it."""
    if path.is_file():
        if path.name == "tokenizer.json":
            return f"{path} is a file; give its directory, {path.parent}"
        return (
            f"{path} is a file, and a directory with a tokenizer.json is wanted;"
            f" {_conversion_command(path)}"
        )
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
            return (
                f"{path}: no such directory; if it is a model of the hub, type: hf download"
                f" {path} --include 'tokenizer*' --local-dir {path.name}  and give {path.name}"
            )
        return f"{path}: no such directory; give a Hugging Face tokenizer directory"
    mistral_files = [file for name in MISTRAL_FILES for file in sorted(path.glob(name))]
    if mistral_files:
        return f"{path}: no tokenizer.json there; {_conversion_command(mistral_files[0])}"
    if (path / "vocab.json").is_file():
        command = (
            "from transformers import AutoTokenizer as T;"
            f" T.from_pretrained('{path}').save_pretrained('{path}')"
        )
        return (
            f"{path}: no tokenizer.json there; transformers makes it of vocab.json: python -c"
            f' "{command}"'
        )
    return f"{path}: no tokenizer.json there; give a Hugging Face tokenizer directory"


def _conversion_command(file: Path) -> str:
    return (
        f"type: python tools/convert_tokenizer.py {shlex.quote(str(file))} OUT_DIR  and give"
        " OUT_DIR"
    )


def token_ids(directory: Path) -> dict[str, int]:
    """Return {token: id} of the model's vocabulary (mapping or Unigram list) and added tokens."""
    path = _tokenizer_json(directory)
    content = untrusted_json.read(path, TokenizerJson, most=LARGE)
    vocab = content.get("model", {}).get("vocab")
    if isinstance(vocab, list):
        vocab = {pair[0]: index for index, pair in enumerate(vocab)}
    if not vocab:
        raise UserError(f"{path}: no vocabulary under model.vocab")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return {**vocab, **added}


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Return {name: path} of a directory's tokenizer files; {} if there is no vocabulary.

    Raises UserError if one is not a regular file, or is a link that leads out of the directory
    (system/links.py).
    """
    files = {name: path for name in TOKENIZER_FILES if (path := file_in(Path(directory), name))}
    return files if files.keys() & VOCABULARIES else {}


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer files in `source` to the directory `target`, unread; return their names.

    Raises UserError like tokenizer_files, or if `target` is a file or a link: nothing is written
    through a link.
    """
    files = tokenizer_files(source)
    if not files or (target.is_dir() and target.samefile(source)):
        return list(files)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(
            f"{target} is a link or a file, where the tokenizer is to be copied to; remove it"
        )
    target.mkdir(exist_ok=True)
    for name, path in files.items():
        copy(path, target / name)
    return list(files)


def special_ids(tokenizer: Path) -> dict[str, int]:
    """Return a tokenizer's bos_token_id, eos_token_id and pad_token_id, as far as it has them."""
    named = special_tokens(tokenizer)
    ids = token_ids(tokenizer) if (tokenizer / "tokenizer.json").is_file() else {}
    tokens = {name: named.get(name.removesuffix("_id")) for name in SPECIAL_IDS}
    return {name: ids[token] for name, token in tokens.items() if token in ids}
