"""Megatron-Core on the CPU: patched sites exist, torch is unchanged, upgrades are noticed."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from composing import ROOT
from rank_workers import run_ranks  # its import applies engine/compat/cpu.py

from mixtrain.engine import process_groups
from mixtrain.engine.compat import cpu

INVENTORY = (
    ROOT / "tests" / "cuda_sites.json"
)  # `PYTHONPATH=tests python tests/engine/test_cpu.py` adds the installed version
MODULES = sorted(
    {
        *cpu.NAMESPACES,
        *(module for module, _ in cpu.LITERALS),
        *(row[0] for row in cpu.REPLACEMENTS),
    }
)


def cuda_sites(module_name: str) -> list[str]:
    """The functions of a module that use torch.cuda, .cuda() or a CUDA literal, from its source."""
    source = Path(importlib.import_module(f"megatron.core.{module_name}").__file__)
    code = compile(source.read_text(), str(source), "exec")
    return sorted({name for name, inner in functions(code, "") if mentions_cuda(inner)})


def functions(code: types.CodeType, prefix: str) -> Iterator[tuple[str, types.CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            name = f"{prefix}{inner.co_name}"
            # comprehensions belong to their function, and 3.12 has none
            if "<" not in inner.co_name:
                yield name, inner
            yield from functions(inner, f"{name}." if "<" not in inner.co_name else prefix)


def mentions_cuda(code: types.CodeType) -> bool:
    literals = [
        part
        for constant in code.co_consts
        for part in (constant if isinstance(constant, tuple) else [constant])
    ]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType) and "<" in c.co_name]
    return (
        "cuda" in code.co_names
        or any(map(mentions_cuda, inner))
        or any(
            literal == "cuda" or (isinstance(literal, str) and literal.startswith("torch.cuda."))
            for literal in literals
        )
    )


def test_the_installed_version_says_cuda_where_it_was_looked_at():
    known = json.loads(INVENTORY.read_text())
    installed = version("megatron-core")
    assert installed in known, f"megatron-core {installed}: read its CUDA sites, then run this file"
    for module in MODULES:
        assert cuda_sites(module) == known[installed].get(module, []), module


def test_torch_itself_is_not_patched():
    cpu.apply()
    for function in (
        torch.cuda.current_device,
        torch.cuda.synchronize,
        torch.cuda.get_rng_state,
        torch.cuda.stream,
    ):
        assert function.__module__.startswith("torch.cuda")
    assert torch.cuda.Stream is not cpu._Stream


def test_a_megatron_module_sees_the_cpu_where_it_asks_for_cuda():
    from megatron.core.tensor_parallel import layers

    assert layers.torch.cuda.current_device() == torch.device("cpu")
    assert layers.torch.nn is torch.nn
    assert layers.torch.cuda.OutOfMemoryError is torch.cuda.OutOfMemoryError


@pytest.mark.parametrize(
    "site, answer",
    [
        ("transformer.enums", lambda: cpu._give_namespace("transformer.enums")),
        ("utils.divide", lambda: cpu._replace_literals("utils", "divide")),
        ("utils.no_such_function", lambda: cpu._replace_literals("utils", "no_such_function")),
        (
            "utils.no_such_function",
            lambda: cpu._replace_function("utils", "no_such_function", print),
        ),
    ],
)
def test_a_site_that_has_moved_is_named(site, answer):
    with pytest.raises(RuntimeError, match="update mixtrain/engine/compat/cpu.py") as stopped:
        answer()
    assert site in str(stopped.value)


def test_the_random_tracker_of_megatron_gives_the_same_numbers_again(tmp_path):
    from composing import plan_of

    plan = plan_of("parallel.expert_model_parallel_size=1")

    def draws(identity) -> list[float]:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        with process_groups.start(plan, identity):
            outside = torch.get_rng_state()
            with get_cuda_rng_tracker().fork():
                inside = torch.rand(3).tolist()
            assert torch.equal(torch.get_rng_state(), outside)
            return inside

    assert run_ranks(1, draws, tmp_path / "a") == run_ranks(1, draws, tmp_path / "b")


def test_importing_the_module_alone_changes_nothing(tmp_path):
    """Tests import what applies the patch; a GPU run must not even import engine/compat/cpu.py."""
    import subprocess

    code = (
        "from mixtrain.engine.compat import cpu; from megatron.core.tensor_parallel import layers;"
        " import torch;assert layers.torch is torch"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=60)


if __name__ == "__main__":
    found = json.loads(INVENTORY.read_text()) if INVENTORY.exists() else {}
    found[version("megatron-core")] = {
        module: sites for module in MODULES if (sites := cuda_sites(module))
    }
    INVENTORY.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
