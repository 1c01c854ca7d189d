"""Tokenizer directories: training one, and asking one its vocabulary size and end-of-document id.

The rule it keeps: a tokenizer is a Hugging Face directory (tokenizer.json, tokenizer_config.json),
read here as JSON alone, so that a configuration is checked against it before torch or transformers
is imported; and its vocabulary has the size that was asked for, never silently another one (the
embedding is cut by it downstream).
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
# What transformers writes of a tokenizer, and how it generates: text, and nothing that is ever run.
TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json merges.txt
    chat_template.jinja chat_template.json generation_config.json
""".split()
# Mistral's own, which tools/convert_tokenizer.py reads
OWN_FILES = ("tokenizer.model*", "*.model.v*", "tekken*.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# without one of them there is no tokenizer
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}


class Added(TypedDict):
    """A token beside the vocabulary."""

    content: str
    id: Id


class Model(TypedDict):
    # Unigram's: a token's id is its place
    vocab: NotRequired[dict[str, Id] | list[tuple[str, float]]]
    byte_fallback: NotRequired[bool | None]


class TokenizerJson(TypedDict):
    """tokenizer.json, as far as it is read."""

    model: NotRequired[Model]
    added_tokens: NotRequired[list[Added] | None]
    normalizer: NotRequired[Any]
    pre_tokenizer: NotRequired[Any]


def train_bpe(texts: Iterator[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on the texts and save it as a Hugging Face tokenizer directory.

    Id 0 is `<|endoftext|>` and ids 1 to 256 are the bytes, so that every text can be encoded. The
    same texts give the same bytes on disk. Raises UserError where the texts hold too few merges to
    fill the vocabulary.
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
    text = tokenizer.to_str(pretty=True)  # its own save() says of a full disk what nobody can catch
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,  # else transformers 4 decodes to other spaces
        "model_max_length": 1 << 30,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def tokenizer_vocab_size(directory: Path) -> int:
    """The highest token id plus one, added tokens included: the smallest model.vocab_size that can take every id."""
    return max(token_ids(directory).values()) + 1


def tokenizer_eod_id(directory: Path) -> int:
    """The id of the token that ends a document: the tokenizer's eos_token, or UserError where it names none."""
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
    """Whether a text is split before the merges as GPT-2's tokenizer splits it: bytes, its expression, nothing else."""
    path = _tokenizer_json(directory)
    content = untrusted_json.read(path, TokenizerJson, most=LARGE)
    split = content.get("pre_tokenizer") or {}
    asked = {key: split.get(key) for key in ("type", "add_prefix_space", "use_regex")}
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return content.get("normalizer") is None and asked == gpt2


def has_scores(directory: Path) -> bool:
    """Whether the scores of a tokenizer with byte fallback, which tokenizer.json leaves out, lie beside it."""
    content = untrusted_json.read(_tokenizer_json(directory), TokenizerJson, most=LARGE)
    return (
        not content.get("model", {}).get("byte_fallback")
        or (Path(directory) / "tokenizer.model").is_file()
    )


def tokenizer_sha256(directory: Path) -> str:
    """The sha256 of tokenizer.json, which alone decides the ids of a text."""
    return hashlib.sha256(_tokenizer_json(directory).read_bytes()).hexdigest()


def load_tokenizer(directory: Path, parse_special_tokens: bool = False):
    """The `tokenizers.Tokenizer` of the directory, as its tokenizer.json has it, for whole texts.

    The one reader of it: transformers 5 builds some classes anew from the vocabulary and gives
    other ids. Text that spells a special token stays text and ends no document, unless
    `parse_special_tokens`. What is put around a prompt (add_special_tokens) its post_processor
    says: add_bos_token beside it is not read, as in transformers 5. UserError.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_json(directory)
    refuse_code(Path(directory))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # Rust's own
        raise UserError(f"tokenizers cannot read the tokenizer {path}: {error}") from None
    tokenizer.no_truncation()  # a saved max_length would cut documents short without a word
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not parse_special_tokens
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = dict.fromkeys(special_tokens(Path(directory)).values())
    tokenizer.add_special_tokens(
        [
            token
            for token in named
            if token not in added and tokenizer.token_to_id(token) is not None
        ]
    )
    return tokenizer


def special_pattern(tokenizer) -> re.Pattern[str]:
    """What finds the first special token that a text spells."""
    special = sorted(
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    )
    # backwards: of two with the same beginning the longer comes first
    return re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")


def _tokenizer_json(directory: Path) -> Path:
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise UserError(instead(Path(directory)))
    return path


def instead(given: Path) -> str:
    """Why a path is no Hugging Face tokenizer directory, and the command that makes one of what it is."""
    if given.is_file():
        if given.name == "tokenizer.json":
            return f"{given} is a file; give its directory, {given.parent}"
        return (
            f"{given} is a file, and a directory with a tokenizer.json is wanted;"
            f" {_converted(given)}"
        )
    if not given.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)) and not given.parent.is_dir():
            return (
                f"{given}: no such directory; if it is a model of the hub, type: hf download"
                f" {given} --include 'tokenizer*' --local-dir {given.name}  and give {given.name}"
            )
        return f"{given}: no such directory; give a Hugging Face tokenizer directory"
    if own := next((path for name in OWN_FILES for path in sorted(given.glob(name))), None):
        return f"{given}: no tokenizer.json there; {_converted(own)}"
    if (given / "vocab.json").is_file():
        command = (
            "from transformers import AutoTokenizer as T;"
            f" T.from_pretrained('{given}').save_pretrained('{given}')"
        )
        return (
            f"{given}: no tokenizer.json there; transformers makes it of vocab.json: python -c"
            f' "{command}"'
        )
    return f"{given}: no tokenizer.json there; give a Hugging Face tokenizer directory"


def _converted(file: Path) -> str:
    return (
        f"type: python tools/convert_tokenizer.py {shlex.quote(str(file))} OUT_DIR  and give"
        " OUT_DIR"
    )


def token_ids(directory: Path) -> dict[str, int]:
    """Every token and its id: the model's vocabulary (a mapping, or Unigram's list of pairs) and the added tokens."""
    path = _tokenizer_json(directory)
    content = untrusted_json.read(path, TokenizerJson, most=LARGE)
    vocab = content.get("model", {}).get("vocab")
    if isinstance(vocab, list):
        vocab = {pair[0]: index for index, pair in enumerate(vocab)}
    if not vocab:
        raise UserError(f"{path}: no vocabulary under model.vocab")
    return {
        **vocab,
        **{token["content"]: token["id"] for token in content.get("added_tokens") or ()},
    }


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """Name -> where it lies, of the tokenizer files in a directory; {} if no vocabulary is among them.

    UserError if one is no regular file, or a link that leads out of the directory (system/links.py).
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
        raise UserError(
            f"{target} is a link or a file, where the tokenizer is to be copied to; take it away"
        )
    target.mkdir(exist_ok=True)
    for name, path in found.items():
        copy(path, target / name)
    return list(found)


def special_ids(tokenizer: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of a tokenizer, where it has them: what config.json repeats."""
    named = special_tokens(tokenizer)
    ids = token_ids(tokenizer) if (tokenizer / "tokenizer.json").is_file() else {}
    found = {name: named.get(name.removesuffix("_id")) for name in SPECIAL_IDS}
    return {name: ids[token] for name, token in found.items() if token in ids}
