"""The fast CPU implementations compute the same as what they replace, and they are used."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from composing import ROOT, plan_of
from megatron.core.transformer.enums import AttnBackend
from rank_workers import run_ranks

from mixtrain.engine import model, optimizer, process_groups
from mixtrain.engine.compat import gloo
from mixtrain.engine.layers import loss
from mixtrain.engine.layers.attention import CoreAttention
from mixtrain.engine.layers.cpu import onednn_matmul
from mixtrain.engine.layers.cpu.embedding import Lookup
from mixtrain.engine.layers.cpu.experts import ExpertByExpert
from mixtrain.system import host_memory
from mixtrain.training.measured_step import batches

# rows, in, out: above and below onednn_matmul.WORTHWHILE
LARGE = (300, 512, 256)
SMALL = (30, 16, 8)
ONEDNN = "mkldnn::_linear_pointwise"


def kernels(work) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize(
    "turned", [(False, False), (True, False), (False, True), (True, True)], ids=str
)
def test_a_product_is_the_product_whichever_way_its_factors_lie(size, turned):
    torch.manual_seed(0)
    rows, inner, columns = size
    a = torch.randn(inner, rows).t() if turned[0] else torch.randn(rows, inner)
    b = torch.randn(columns, inner).t() if turned[1] else torch.randn(inner, columns)
    exact = a.double() @ b.double()
    assert (onednn_matmul.product(a, b) - exact).abs().max() < 1e-5 * exact.abs().max()
    taken = ONEDNN in kernels(lambda: onednn_matmul.product(a, b))
    assert taken is (size is LARGE and onednn_matmul.by_onednn())


def test_a_product_of_long_sums_in_bf16_is_the_product():
    torch.manual_seed(0)
    a = torch.randn(7, onednn_matmul.LONG, dtype=torch.bfloat16)
    b = torch.randn(onednn_matmul.LONG, 5, dtype=torch.bfloat16)
    found = onednn_matmul.product(a, b)
    exact = a.double() @ b.double()
    assert found.is_contiguous() and found.dtype is torch.bfloat16
    assert (found - exact).abs().max() < 4e-3 * exact.abs().max()
    assert "aten::t" in kernels(lambda: onednn_matmul.product(a, b))
    assert "aten::t" not in kernels(lambda: onednn_matmul.product(a[:, :-1], b[:-1]))


def test_onednn_is_left_out_of_what_it_is_slow_at():
    a = torch.randn(512, 300)
    b = torch.randn(512, 512)
    some_columns = b[:, :256]
    small = (torch.randn(128, 64), torch.randn(64, 128))
    # minutes, where they are long
    assert ONEDNN not in kernels(lambda: onednn_matmul.product(a.t(), some_columns))
    assert ONEDNN not in kernels(lambda: onednn_matmul.product(*small))
    assert (
        ONEDNN in kernels(lambda: onednn_matmul.product(*small, again=True))
    ) is onednn_matmul.by_onednn()


def test_a_linear_layers_gradients_are_pytorchs():
    torch.manual_seed(0)
    x = torch.randn(5, 60, 512, requires_grad=True)
    weight = torch.randn(256, 512, requires_grad=True)
    given = torch.randn(5, 60, 256)
    ours = torch.autograd.grad((onednn_matmul.Linear.apply(x, weight) * given).sum(), (x, weight))
    theirs = torch.autograd.grad((F.linear(x, weight) * given).sum(), (x, weight))
    assert all(
        (a - b).abs().max() < 1e-5 * b.abs().max() for a, b in zip(ours, theirs, strict=True)
    )
    # only what needs a gradient gets one
    assert onednn_matmul.Linear.apply(x.detach(), weight).requires_grad
    onednn_matmul.Linear.apply(x.detach(), weight).sum().backward()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"]
)
def test_token_losses_are_cross_entropy(dtype, tolerance):
    torch.manual_seed(0)
    weight = torch.randn(130, 3, 50, dtype=dtype) * 3  # more tokens than loss.ROWS
    labels = torch.randint(0, 50, (3, 130))
    given = torch.rand(3, 130)
    leaf = weight.clone().requires_grad_()
    ours = loss.token_losses(leaf * 1, labels)
    exact = F.cross_entropy(weight.double().permute(1, 2, 0), labels, reduction="none")
    assert ours.dtype is torch.float32 and (ours - exact).abs().max() < 1e-5
    (ours * given).sum().backward()
    softmax = weight.double().softmax(dim=2)
    softmax[torch.arange(130)[:, None], torch.arange(3), labels.t()] -= 1
    assert (leaf.grad - softmax * given.t()[..., None]).abs().max() < tolerance


def peak_bytes(work) -> int:
    """Return the peak memory that `work` allocates."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = work()  # noqa: F841
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_losses_and_their_gradient_take_a_small_part_of_the_logits_memory(dtype):
    logits = torch.randn(4000, 1, 100, dtype=dtype, requires_grad=True) * 1
    labels = torch.randint(0, 100, (1, 4000))
    given = torch.rand(1, 4000)
    assert peak_bytes(lambda: logits.detach().clone()) >= logits.nbytes

    def forward_and_backward():
        losses = loss.token_losses(logits, labels)
        return losses, torch.autograd.grad(losses, logits, given)

    assert 0 < peak_bytes(forward_and_backward) < logits.nbytes / 4


