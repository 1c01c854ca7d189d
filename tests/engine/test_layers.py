"""The layers on PyTorch alone, each compared with its formula."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from rank_workers import run_ranks  # its import makes Megatron-Core run on the CPU

from mixtrain.engine.layers import attention, context, experts, norm
from mixtrain.engine.layers.cpu import attention as cpu_attention
from mixtrain.engine.layers.cpu.attention import BlockAttention
from mixtrain.engine.layers.experts import Experts

# a few roundings of the type, at entries of size 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Group:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ALONE = SimpleNamespace(ep=Group(), expt_tp=Group(), expt_dp=Group(), cp=Group())


def config_of(**values):
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "moe_ffn_hidden_size": 48,
    }
    return TransformerConfig(**given | {"num_moe_experts": 4, "moe_grouped_gemm": True} | values)


def leaf(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_norm_is_the_formula(dtype):
    config = config_of(params_dtype=dtype, layernorm_epsilon=1e-3)
    made = norm.RMSNorm(config, 32, eps=1e-3)
    torch.nn.init.normal_(made.weight)
    x = leaf(5, 2, 32, dtype=dtype)
    exact = (
        x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * made.weight.double()
    )
    assert (made(x).double() - exact).abs().max() < TOLERANCE[dtype]
    assert made.weight.dtype is made(x).dtype is dtype
    given = torch.randn(5, 2, 32, dtype=dtype)
    ours = torch.autograd.grad(made(x), (x, made.weight), given)
    theirs = torch.autograd.grad(exact, (x, made.weight), given.double())
    assert all(
        (a - b).abs().max() < TOLERANCE[dtype] * b.abs().max()
        for a, b in zip(ours, theirs, strict=True)
    )


def test_the_norm_is_marked_where_the_sequence_is_split():
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    assert norm.RMSNorm(config, 8).weight.sequence_parallel is True
    assert norm.RMSNorm(config_of(), 8).weight.sequence_parallel is False


def exact_attention(query, key, value, scale: float) -> torch.Tensor:
    """Queries [s, b, h, d] at the last positions, keys [t, b, g, d]; the whole score matrix."""
    query, key, value = (tensor.double().permute(1, 2, 0, 3) for tensor in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    rows = query.shape[2]
    columns = key.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
    return (scores.softmax(dim=-1) @ value).permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    "backend", [AttnBackend.auto, AttnBackend.flash, AttnBackend.unfused], ids=lambda b: b.name
)
@pytest.mark.parametrize("path", ["cpu", "gpu"])
@pytest.mark.parametrize("groups", [8, 2, 1])
def test_attention_is_the_formula(groups, path, backend, monkeypatch):
    monkeypatch.setattr(attention.CoreAttention, "_is_cpu", staticmethod(lambda _: path == "cpu"))
    made = attention.CoreAttention(config_of(attention_backend=backend), pg_collection=ALONE)
    query = leaf(17, 2, 8, 16)
    key = leaf(17, 2, groups, 16)
    value = leaf(17, 2, groups, 16)
    got = made(query, key, value, None)
    exact = exact_attention(query, key, value, scale=16**-0.5).flatten(2)
    assert got.shape == (17, 2, 8 * 16) and (got - exact).abs().max() < 1e-5
    ours = torch.autograd.grad(got.sum(), (query, key, value))
    theirs = torch.autograd.grad(exact.sum(), (query, key, value))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", [8, 512], ids=["many blocks", "one block"])
@pytest.mark.parametrize(
    "queries, keys, heads, groups", [(21, 21, 4, 2), (21, 21, 3, 3), (6, 20, 4, 1)], ids=str
)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_attention_by_blocks_is_the_formula(
    rows, queries, keys, heads, groups, dtype, tolerance, monkeypatch
):
    """Also for queries at the last positions, as in context parallelism."""
    monkeypatch.setattr(cpu_attention, "ROWS", rows)
    query = leaf(queries, 2, heads, 8, dtype=dtype)
    given = torch.randn(queries, 2, heads, 8, dtype=dtype)
    key, value = (leaf(keys, 2, groups, 8, dtype=dtype) for _ in range(2))
    ours = BlockAttention.apply(query, key, value, 0.3)
    exact = exact_attention(query, key, value, 0.3)
    found = torch.autograd.grad(ours, (query, key, value), given)
    expected = torch.autograd.grad(exact, (query, key, value), given.double())
    assert ours.dtype is dtype
    for one, other in [(ours, exact), *zip(found, expected, strict=True)]:
        assert (one - other).abs().max() < tolerance * other.abs().max()


def test_attention_takes_a_scale_of_its_own():
    made = attention.CoreAttention(config_of(), softmax_scale=0.5, pg_collection=ALONE)
    query = leaf(4, 1, 2, 8)
    key = leaf(4, 1, 2, 8)
    value = leaf(4, 1, 2, 8)
    assert (
        made(query, key, value) - exact_attention(query, key, value, 0.5).flatten(2)
    ).abs().max() < 1e-5


def test_a_kernel_that_is_not_there_is_an_error_and_not_another_kernel():
    made = attention.CoreAttention(
        config_of(attention_backend=AttnBackend.fused), pg_collection=ALONE
    )
    with pytest.raises(RuntimeError, match="No available kernel|No viable backend"):
        made(*(leaf(4, 1, 2, 8) for _ in range(3)))


def kernels(work) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key for event in profile.key_averages()}


def test_keys_and_values_are_not_copied_for_the_queries_that_share_them(monkeypatch):
    """On the GPU's code path."""
    monkeypatch.setattr(attention.CoreAttention, "_is_cpu", staticmethod(lambda _: False))
    made = attention.CoreAttention(config_of(), pg_collection=ALONE)
    query = leaf(64, 1, 8, 16)
    key = leaf(64, 1, 2, 16)
    value = leaf(64, 1, 2, 16)
    seen = kernels(lambda: made(query, key, value).sum().backward())
    assert any("flash_attention" in name for name in seen)
    assert not any(
        word in name for name in seen for word in ("repeat", "expand_copy", "softmax", "tril")
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_chunk_of_a_sequence_is_on_one_rank_and_costs_are_even(size):
    held = [context.chunks_of(rank, size) for rank in range(size)]
    assert sorted(chunk for chunks in held for chunk in chunks) == list(range(2 * size))
    # a chunk attends to as many chunks as stand before it
    assert {sum(chunks) for chunks in held} == {2 * size - 1}
    sequence = torch.arange(16)[None]
    parts = [context.local_part(sequence, rank, size) for rank in range(size)]
    assert parts[0][0, : 16 // size].tolist()[0] == 0 and torch.cat(
        parts, dim=1
    ).sort().values.equal(sequence)


@pytest.mark.parametrize("size, path", [(2, "cpu"), (4, "cpu"), (2, "gpu")])
def test_attention_over_context_ranks_is_attention_over_the_sequence(
    size, path, tmp_path, monkeypatch
):
    monkeypatch.setattr(attention.CoreAttention, "_is_cpu", staticmethod(lambda _: path == "cpu"))

    def part_of_the_whole(identity) -> float:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=identity.rendezvous,
            rank=identity.rank,
            world_size=identity.world_size,
        )
        torch.manual_seed(1)
        query = leaf(32, 2, 4, 8)
        key = leaf(32, 2, 2, 8)
        value = leaf(32, 2, 2, 8)
        mine = [
            context.local_part(tensor.transpose(0, 1), identity.rank, size)
            for tensor in (query, key, value)
        ]
        mine = [tensor.transpose(0, 1).detach().requires_grad_() for tensor in mine]
        made = attention.CoreAttention(
            config_of(), pg_collection=SimpleNamespace(cp=dist.group.WORLD)
        )
        got = made(*mine)
        weight = torch.randn(32, 2, 32)
        exact = exact_attention(query, key, value, 8**-0.5).flatten(2)
        here = context.local_part(weight.transpose(0, 1), identity.rank, size).transpose(0, 1)
        ours = torch.autograd.grad((got * here).sum(), mine)
        theirs = torch.autograd.grad((exact * weight).sum(), (query, key, value))
        pairs = [(got, exact), *zip(ours, theirs, strict=True)]
        return max(
            (a - context.local_part(b.transpose(0, 1), identity.rank, size).transpose(0, 1))
            .abs()
            .max()
            .item()
            for a, b in pairs
        )

    assert max(run_ranks(size, part_of_the_whole, tmp_path)) < 1e-5


