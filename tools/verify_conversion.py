"""Verify that a Megatron-Core checkpoint computes the same as a Hugging Face model, layer by layer.

    python tools/verify_conversion.py HF_DIR CKPT_DIR
    python tools/verify_conversion.py HF_DIR CKPT_DIR --precision bf16 --manifest manifest.jsonl
    python tools/verify_conversion.py HF_DIR CKPT_DIR --self-test

transformers' model, loaded with from_pretrained, and the Megatron-Core model run on the same random
tokens, with one layer of each in memory at a time. Each side continues from its own hidden states.
After each layer the tool prints the difference of the hidden states and the number of tokens that
went to different experts; at the end it prints the difference of the logits, their cosine and their
Kullback-Leibler divergence. Everything is computed in fp32 unless --precision is given: bf16
weights are exact in fp32, too.

The checkpoint's weights are hashed first, unless --verify size is given: a Hugging Face model made
from a damaged file has the same damage.

--self-test damages what is read from the checkpoint in each of the ways that converters have been
wrong, and fails if the comparison misses one.

Exit codes: 0 the same; 1 not the same (a difference above 1e-4 of a token's largest entry in fp32,
or a cosine of the logits below 0.999), or the self-test missed a damage; 2 the files or the
arguments are wrong; 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

# mixtrain need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mixtrain.cli import positive_int, run  # noqa: E402
from mixtrain.errors import FAULT, FINISHED, UserError  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("hf_dir", type=Path, help="the Hugging Face model")
    add("ckpt_dir", type=Path, help="a checkpoint, or a directory whose newest one is verified")
    add(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the computation (default: fp32)",
    )
    add("--sequences", type=positive_int, default=2, metavar="N", help="(default: 2)")
    add(
        "--length",
        type=positive_int,
        default=128,
        metavar="N",
        help="tokens of each (default: 128)",
    )
    add("--layers", type=positive_int, metavar="N", help="only the first N layers, then the logits")
    add(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="write name, shape, dtype and SHA-256 of every tensor",
    )
    add(
        "--self-test",
        action="store_true",
        help="damage the tensors on purpose; the comparison must detect it",
    )
    add(
        "--verify",
        choices=["full", "size"],
        default="full",
        help="check the checkpoint's files by SHA-256, or by size only (default: full)",
    )
    args = parser.parse_args(argv)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    # these imports take seconds
    from mixtrain.config.choices import Accelerator
    from mixtrain.engine.compat.prepare import prepare

    prepare(Accelerator.cpu)
    from mixtrain.checkpoint.state import state_of
    from mixtrain.checkpoint.tensor_reader import TensorReader
    from mixtrain.interop.convert import checkpoint_config, hf_checkpoint

    checkpoint = checkpoint_config.checkpoint_at(args.ckpt_dir)
    config = checkpoint_config.config_of(checkpoint)
    parts = TensorReader(checkpoint)
    source = hf_checkpoint.read(args.hf_dir)
    for note in source.notes:
        print(note, file=sys.stderr)
    vocab_size = source.compared_vocab_size(state_of(checkpoint), config)
    keys = check_shapes(source, config, parts, vocab_size)
    if args.verify == "full":
        verify_hashes(checkpoint_config.Hashes(checkpoint, parts.files(keys)))
    if args.manifest:
        write_manifest(args.manifest, source.tensors, config, parts, vocab_size)
    with one_rank(config, args.precision) as (config_here, ranks):
        verify = self_test if args.self_test else compare_models
        return verify(args, source, config_here, parts, ranks)


def verify_hashes(hashes) -> None:
    """UserError if a file of the checkpoint is damaged."""
    from mixtrain.interop.convert.workers import run_jobs

    run_jobs("hashing", [], hashes.size, hashes.jobs(os.cpu_count() or 1))


def check_shapes(source, config, parts, vocab_size: int) -> list[str]:
    """Return the keys of the model. UserError if the two sides do not have the same tensors."""
    from mixtrain.interop.convert import (
        checkpoint_config,
        flat_ranges,
        hf_config,
        hf_files,
        weights,
    )

    hf_config.to_hugging_face(config)
    hf_model = checkpoint_config.configuration(source.overrides)
    hf_layout = weights.layout_of(hf_model, source.tensors)
    hf_shapes = flat_ranges.build_index(hf_model, hf_layout).hf_shapes
    weights.check_tensors(hf_shapes, source.tensors, hf_files.NAMES, mixed=True)
    layout = weights.layout_of(config, source.tensors)
    index = flat_ranges.build_index(config, layout, vocab_size)
    weights.check_tensors(index.hf_shapes, source.tensors, hf_files.NAMES, mixed=True)
    for key, shape in index.megatron_shapes.items():
        if parts.shapes.get(key) != shape:
            raise UserError(f"{parts.directory} has no {key} of shape {list(shape)}")
    return list(index.megatron_shapes)


@contextlib.contextmanager
def one_rank(config, precision: str):
    """Yield (the model's Config for one CPU rank, the rank's process groups)."""
    from mixtrain.config.plan import derive
    from mixtrain.engine import process_groups
    from mixtrain.interop.convert.checkpoint_config import for_one_rank
    from mixtrain.system import scratch
    from mixtrain.system.rank_identity import Identity

    config_here = for_one_rank(config, precision)
    with scratch.folder() as folder:
        identity = Identity(0, 1, 0, 1, f"file://{folder}/rendezvous")
        with process_groups.start(derive(config_here), identity) as ranks:
            yield config_here, ranks


def compare_models(args, source, config, parts, ranks) -> int:
    """Print a line for each layer, and the result."""
    from mixtrain.interop.convert.layer_comparison import compare, random_tokens
    from mixtrain.interop.convert.reference_models import HuggingFaceLayers, MegatronLayers

    tokens = random_tokens(source.overrides["model.vocab_size"], args.sequences, args.length)
    num_layers = min(args.layers or config.model.num_layers, config.model.num_layers)
    hugging_face = HuggingFaceLayers(args.hf_dir, dtype_of(args.precision))
    megatron = MegatronLayers(config, parts, ranks)
    print(
        f"{args.hf_dir} and {parts.directory}: {tokens.numel()} tokens, {num_layers} layers,"
        f" {args.precision}"
    )
    print(" layer  hidden states apart  of the largest     cosine  tokens to other experts")
    printed = 0
    for result in compare(hugging_face, megatron, num_layers, tokens):
        for layer in result.layers[printed:]:
            printed += 1
            print(
                f"{layer.number:6}  {layer.largest:19.2e}  {layer.relative:14.2e}"
                f"  {layer.cosine:9.7f}  {layer.rerouted:23}",
                flush=True,
            )
    print(
        f"logits  {result.logits_largest:19.2e}  {result.logits_relative:14.2e}"
        f"  {result.logits_cosine:9.7f}  KL divergence {result.divergence:.2e} nats"
    )
    for problem in result.problems:
        print(f"not the same: {problem}")
    if not result.problems:
        print("the same model")
    return FAULT if result.problems else FINISHED


def self_test(args, source, config, parts, ranks) -> int:
    """Compare with each damage, which must be detected, and without, which must be the same."""
    from mixtrain.interop.convert import layer_comparison
    from mixtrain.interop.convert.reference_models import HuggingFaceLayers, MegatronLayers

    vocab_size = source.overrides["model.vocab_size"]
    tokens = layer_comparison.random_tokens(vocab_size, args.sequences, args.length)
    hugging_face = HuggingFaceLayers(args.hf_dir, dtype_of(args.precision))

    def first_problem(megatron: MegatronLayers) -> str:
        for result in layer_comparison.compare(
            hugging_face, megatron, config.model.num_layers, tokens
        ):
            if result.problems:
                return result.problems[0]
        return ""

    def show(name: str, problem: str) -> None:
        print(f"{name:22} {f'caught: {problem}' if problem else 'the same model'}", flush=True)

    problem = first_problem(MegatronLayers(config, parts, ranks))
    show("nothing", problem)
    if problem:
        print("the undamaged checkpoint is not the same model: there is nothing to test with")
        return FAULT
    caught = 0
    for name in layer_comparison.DAMAGES:
        problem = first_problem(layer_comparison.damaged_megatron(name, config, parts, ranks))
        show(name, problem)
        caught += bool(problem)
    print(f"{caught} of {len(layer_comparison.DAMAGES)} caught")
    return FINISHED if caught == len(layer_comparison.DAMAGES) else FAULT


def write_manifest(path: Path, tensors, config, parts, vocab_size: int) -> None:
    """Write one line of JSON for each tensor."""
    from mixtrain.interop.convert import tensor_manifest
    from mixtrain.interop.convert.workers import progress_bar

    done = 0
    unequal = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    size = sum(stored.nbytes for stored in tensors.values())
    with progress_bar("manifest", size, lambda: done), open(path, "w") as file:
        for entry in tensor_manifest.entries(config, tensors, parts, vocab_size, advance):
            unequal += not entry["equal"]
            file.write(json.dumps(entry) + "\n")
    print(
        f"{path}: {len(tensors)} tensors, {unequal or 'none'} of them not bitwise equal on both"
        " sides"
    )


def dtype_of(precision: str):
    from mixtrain.interop.convert.dtype_cast import DTYPES

    return DTYPES[precision]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
