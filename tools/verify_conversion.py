"""Prove that a Megatron-Core checkpoint is the model of Hugging Face's files: both compute the
same, layer by layer.

    python tools/verify_conversion.py HF_DIR CKPT_DIR
    python tools/verify_conversion.py HF_DIR CKPT_DIR --precision bf16 --manifest manifest.jsonl
    python tools/verify_conversion.py HF_DIR CKPT_DIR --self-test

transformers' own model, loaded by its own from_pretrained, and the Megatron-Core model run over the
same random tokens, one layer of each in memory at a time. Each goes on from its own hidden states.
For each layer: how far the hidden states are apart, and for how many tokens other experts were
chosen; at the end the same of the logits, their cosine and Kullback-Leibler divergence. All is
computed in fp32 unless told otherwise: bf16 weights are fp32 numbers too.

The files that hold the checkpoint's weights are hashed first, unless --verify size says otherwise:
a model that was made of a damaged file has the same damage.

--self-test damages what is read from the checkpoint, in each of the ways that converters have been
wrong, and wants every one to be caught.

Exit codes: 0 the same, 1 not (beyond 1e-4 of a token's largest entry in fp32; a cosine of the
logits below 0.999), or a damage was not caught; 2 the files or the arguments are wrong; 130
interrupted.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# run from a checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import counted, run  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, UserError  # noqa: E402


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_dir", type=Path, help="the model of Hugging Face")
    parser.add_argument(
        "ckpt_dir", type=Path, help="a checkpoint, or a directory of which to take the newest"
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="to compute in (default: fp32)",
    )
    parser.add_argument("--sequences", type=counted, default=2, metavar="N", help="(default: 2)")
    parser.add_argument(
        "--length", type=counted, default=128, metavar="N", help="tokens of each (default: 128)"
    )
    parser.add_argument(
        "--layers", type=counted, metavar="N", help="only the first N layers, and then the logits"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="name, shape, dtype and SHA-256 of every tensor",
    )
    parser.add_argument(
        "--self-test", action="store_true", help="damage the tensors on purpose, and be caught"
    )
    parser.add_argument(
        "--verify",
        choices=["full", "size"],
        default="full",
        help="the checkpoint's files by their SHA-256, or by their sizes alone (default: full)",
    )
    given = parser.parse_args(words)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    from mixtrain.engine.compat import cpu, megatron_fixes  # takes seconds, as all that follows

    megatron_fixes.apply()
    cpu.apply()
    from mixtrain.checkpoint.tensor_reader import TensorReader
    from mixtrain.interop.convert import source, source_config

    checkpoint = source_config.checkpoint_at(given.ckpt_dir)
    config = source_config.config_of(checkpoint)
    parts = TensorReader(checkpoint)
    found = source.read(given.hf_dir)
    for note in found.notes:
        print(note, file=sys.stderr)
    vocabulary = found.vocabulary(source_config.state_of(checkpoint), config)
    keys = check_tensors(found, config, parts, vocabulary)
    if given.verify == "full":
        hashed(source_config.Hashes(checkpoint, parts.files(keys)))
    if given.manifest:
        write_manifest(given.manifest, found.tensors, config, parts, vocabulary)
    with one_rank(config, given.precision) as (own, here):
        return (self_test if given.self_test else verify)(given, found, own, parts, here)


def hashed(hashes) -> None:
    """UserError if a file of the checkpoint is damaged: what was made of it would have the same
    damage.
    """
    from mixtrain.interop.convert.output import in_processes

    in_processes("hashing", [], hashes.size, hashes.jobs(os.cpu_count() or 1))


def check_tensors(found, config, parts, vocabulary: int) -> list[str]:
    """The keys of the model in the checkpoint. UserError if the two are not of the same tensors."""
    from mixtrain.interop.convert import hf_files, settings, source_config, spans, weights

    settings.to_hugging_face(config)
    own = source_config.configuration(found.facts)
    layout = weights.layout_of(own, found.tensors)
    weights.check(spans.index(own, layout).names, found.tensors, hf_files.NAMES, mixed=True)
    index = spans.index(config, weights.layout_of(config, found.tensors), vocabulary)
    weights.check(index.names, found.tensors, hf_files.NAMES, mixed=True)
    if missing := [key for key, shape in index.shapes.items() if parts.shapes.get(key) != shape]:
        raise UserError(
            f"{parts.directory} has no {missing[0]} of shape {list(index.shapes[missing[0]])}"
        )
    return list(index.shapes)


def one_rank(config, precision: str):
    """A context with (the model's configuration for one CPU rank, the rank)."""
    import contextlib

    from mixtrain.config.plan import derive
    from mixtrain.engine import process_groups
    from mixtrain.interop.convert.source_config import for_one_rank
    from mixtrain.system import scratch
    from mixtrain.system.rank_identity import Identity

    @contextlib.contextmanager
    def started():
        own = for_one_rank(config, precision)
        with scratch.folder() as folder:
            with process_groups.start(
                derive(own), Identity(0, 1, 0, 1, f"file://{folder}/rendezvous")
            ) as here:
                yield own, here

    return started()


def verify(given, found, config, parts, here) -> int:
    """A line for each layer, and the verdict."""
    from mixtrain.interop.convert.proof import compare, random_tokens
    from mixtrain.interop.convert.reference_models import HuggingFace, Megatron

    tokens = random_tokens(found.facts["model.vocab_size"], given.sequences, given.length)
    layers = min(given.layers or config.model.num_layers, config.model.num_layers)
    there = HuggingFace(given.hf_dir, dtype_of(given.precision))
    print(
        f"{given.hf_dir} and {parts.directory}: {tokens.numel()} tokens, {layers} layers,"
        f" {given.precision}"
    )
    print(" layer  hidden states apart  of the largest     cosine  tokens to other experts")
    shown = 0
    for verdict in compare(there, Megatron(config, parts, here), layers, tokens):
        for row in verdict.layers[shown:]:
            shown += 1
            print(
                f"{row.number:6}  {row.largest:19.2e}  {row.relative:14.2e}  {row.cosine:9.7f}"
                f"  {row.others:23}",
                flush=True,
            )
    print(
        f"logits  {verdict.logits_largest:19.2e}  {verdict.logits_relative:14.2e}"
        f"  {verdict.logits_cosine:9.7f}",
        end="",
    )
    print(f"  KL divergence {verdict.divergence:.2e} nats")
    for problem in verdict.problems:
        print(f"not the same: {problem}")
    if not verdict.problems:
        print("the same model")
    return FAULT if verdict.problems else FINISHED


def self_test(given, found, config, parts, here) -> int:
    """Damage one thing after another; each must be caught, and the undamaged model must not."""
    from mixtrain.interop.convert.proof import DAMAGES, compare, damaged, random_tokens
    from mixtrain.interop.convert.reference_models import HuggingFace, Megatron

    tokens = random_tokens(found.facts["model.vocab_size"], given.sequences, given.length)
    there = HuggingFace(given.hf_dir, dtype_of(given.precision))
    caught = 0
    for name in ("nothing", *DAMAGES):
        side = (
            Megatron(config, parts, here)
            if name == "nothing"
            else damaged(name, config, parts, here)
        )
        wrong = next(
            (
                verdict
                for verdict in compare(there, side, config.model.num_layers, tokens)
                if verdict.problems
            ),
            None,
        )
        print(
            f"{name:22} {'caught: ' + wrong.problems[0] if wrong else 'the same model'}", flush=True
        )
        if name == "nothing" and wrong:
            print("the undamaged checkpoint is not the same model: there is nothing to test with")
            return FAULT
        caught += wrong is not None
    print(f"{caught} of {len(DAMAGES)} caught")
    return FINISHED if caught == len(DAMAGES) else FAULT


def write_manifest(path: Path, tensors, config, parts, vocabulary: int) -> None:
    """A line of JSON for each tensor."""
    from mixtrain.interop.convert import manifest
    from mixtrain.interop.convert.output import bar

    done = [0]

    def advance(count: int) -> None:
        done[0] += count

    size = sum(stored.nbytes for stored in tensors.values())
    unequal = 0
    with bar("manifest", size, lambda: done[0]), open(path, "w") as file:
        for entry in manifest.entries(config, tensors, parts, vocabulary, advance):
            unequal += not entry["equal"]
            file.write(json.dumps(entry) + "\n")
    print(
        f"{path}: {len(tensors)} tensors, {unequal or 'none'} of them not bitwise equal on both"
        " sides"
    )


def dtype_of(precision: str):
    from mixtrain.interop.convert.casting import DTYPES

    return DTYPES[precision]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