COUNTS = {
    "even": [6, 6, 6, 6],
    "uneven": [1, 0, 20, 3],
    "one": [0, 0, 0, 24],
    "nothing": [0, 0, 0, 0],
}


def expert_by_expert(experts: Experts, tokens, counts, probs) -> torch.Tensor:
    """The formula, one expert and token at a time, in fp64."""
    rows = []
    start = 0
    for number, count in enumerate(counts):
        gate, up = experts.weight1[number].double().chunk(2)
        for token, prob in zip(
            tokens[start : start + count], probs[start : start + count], strict=True
        ):
            hidden = F.silu(gate @ token.double()) * (up @ token.double()) * prob.double()
            rows.append(experts.weight2[number].double() @ hidden)
        start += count
    return torch.stack(rows) if rows else tokens.double()[:0] * experts.weight2.double().sum()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("how", ["expert by expert", "grouped_mm", "loop"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts_are_the_formula_whoever_gets_the_tokens(counts, how, dtype, monkeypatch):
    monkeypatch.setattr(Experts, "_is_cpu", staticmethod(lambda _: how != "grouped_mm"))
    made = Experts(
        4, config_of(moe_grouped_gemm=how != "loop", params_dtype=dtype), pg_collection=ALONE
    )
    for weight in (made.weight1, made.weight2):
        torch.nn.init.normal_(weight, std=0.3)
    tokens = leaf(sum(counts), 32, dtype=dtype)
    probs = torch.rand(sum(counts), requires_grad=True)
    got, bias = made(tokens, torch.tensor(counts), probs)
    exact = expert_by_expert(made, tokens, counts, probs)
    assert bias is None and got.dtype is dtype and got.shape == (sum(counts), 32)
    leaves = [made.weight1, made.weight2, tokens, probs]
    ours = torch.autograd.grad(got.float().sum(), leaves)  # the gradient of a sum has stride 0
    theirs = torch.autograd.grad(exact.sum(), leaves, allow_unused=True)
    for a, b in [(got, exact), *zip(ours, theirs, strict=True)]:
        b = torch.zeros_like(a) if b is None else b
        assert torch.isfinite(a).all()
        if a.numel():
            assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * max(1, b.abs().max())


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    made = Experts(4, config_of(), pg_collection=ALONE)
    torch.nn.init.normal_(made.weight1), torch.nn.init.normal_(made.weight2)
    made(leaf(4, 32), torch.tensor([4, 0, 0, 0]), torch.ones(4))[0].sum().backward()
    assert made.weight1.grad[1:].abs().max() == 0 and made.weight1.grad[0].abs().min() > 0


def test_recomputing_the_activation_gives_the_same_to_the_last_bit(monkeypatch):
    """With grouped_mm, the GPU's path: expert by expert the activation is always recomputed."""
    monkeypatch.setattr(Experts, "_is_cpu", staticmethod(lambda _: False))
    results = []
    for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}):
        torch.manual_seed(2)
        made = Experts(4, config_of(**recompute), pg_collection=ALONE)
        torch.nn.init.normal_(made.weight1), torch.nn.init.normal_(made.weight2)
        tokens = leaf(10, 32)
        output, _ = made(tokens, torch.tensor([3, 0, 5, 2]), torch.rand(10))
        output.sum().backward()
        results.append([output, tokens.grad, made.weight1.grad, made.weight2.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "modules, passes", [(None, 1), (["moe_act"], 2), (["core_attn"], 1)], ids=str
)
def test_the_activation_is_computed_twice_where_it_is_named_and_only_there(
    modules, passes, monkeypatch
):
    calls = []
    own = experts._swiglu
    monkeypatch.setattr(experts, "_swiglu", lambda *given: calls.append(1) or own(*given))
    selective = (
        {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    )
    monkeypatch.setattr(Experts, "_is_cpu", staticmethod(lambda _: False))
    made = Experts(4, config_of(**selective), pg_collection=ALONE)
    torch.nn.init.normal_(made.weight1), torch.nn.init.normal_(made.weight2)
    made(leaf(10, 32), torch.tensor([3, 0, 5, 2]), torch.rand(10))[0].sum().backward()
    assert len(calls) == passes


@pytest.mark.parametrize("how", ["expert by expert", "grouped_mm", "loop"])
def test_the_routers_gradient_of_bf16_tokens_is_added_up_in_fp32(how, monkeypatch):
    """40 (1 + 3/128) needs ten bits; a bf16 number has eight."""
    monkeypatch.setattr(Experts, "_is_cpu", staticmethod(lambda _: how != "grouped_mm"))
    made = Experts(
        4,
        config_of(moe_grouped_gemm=how != "loop", params_dtype=torch.bfloat16),
        pg_collection=ALONE,
    )
    with torch.no_grad():
        made.weight1.zero_(), made.weight2.zero_()
        made.weight1[:, :48, 0] = 40  # the gate: silu(40) = 40
        made.weight1[:, 48:52, 0] = torch.tensor([1, 1 / 128, 1 / 128, 1 / 128])
        made.weight2[:, range(32), range(32)] = 1
    tokens = torch.zeros(4, 32, dtype=torch.bfloat16)
    probs = torch.ones(4, requires_grad=True)
    tokens[:, 0] = 1
    made(tokens, torch.tensor([1, 1, 1, 1]), probs)[0].float().sum().backward()
    assert probs.grad.dtype is torch.float32 and probs.grad.tolist() == [40.9375] * 4


def test_weights_are_marked_as_megatron_reduces_and_counts_them():
    """Experts are reduced like dense weights only where the same ranks share them."""
    for expert_ranks, tensor_ranks, dense in ((1, 1, True), (2, 1, False), (1, 2, False)):
        config = SimpleNamespace(
            **vars(config_of())
            | {
                "expert_model_parallel_size": expert_ranks,
                "tensor_model_parallel_size": tensor_ranks,
            }
        )
        made = Experts(4, config, pg_collection=ALONE)
        for weight, axis in ((made.weight1, 1), (made.weight2, 2)):
            assert weight.allreduce is dense
            assert (
                weight.tensor_model_parallel,
                weight.partition_dim,
                weight.partition_stride,
            ) == (True, axis, 1)