def test_attention_takes_pytorchs_kernel_where_the_configuration_names_one():
    tensors = [torch.randn(16, 1, 2, 8) for _ in range(3)]
    taken = {}
    for backend in (AttnBackend.auto, AttnBackend.flash, AttnBackend.unfused):
        layer = CoreAttention.__new__(CoreAttention)
        layer.__dict__ |= {
            "config": SimpleNamespace(attention_backend=backend),
            "softmax_scale": None,
        }
        taken[backend] = kernels(lambda: CoreAttention._attend(layer, *tensors))  # noqa: B023
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [flash in taken[backend] for backend in taken] == [False, True, False]
    assert ["BlockAttention" in taken[backend] for backend in taken] == [True, False, False]


def test_a_looked_up_embedding_adds_its_rows_to_the_buffer():
    """A row that two tokens look up is summed; autograd's own tensor is unused without a hook."""
    torch.manual_seed(0)
    tokens = torch.tensor([[3, 1, 3], [0, 4, 4]])
    table = torch.nn.Parameter(torch.randn(6, 5))
    given = torch.randn(2, 3, 5)
    assert torch.equal(Lookup.apply(tokens, table), F.embedding(tokens, table))
    (exact,) = torch.autograd.grad(F.embedding(tokens, table), table, given)
    (alone,) = torch.autograd.grad(Lookup.apply(tokens, table), table, given)
    assert torch.equal(alone, exact)
    table.main_grad = torch.ones(6, 5)
    table.grad_added_to_main_grad = False
    torch.autograd.grad(Lookup.apply(tokens, table), table, given)
    assert (
        table.grad_added_to_main_grad is True and (table.main_grad - 1 - exact).abs().max() < 1e-6
    )
    table.zero_out_wgrad = True  # then Megatron-Core adds what autograd has as well
    (alone,) = torch.autograd.grad(Lookup.apply(tokens, table), table, given)
    assert torch.equal(alone, exact)
    table.zero_out_wgrad = False
    table.register_post_accumulate_grad_hook(lambda _: None)
    (alone,) = torch.autograd.grad(Lookup.apply(tokens, table), table, given)
    assert torch.equal(alone, exact) and (table.main_grad - 1 - exact).abs().max() < 1e-6


def test_experts_add_their_gradient_to_the_buffer_that_megatron_core_reduces():
    """Twice, as in two microbatches; autograd's own tensor is unused without a hook."""
    torch.manual_seed(0)
    tokens = torch.randn(9, 16)
    probs = torch.rand(9)
    counts = [4, 0, 5]
    weights = [
        torch.nn.Parameter(torch.randn(3, 24, 16)),
        torch.nn.Parameter(torch.randn(3, 16, 12)),
    ]
    exact = torch.autograd.grad(
        ExpertByExpert.apply(tokens, probs, *weights, counts).sum(), weights
    )
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight)
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        torch.autograd.grad(ExpertByExpert.apply(tokens, probs, *weights, counts).sum(), weights)
    for weight, gradient in zip(weights, exact, strict=True):
        assert weight.grad_added_to_main_grad is True
        assert (weight.main_grad - 2 * gradient).abs().max() < 1e-5 * gradient.abs().max()
    seen = []
    weights[1].register_hook(seen.append)
    weights[1].grad_added_to_main_grad = False
    torch.autograd.grad(ExpertByExpert.apply(tokens, probs, *weights, counts).sum(), weights)
    assert weights[1].grad_added_to_main_grad is False and torch.equal(seen[0], exact[1])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_buffer_go_from_rank_to_rank_as_gloos_own_collectives_send_them(
    size, tmp_path, monkeypatch
):
    monkeypatch.setattr(gloo, "CHUNK", 3)  # of the 4 numbers of a part

    def same_on_this_rank(identity) -> list[bool]:
        dist.init_process_group(
            "gloo", init_method=identity.rendezvous, rank=identity.rank, world_size=size
        )
        whole = torch.randn(4 * size, generator=torch.Generator().manual_seed(identity.rank))
        ours = torch.empty(4)
        theirs = torch.empty(4)
        gloo.reduce_scatter(ours, whole.clone(), group=dist.group.WORLD)
        dist.reduce_scatter_tensor(theirs, whole.clone())
        in_place = whole.clone()
        # as Megatron-Core's buffers are
        gloo.reduce_scatter(in_place.view(size, -1)[identity.rank], in_place)
        gathered = torch.empty(4 * size)
        expected = torch.empty(4 * size)
        gloo.all_gather(gathered, ours)
        dist.all_gather_into_tensor(expected, theirs)
        there = torch.zeros(size, 4)
        there[identity.rank] = theirs
        gloo.all_gather(there, there[identity.rank], group=dist.group.WORLD)
        dist.barrier()
        pairs = [
            (ours, theirs),
            (in_place.view(size, -1)[identity.rank], theirs),
            (gathered, expected),
        ]
        return [torch.allclose(a, b, atol=1e-6) for a, b in [*pairs, (there.view(-1), expected)]]

    assert all(all(same) for same in run_ranks(size, same_on_this_rank, tmp_path))


