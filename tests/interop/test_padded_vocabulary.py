"""A vocabulary that tensor parallelism does not divide: rows are added when a model is converted,
and cut on export.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import hf_models
import pytest
import torch
from checkpoints import tensors_of
from composing import ROOT, plan_of
from rank_workers import run_ranks
from test_conversion import LAYOUTS, tool, words_of
from test_conversion_values import add_tokenizer, values_of
from test_verify_conversion import found_by

from mixtrain.checkpoint import state
from mixtrain.config.plan import derive
from mixtrain.engine import weight_init
from mixtrain.errors import FINISHED, UserError
from mixtrain.interop.convert import checkpoint_config, to_hf, to_megatron
from mixtrain.interop.generate import tokenizer_lookup
from mixtrain.interop.generate.request import Request, Sampling
from mixtrain.interop.generate.sample import choose_token, random_stream
from mixtrain.training.worker import run

sys.path.insert(0, str(ROOT / "tools"))
import convert_hf_to_megatron  # noqa: E402
import verify_conversion  # noqa: E402

OWN = 255
DIVISIBLE_BY = 64
PADDED = 256
ROWS = ["embedding.word_embeddings.weight", "output_layer.weight"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """A model with a vocabulary of an odd size."""
    kind = "mixtral of 255"
    model_class, config_class, values = hf_models.MODELS["mixtral"]
    sizes, hf_models.SIZES["vocab_size"] = hf_models.SIZES["vocab_size"], OWN
    hf_models.MODELS[kind] = (model_class, config_class, values)
    try:
        return hf_models.saved(kind, tmp_path_factory.mktemp("uneven") / "there")
    finally:
        hf_models.SIZES["vocab_size"] = sizes
        del hf_models.MODELS[kind]


@pytest.fixture(scope="module")
def padded(uneven, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("padded") / "megatron"
    to_megatron.convert(uneven, out, divisible_by=DIVISIBLE_BY)
    return out


def test_rows_are_added_as_a_new_model_has_them_and_no_other_number_changes(
    uneven, padded, tmp_path, capfd
):
    to_megatron.convert(uneven, tmp_path / "plain")
    assert capfd.readouterr().err == ""
    plain = tensors_of(tmp_path / "plain" / "release")
    here = tensors_of(padded / "release")
    assert plain.keys() == here.keys()
    assert {key for key in plain if plain[key].shape != here[key].shape} == set(ROWS)
    assert all(torch.equal(here[key][: len(plain[key])], plain[key]) for key in plain)
    config = checkpoint_config.config_of(padded / "release")
    assert (
        config.model.vocab_size == PADDED
        and state.read(padded / "release").hf_source["vocab_size"] == OWN
    )
    for key in ROWS:
        assert torch.equal(
            here[key][OWN:], weight_init.draw(derive(config), key, (), (PADDED - OWN, 64))
        )
    to_megatron.convert(uneven, tmp_path / "said", divisible_by=DIVISIBLE_BY)
    said = capfd.readouterr().err
    assert said.startswith(
        "model.vocab_size = 256: 1 row with the initial values of a new model follow the 255 of"
    )
    assert said.count("\n") == 1


def test_added_rows_are_the_same_in_any_blocks_dtype_and_processes(uneven, tmp_path, monkeypatch):
    to_megatron.convert(uneven, tmp_path / "one", divisible_by=1000, dtype=torch.bfloat16)
    monkeypatch.setattr(to_megatron, "BLOCK", 4096)
    to_megatron.convert(
        uneven, tmp_path / "other", divisible_by=1000, dtype=torch.bfloat16, processes=2
    )
    one, other = (tensors_of(tmp_path / name / "release") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one) and len(one[ROWS[0]]) == 1000
    assert one[ROWS[0]][OWN:].float().std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_an_export_leaves_them_out(layout, uneven, padded, tmp_path):
    to_hf.convert(padded, tmp_path / "back", layout=layout)
    assert values_of(tmp_path / "back")["vocab_size"] == OWN
    to_hf.convert(padded, tmp_path / "hub")
    assert hf_models.unequal(uneven, tmp_path / "hub") == []
    rows = {
        len(hf_models.tensors_of(tmp_path / "back")[name])
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert rows == {OWN}


def test_an_export_keeps_the_rows_that_the_tokenizer_in_use_has_tokens_for(
    uneven, padded, tmp_path
):
    large = add_tokenizer(tmp_path / "own", "</s>", ["</s>", "a", *map(str, range(PADDED - 2))])
    to_hf.convert(padded, tmp_path / "back", tokenizer=large)
    assert values_of(tmp_path / "back")["vocab_size"] == PADDED
    small = add_tokenizer(tmp_path / "small")
    to_hf.convert(padded, tmp_path / "again", tokenizer=small)
    assert values_of(tmp_path / "again")["vocab_size"] == OWN
    run_state = state.read(padded / "release")
    assert (
        tokenizer_lookup.unpadded_rows(str(large), run_state) == PADDED
        and tokenizer_lookup.unpadded_rows(str(small), run_state) == OWN
    )
    assert tokenizer_lookup.unpadded_rows(str(large), state.RunState()) is None


def test_the_logits_of_its_own_rows_are_those_of_before(uneven, padded, tmp_path):
    found = found_by(uneven, padded / "release", tmp_path)[0]
    assert found["problems"] == [] and found["logits"] < 1e-5


def test_the_proof_and_its_manifest_take_a_padded_checkpoint(uneven, padded, tmp_path):
    done = tool("verify_conversion", uneven, padded, "--length", "8", "--manifest", tmp_path / "m")
    assert done.returncode == 0 and "none of them not bitwise equal" in done.stdout, done.stderr


def test_a_directory_with_fewer_rows_than_the_source_is_not_taken_for_it(padded, hub, tmp_path):
    short = hf_models.copied(hub, tmp_path / "short")
    (short / "config.json").write_text(json.dumps(values_of(short) | {"vocab_size": OWN - 1}))
    with pytest.raises(UserError, match=r"has shape \(256, 64\)"):
        verify_conversion.main([str(short), str(padded)])


def test_tensor_parallelism_that_does_not_divide_it_is_refused_with_the_command_and_trains_after_it(
    uneven, padded, tmp_path
):
    to_megatron.convert(uneven, tmp_path / "plain")
    more = ["trainer.devices=2", "parallel=ep1", *LAYOUTS["TP2"]]
    with pytest.raises(
        UserError,
        match="convert_hf_to_megatron.py --make-vocab-size-divisible-by 2 adds rows .* use 254 or"
        " 256$",
    ):
        plan_of(*words_of(tmp_path / "plain"), *more)
    words = [
        *words_of(padded),
        *more,
        f"checkpoint.load_weights={padded}",
        "checkpoint=last",
        f"run_dir={tmp_path / 'run'}",
        f"data.path_to_cache={tmp_path / 'cache'}",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "optimizer.lr_warmup_steps=0",
        "data.split='1,0,0'",
    ]
    plan = plan_of(*words)
    assert run_ranks(2, lambda identity: run(plan, identity), tmp_path / "ranks") == [FINISHED] * 2
    to_hf.convert(tmp_path / "run", tmp_path / "back")
    assert values_of(tmp_path / "back")["vocab_size"] == OWN
    assert {len(hf_models.tensors_of(tmp_path / "back")[name]) for name in ("lm_head.weight",)} == {
        OWN
    }


def test_a_row_that_was_added_is_never_chosen():
    logits = torch.zeros(8)
    logits[6:] = 9.0
    assert choose_token(logits, Sampling(), random_stream(0, 0)) == 6  # without any
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_k=7), Sampling(2.0, top_p=0.9)):
        generator = random_stream(1, 0)
        own = replace(sampling, vocabulary=6)
        assert {choose_token(logits, own, generator) for _ in range(100)} <= set(range(6))


def test_a_request_carries_the_rows_to_the_ranks(tmp_path):
    request = Request(["a"], "", Sampling(), 3, [], False, 1, False).for_model("there", OWN)
    request.write(tmp_path)
    assert Request.read(tmp_path) == request and request.sampling.vocabulary == OWN


def test_the_option_of_the_model_group_has_the_padded_size(uneven, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_hf_to_megatron, "CONF", tmp_path)
    (tmp_path / "model").mkdir()
    words = [
        uneven,
        tmp_path / "out",
        "--make-vocab-size-divisible-by",
        DIVISIBLE_BY,
        "--write-model-config",
        "mine",
    ]
    assert convert_hf_to_megatron.main([*map(str, words)]) == 0
    assert "vocab_size: 256\n" in (tmp_path / "model" / "mine.yaml").read_text()
