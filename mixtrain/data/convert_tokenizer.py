"""Converts Mistral's tokenizer files (sentencepiece, tekken.json) to Hugging Face directories.

Rule: on every text of tokenizer_test_texts.py the converted tokenizer gives the same ids as the
file's own library; otherwise the conversion is refused.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mixtrain.data.tokenizer_test_texts import tokenizer_test_texts
from mixtrain.errors import Fault, UserError
from mixtrain.system import partial, untrusted_json
from mixtrain.system.untrusted_json import LARGE, Count

SPACE = "\u2581"  # sentencepiece's character for a space
# sentencepiece's piece types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2  # sentencepiece's model_type
WRITTEN = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
SHOWN = 60  # characters shown of a text that the two tokenizers encode differently


class TekkenSettings(TypedDict):
    pattern: str
    default_vocab_size: Count
    default_num_special_tokens: Count


class TekkenToken(TypedDict):
    rank: Count
    token_bytes: str  # base64


class Tekken(TypedDict):
    """The keys of tekken.json that are read."""

    config: TekkenSettings
    vocab: list[TekkenToken]


def convert(file: Path, out_dir: Path) -> int:
    """Write the tokenizer of a file to a new directory and return its number of tokens.

    Raises UserError, or Fault for a write error; then no directory is left.
    """
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; give a sentencepiece model (tokenizer.model) or a tekken.json"
        )
    if out_dir.exists():
        raise UserError(f"{out_dir} is there already; give a new directory")
    read = from_tekken if file.suffix == ".json" else from_sentencepiece
    tokenizer, special, reference = read(file)
    if bos := special.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            [bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    _check_same_ids(file, tokenizer, reference)
    settings = {
        # not LlamaTokenizer: transformers 5 would rebuild it from the vocabulary
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": "bos_token" in special,  # for transformers 4
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    writing = out_dir.with_name(out_dir.name + ".writing")
    new_directories = partial.make(writing)
    with partial.claim(writing, "conversion"):
        partial.clear(writing, WRITTEN)
        try:
            tokenizer.save(str(writing / "tokenizer.json"))
            if read is from_sentencepiece:
                # llama.cpp reads the scores, which tokenizer.json does not have
                shutil.copyfile(file, writing / "tokenizer.model")
            (writing / "tokenizer_config.json").write_text(
                json.dumps(settings, indent=2) + "\n", encoding="utf-8"
            )
            writing.chmod(0o755)
            writing.rename(out_dir)
        except OSError as error:
            raise Fault(partial.failure_message(out_dir, writing, error)) from None
        finally:
            partial.remove(new_directories or [writing])
    return tokenizer.get_vocab_size()


def _check_same_ids(
    file: Path, tokenizer: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    tokenizer.encode_special_tokens = True
    for text in tokenizer_test_texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = reference(text)
        if ids != expected:
            raise UserError(
                f"{file} cannot be converted exactly: {text[:SHOWN]!r} would be {ids[:8]} ...,"
                f" and its own library gives {expected[:8]} ...; nothing was written"
            )
    tokenizer.encode_special_tokens = False


# sentencepiece


def from_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, str], Callable[[str], list[int]]]:
    """Return (tokenizer, {name: special token}, sentencepiece's own encode) of a model file."""
    sentencepiece = _library("sentencepiece", "sentencepiece", file)
    layout = _library("sentencepiece.sentencepiece_model_pb2", "sentencepiece protobuf", file)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError, TypeError):
        raise UserError(f"{file} is not a sentencepiece model, or it is damaged") from None
    model = layout.ModelProto.FromString(processor.serialized_model_proto())
    if problems := list(_unsupported_settings(model)):
        raise UserError(
            f"{file}: {', '.join(problems)}; only a byte-pair model with byte fallback and plain"
            " spaces, like Mistral's and Llama's, can be converted exactly"
        )
    pieces = [piece.piece for piece in model.pieces]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)}, list(_merges(model.pieces)),
            unk_token=pieces[processor.unk_id()], fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [
        piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False, special=True) for piece in special]
    )
    return tokenizer, _special_tokens_of(processor, pieces), processor.encode


def _unsupported_settings(model: Any) -> Iterator[str]:
    trainer = model.trainer_spec
    normalizer = model.normalizer_spec
    if trainer.model_type != BPE:
        yield "its model_type is not BPE"
    if not trainer.byte_fallback:
        yield "byte_fallback is false"
    if normalizer.precompiled_charsmap:
        yield f"its normalizer is {normalizer.name}, not identity"
    if not normalizer.add_dummy_prefix or trainer.treat_whitespace_as_suffix:
        yield "it puts no space before a text"
    if normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        yield "it removes spaces"
    if any(piece.type == UNUSED for piece in model.pieces):
        yield "it has unused pieces"


def _merges(pieces: Iterable) -> Iterator[tuple[str, str]]:
    """Return every pair of pieces that forms another piece, in sentencepiece's merge order.

    The order is that of the merged pieces' scores. Runs of spaces all have the same score; the
    position in the vocabulary, which is also the published order, decides between them.
    """
    numbers = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == NORMAL}
    merges = []
    for piece, number in numbers.items():
        for cut in range(1, len(piece)):
            left = numbers.get(piece[:cut])
            right = numbers.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-pieces[number].score, number, left, right))
    return ((pieces[left].piece, pieces[right].piece) for *_, left, right in sorted(merges))


def _special_tokens_of(processor: Any, pieces: list[str]) -> dict[str, str]:
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
    }
    return {name: pieces[number] for name, number in ids.items() if number >= 0}


# tekken.json


def from_tekken(file: Path) -> tuple[Tokenizer, dict[str, str], Callable[[str], list[int]]]:
    """Return what from_sentencepiece returns, of a tekken.json: byte pairs merged by rank.

    A pattern splits the text before the merges.
    """
    content = untrusted_json.read(file, Tekken, most=LARGE)
    tekken = _library("mistral_common.tokens.tokenizers.tekken", "mistral-common", file)
    try:
        reference = tekken.Tekkenizer.from_file(file)
    except Exception as error:  # AssertionError, ValueError, KeyError, ...
        raise UserError(
            f"{file}: mistral-common cannot read it ({type(error).__name__}: {error})"
        ) from None
    special = content["config"]["default_num_special_tokens"]
    names = [reference.id_to_piece(number) for number in range(special)]
    ranks = _ranks(content, content["config"]["default_vocab_size"] - special)
    vocab = {name: number for number, name in enumerate(names)}
    vocab |= {_as_characters(token): special + rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, _merges_by_rank(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(content["config"]["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names]
    )
    special_tokens = {"bos_token": names[reference.bos_id], "eos_token": names[reference.eos_id]}
    return tokenizer, special_tokens, lambda text: reference.encode(text, bos=False, eos=False)


def _ranks(content: Tekken, most: int) -> dict[bytes, int]:
    tokens = content["vocab"][:most]
    return {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}


def _merges_by_rank(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            right = ranks.get(token[cut:])
            if left is not None and right is not None:
                pair = _as_characters(token[:cut]), _as_characters(token[cut:])
                merges.append((rank, left, right, *pair))
    return [(left, right) for *_, left, right in sorted(merges)]


def _byte_characters() -> list[str]:
    """Return GPT-2's character for each byte: printable bytes as they are, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


CHARACTER = _byte_characters()


def _as_characters(token: bytes) -> str:
    return "".join(CHARACTER[byte] for byte in token)


def _library(module: str, package: str, file: Path) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{file}: {package} is needed to convert it ({error}); type: pip install {package}"
        ) from None