STEP = [
    "data=mock",
    "parallel=ep1",
    "checkpoint=none",
    "data.seq_length=64",
    "trainer.micro_batch_size=1",
    "trainer.global_batch_size=4",
    "model.num_layers=2",
    "model.hidden_size=512",
    "model.moe_ffn_hidden_size=512",
    "model.num_attention_heads=8",
    "model.kv_channels=64",
    "model.num_moe_experts=2",
    "model.vocab_size=1024",
    "trainer.timeout_minutes=1",
]


def test_a_step_takes_all_of_it(tmp_path):
    def taken(identity) -> dict[str, list[str]]:
        from mixtrain.training import loop
        from mixtrain.training.signals import StopRequest

        found = {}
        for kind in ("torch", "local"):
            words = [
                f"model.transformer_impl={kind}",
                f"model.moe_grouped_gemm={str(kind == 'torch').lower()}",
            ]
            plan = plan_of(*STEP, *words)
            with process_groups.start(plan, identity) as ranks:
                training = optimizer.build(plan, model.build(plan, ranks.device))
                stream = batches(plan)
                step = partial(loop.train_step, plan, ranks, training, [stream], StopRequest())
                seen = kernels(partial(step, 1, 4))
            found[kind] = sorted(seen)
            (tmp_path / "0" / "rendezvous").unlink(missing_ok=True)
        return found

    (found,) = run_ranks(1, taken, tmp_path / "0")
    ours = {
        "BlockAttention",
        "CpuNorm",
        "ExpertByExpert",
        "LinearBackward",
        "LookupBackward",
        "TokenLosses",
    }
    wanted = ours | {"aten::_fused_adamw_"}
    wanted |= {ONEDNN} if onednn_matmul.by_onednn() else set()
    assert wanted <= set(found["torch"])
    slower = {
        "aten::_grouped_mm",
        "aten::embedding_dense_backward",
        "aten::scaled_dot_product_attention",
    }
    assert not (slower | {"c10d::_reduce_scatter_base_", "_VocabParallelCrossEntropy"}) & set(
        found["torch"]
    )
    # Megatron-Core's own layers stay as they are, to be compared with
    assert not ours & set(found["local"])
    assert "_VocabParallelCrossEntropy" in found["local"]


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no huge pages")
def test_a_rank_keeps_the_memory_it_has_freed_and_asks_for_large_pages():
    """Check what the kernel is asked for: free large pages depend on other processes."""
    code = """
import re, torch
def mapping(tensor):
    here = 0
    for line in open("/proc/self/smaps"):
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(each, 16) for each in bounds.groups())
            here = start <= tensor.data_ptr() + (50 << 20) < end
        elif here and line.startswith("VmFlags:"):
            return start, "hg" in line.split()
first = torch.ones(25 << 20)
where, large = mapping(first)
del first
print(int(large), sum(int(line.split("-")[0], 16) == where for line in open("/proc/self/maps")))
"""
    found = {}
    for how, added in (("ours", host_memory.SETTINGS), ("glibc's own", {})):
        alone = {
            name: value for name, value in os.environ.items() if name not in host_memory.SETTINGS
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=alone | added, cwd=ROOT, capture_output=True, text=True, check=True
        )
        found[how] = done.stdout.split()
    assert found == {"ours": ["1", "1"], "glibc's own": ["0", "0"]}
