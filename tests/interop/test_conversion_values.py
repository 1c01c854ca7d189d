"""What a model came with beside its weights goes out again: ids, lists of ids, coefficients,
generation_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
from checkpoints import tensors_of
from composing import plan_of
from rank_workers import run_ranks
from test_conversion import words_of
from test_conversion_refusals import with_config
from transformers import AutoConfig, GenerationConfig

from mixtrain.checkpoint import directory, integrity, state
from mixtrain.errors import FINISHED, UserError
from mixtrain.interop.convert import checkpoint_config, hf_source, to_hf, to_megatron
from mixtrain.training.worker import run

# Written by to_hugging_face for both versions of transformers, or under the other version's name.
OF_BOTH_VERSIONS = {"rope_theta", "torch_dtype", "num_experts", "num_local_experts"}
GIVEN = {
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "pad_token_id": 3,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "attention_dropout": 0.1,
    "initializer_range": 0.03,
    "use_cache": False,
    "a_key_of_nobody": {"x": [1.5, None, "text"]},
}
GENERATION = {
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "temperature": 0.6,
    "top_p": 0.9,
    "do_sample": True,
}


def values_of(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def with_values(folder: Path, generation: dict | None = GENERATION, **more: object) -> Path:
    """A model with other values in its config.json, and in generation_config.json; None: without
    that file.
    """
    (folder / "config.json").write_text(json.dumps(values_of(folder) | more))
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def add_tokenizer(
    folder: Path, eos: str = "</s>", vocabulary=("<s>", "</s>", "a"), **settings: object
) -> Path:
    folder.mkdir(exist_ok=True)
    vocab = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos} | settings))
    return folder


def there_and_back(there: Path, folder: Path, **how: object) -> Path:
    to_megatron.convert(there, folder / "megatron")
    to_hf.convert(folder / "megatron", folder / "back", **how)
    return folder / "back"


@pytest.mark.parametrize("tokenizer", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "tied mixtral", "qwen3_moe"])
def test_config_json_and_the_generation_config_come_back_as_they_were(kind, tokenizer, tmp_path):
    there = with_values(hf_models.saved(kind, tmp_path / "there"), **GIVEN)
    if tokenizer:
        add_tokenizer(there)
    back = there_and_back(there, tmp_path)
    here = values_of(there)
    came = values_of(back)
    assert {
        name for name in here.keys() | came.keys() if here.get(name, 0) != came.get(name, 0)
    } <= OF_BOTH_VERSIONS
    assert values_of(back, "generation_config.json") == values_of(there, "generation_config.json")
    assert (
        GenerationConfig.from_pretrained(back).to_dict()
        == GenerationConfig.from_pretrained(there).to_dict()
    )
    read = [AutoConfig.from_pretrained(path).to_dict() for path in (there, back)]
    assert {name for name in read[0] if read[0][name] != read[1][name]} <= {"_name_or_path"}


def test_what_training_changed_is_the_runs_and_the_rest_the_sources(tmp_path):
    there = with_values(hf_models.saved("mixtral", tmp_path / "there"), **GIVEN)
    to_megatron.convert(there, tmp_path / "megatron")
    words = [
        *words_of(tmp_path / "megatron"),
        f"checkpoint.load_weights={tmp_path / 'megatron'}",
        "checkpoint=last",
        f"run_dir={tmp_path / 'run'}",
        f"data.path_to_cache={tmp_path / 'cache'}",
        "router.moe_aux_loss_coeff=0.005",
        "parallel=ep1",
        "trainer.devices=1",
        "trainer.log_every_n_steps=1",
        "trainer.limit_val_batches=0",
        "data.split='1,0,0'",
        "optimizer.lr_decay_steps=9",
        "optimizer.lr_warmup_steps=1",
    ]
    for steps in (2, 3):  # a new run from the weights, and one that goes on from its checkpoint
        plan = plan_of(*words, f"trainer.max_steps={steps}")
        assert run_ranks(
            1, lambda identity, plan=plan: run(plan, identity), tmp_path / f"ranks{steps}"
        ) == [FINISHED]
        assert state.read(directory.newest(tmp_path / "run")).step == steps
        back = tmp_path / f"back{steps}"
        to_hf.convert(tmp_path / "run", back)
        assert len(hf_models.unequal(there, back)) > 5  # it has trained
        here = values_of(there)
        came = values_of(back)
        other = {
            name for name in here.keys() | came.keys() if here.get(name, 0) != came.get(name, 0)
        }
        assert other <= OF_BOTH_VERSIONS | {"router_aux_loss_coef"}
        assert came["router_aux_loss_coef"] == 0.005 and came["eos_token_id"] == [2, 7]
        assert (
            GenerationConfig.from_pretrained(back).to_dict()
            == GenerationConfig.from_pretrained(there).to_dict()
        )


def test_with_another_tokenizer_the_ids_are_that_ones(tmp_path):
    there = add_tokenizer(with_values(hf_models.saved("mixtral", tmp_path / "there"), **GIVEN))
    other = add_tokenizer(tmp_path / "other", "end", ("<s>", "a", "b", "c", "end"))
    back = there_and_back(there, tmp_path, tokenizer=other, allow_other_tokenizer=True)
    came = values_of(back)
    assert [came[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id")] == [
        4,
        None,
        None,
    ]
    assert came["output_router_logits"] is True and not (back / "generation_config.json").exists()


def test_ids_are_looked_for_in_every_file_of_a_tokenizer(converted, tmp_path):
    own = add_tokenizer(tmp_path / "own", None)
    (own / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    (own / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 2], "pad_token_id": 2})
    )
    release = without_source(converted, tmp_path / "release")
    to_hf.convert(release, tmp_path / "back", tokenizer=own)
    came = values_of(tmp_path / "back")
    assert [came[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [0, 1, 2]
    (own / "special_tokens_map.json").unlink()
    to_hf.convert(release, tmp_path / "again", tokenizer=own)
    assert values_of(tmp_path / "again")["eos_token_id"] == [1, 2]


def test_a_source_without_a_tokenizer_keeps_its_list_where_the_tokenizers_id_is_in_it(
    hub, tmp_path
):
    there = with_values(
        hf_models.copied(hub, tmp_path / "there"), **GIVEN | {"eos_token_id": [1, 7]}
    )
    back = there_and_back(there, tmp_path, tokenizer=add_tokenizer(tmp_path / "own"))
    assert values_of(back)["eos_token_id"] == [1, 7] and values_of(back)["bos_token_id"] == 1
    to_hf.convert(
        tmp_path / "megatron", tmp_path / "other", tokenizer=add_tokenizer(tmp_path / "own", "a")
    )
    assert values_of(tmp_path / "other")["eos_token_id"] == 2


def without_source(converted: Path, target: Path, **source: object) -> Path:
    """A copy of a checkpoint as an older version has written it, or with something else of its
    source.
    """
    release = hf_models.copied(converted / "release", target)
    values = json.loads((release / state.NAME).read_text())
    del values["hf_source"]
    (release / state.NAME).write_text(json.dumps(values | source))
    files = integrity.read_manifest(release)
    integrity.write_manifest(release, files | integrity.describe([release / state.NAME]))
    return release


def test_a_checkpoint_of_an_older_version_is_exported_as_before(converted, tmp_path):
    release = without_source(converted, tmp_path / "release")
    assert state.read(release).hf_source is None
    to_hf.convert(release, tmp_path / "back")
    came = values_of(tmp_path / "back")
    assert [came[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None] * 3
    assert (
        tensors_of(release).keys() and not (tmp_path / "back" / "generation_config.json").exists()
    )


WRONG = {
    "hf_source.vocab_size is missing": {"config": {}, "tokenizer": ""},
    "hf_source.config = 5 is not an object": {"config": 5, "tokenizer": "", "vocab_size": 1},
    "hf_source.tokenizer = null is not text": {"config": {}, "tokenizer": None, "vocab_size": 1},
    "hf_source.vocab_size = -1 is not a whole number from 0": {
        "config": {},
        "tokenizer": "",
        "vocab_size": -1,
    },
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_damaged_note_of_the_source_is_refused_by_its_place(problem, converted, tmp_path):
    release = without_source(converted, tmp_path / "release", hf_source=WRONG[problem])
    with pytest.raises(UserError, match="run_state.json is damaged: " + problem):
        to_hf.convert(release, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_cannot_slip_code_or_an_architecture_into_the_export(converted, tmp_path):
    sly = {
        "auto_map": {"AutoModel": "m.M"},
        "model_type": "llama",
        "hidden_size": 1,
        "use_cache": False,
    }
    note = {"config": sly, "tokenizer": "", "vocab_size": 256}
    release = without_source(converted, tmp_path / "release", hf_source=note)
    to_hf.convert(release, tmp_path / "back")
    came = values_of(tmp_path / "back")
    assert "auto_map" not in came and came["use_cache"] is False
    assert (came["model_type"], came["hidden_size"]) == ("mixtral", 64)


def test_what_a_checkpoint_could_not_keep_is_refused_before_anything_is_written(hub, tmp_path):
    deep: dict = {}
    for _ in range(62):
        deep = {"a": deep}
    there = with_values(hf_models.copied(hub, tmp_path / "there"), deep=deep)
    with pytest.raises(
        UserError,
        match="config.json or .* cannot be kept in a checkpoint: nested more than 64 deep",
    ):
        to_megatron.convert(there, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_the_losses_of_a_router_are_said_in_transformers_words(converted, tmp_path):
    run_state = state.state_of(converted / "release")
    trained = state.RunState(step=1, hf_source=run_state.hf_source)
    for types, weights, expected in (
        (["seq_aux_loss", "aux_loss"], [0.1, 0.2], 0.2),
        (["global_aux_loss"], [0.3], 0.3),
        (["none"], [0.4], 0.0),
    ):
        own = {
            "moe_router_load_balancing_type": types,
            "moe_aux_loss_coeff": weights,
            "moe_input_jitter_eps": 0.01,
        }
        keys = {f"router__{name}": value for name, value in own.items()}
        config = checkpoint_config.config_of(with_config(converted, tmp_path / types[0], **keys))
        beside, _ = hf_source.to_export(trained, config, None)
        assert (beside["router_aux_loss_coef"], beside["router_jitter_noise"]) == (expected, 0.01)
        assert hf_source.to_export(run_state, config, None)[0]["router_aux_loss_coef"] == 0.001
