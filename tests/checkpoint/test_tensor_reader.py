"""Every element of the model has one place on each side, and any slice of a tensor is read."""

from __future__ import annotations

import math
import os

import pytest
import torch
from checkpoints import tensors_of
from composing import config_of, plan_of
from rank_workers import run_ranks

from mixtrain.checkpoint.save import Saver
from mixtrain.checkpoint.state import RunState
from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config.plan import resolve
from mixtrain.engine import model, optimizer, process_groups
from mixtrain.errors import UserError
from mixtrain.interop.convert import flat_ranges, tensor_mapping
from mixtrain.system.mmap_tensor import map_tensor

SMALL = [
    "data=mock",
    "data.seq_length=32",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "model.moe_ffn_hidden_size=96",
    "model.vocab_size=64",
    "model.num_layers=2",
    "model.num_moe_experts=4",
    "trainer.global_batch_size=8",
    "trainer.timeout_minutes=1",
]


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize(
    "overrides", [[], ["model.qk_layernorm=true"], ["model.num_query_groups=1"]]
)
def test_runs_cover_every_element_of_both_sides_once(overrides, layout):
    index = flat_ranges.build_index(resolve(config_of(*SMALL, *overrides)), layout)
    for key, several in index.by_key.items():
        at = 0
        for run in several:
            assert run.megatron_start == at
            at += run.count
        assert at == math.prod(index.megatron_shapes[key])
    assert index.by_name.keys() == index.hf_shapes.keys()
    for name, several in index.by_name.items():
        at = 0
        for run in several:
            assert run.hf_start == at
            at += run.count
        assert at == math.prod(index.hf_shapes[name])


def test_overlapping_gives_what_a_range_has_of_each_run():
    several = [
        flat_ranges.FlatRange("a", 0, "k", 0, 10),
        flat_ranges.FlatRange("a", 10, "k", 50, 5),
        flat_ranges.FlatRange("a", 15, "k", 20, 5),
    ]
    found = [
        (run.megatron_start, low, high)
        for run, low, high in flat_ranges.overlapping(several, 8, 17, flat_ranges.HF_START)
    ]
    assert found == [(0, 8, 10), (50, 0, 5), (20, 0, 2)]


def test_overlapping_of_every_range_is_what_a_range_has_of_each_run():
    several = [
        flat_ranges.FlatRange("a", 0, "k", 30, 4),
        flat_ranges.FlatRange("a", 4, "k", 0, 1),
        flat_ranges.FlatRange("a", 5, "k", 10, 6),
    ]
    for start in range(12):
        for stop in range(start, 12):
            whole = [
                (run, max(start - run.hf_start, 0), min(stop - run.hf_start, run.count))
                for run in several
            ]
            expected = [(run, low, high) for run, low, high in whole if low < high]
            assert (
                list(flat_ranges.overlapping(several, start, stop, flat_ranges.HF_START))
                == expected
            )


def test_tensors_come_layer_after_layer_and_within_one_as_the_model_uses_them():
    def of_layer(number: int) -> list[str]:
        layer = f"model.layers.{number}"
        moe = f"model.layers.{number}.block_sparse_moe"
        experts = [f"{moe}.experts.{expert}.w{part}" for expert in range(4) for part in (1, 3)]
        experts += [f"{moe}.experts.{expert}.w2" for expert in range(4)]
        attention = [f"{layer}.self_attn.{letter}_proj" for letter in "qkvo"]
        return [
            f"{layer}.input_layernorm",
            *attention,
            f"{layer}.post_attention_layernorm",
            f"{moe}.gate",
            *experts,
        ]

    expected = ["model.embed_tokens", *of_layer(0), *of_layer(1), "model.norm", "lm_head"]
    index = flat_ranges.build_index(resolve(config_of(*SMALL)), "hub")
    assert list(index.hf_shapes) == [f"{name}.weight" for name in expected]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_runs_are_as_few_as_groups_of_heads_allow(groups):
    index = flat_ranges.build_index(
        resolve(config_of(*SMALL, f"model.num_query_groups={groups}")), "hub"
    )
    in_parts = {name for name, several in index.by_name.items() if len(several) > 1}
    cut = {
        name for name in index.hf_shapes if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    }
    assert in_parts == (cut if groups > 1 else set())
    assert {len(index.by_name[name]) for name in cut} == {groups}


def test_a_tensor_of_one_element_is_one_run():
    piece = tensor_mapping.MappedSlice(
        "key", (), (1,), ("name",), "none", tensor_mapping.SplitSizes(1, 1, 1)
    )
    assert list(flat_ranges.flat_ranges(piece, (1,))) == [
        flat_ranges.FlatRange("name", 0, "key", 0, 1)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Saved with TP2, so some tensors are sharded along their last axis."""
    folder = tmp_path_factory.mktemp("tp2")
    plan = plan_of(
        *SMALL,
        "parallel=ep1",
        "parallel.tensor_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=2",
        "parallel.sequence_parallel=true",
        f"run_dir={folder / 'run'}",
        "trainer.devices=2",
    )
    (folder / "run").mkdir()

    def save(identity) -> None:
        with process_groups.start(plan, identity) as ranks:
            training = optimizer.build(plan, model.build(plan, ranks.device))
            Saver(plan, ranks, training, print).save(RunState(step=1))

    run_ranks(2, save, folder / "ranks")
    return folder / "run" / "iter_0000001"


def test_any_range_is_what_pytorchs_own_loader_reads(checkpoint):
    reader = TensorReader(checkpoint)
    wholes = tensors_of(checkpoint)
    assert reader.shapes == {key: tuple(whole.shape) for key, whole in wholes.items()}
    # the last axis is sharded
    assert any(len(chunks) > 1 and chunks[1].offset[-1] > 0 for chunks in reader.chunks.values())
    picked = torch.Generator().manual_seed(0)
    for key, whole in wholes.items():
        flat = whole.flatten()
        for _ in range(8):
            start, stop = sorted(torch.randint(0, len(flat) + 1, (2,), generator=picked).tolist())
            assert torch.equal(reader.flat(key, start, stop), flat[start:stop]), (key, start, stop)
        assert torch.equal(reader.at(key), whole)


def test_a_damaged_file_is_named(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = max(tmp_path.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes(b"x" * data.stat().st_size)
    reader = TensorReader(tmp_path)
    with pytest.raises(UserError, match=f"{data.name} is damaged at byte"):
        for key in reader.shapes:
            reader.at(key)
    os.truncate(data, 10)
    with pytest.raises(UserError, match=f"{data.name}"):
        for key in reader.shapes:
            reader.at(key)


def test_a_window_is_the_bytes_of_the_file(tmp_path):
    numbers = torch.arange(5000, dtype=torch.int16)
    (tmp_path / "f").write_bytes(b"abc" + numbers.numpy().tobytes())
    assert torch.equal(
        map_tensor(tmp_path / "f", 3 + 2 * 2100, (100, 3), torch.int16),
        numbers[2100:2400].view(100, 3),
    )
    assert map_tensor(tmp_path / "f", 3, (0,), torch.int16).numel() == 0
    with pytest.raises(OSError):
        map_tensor(tmp_path / "f", 3 + 2 * 4999, (2,), torch.int16)
