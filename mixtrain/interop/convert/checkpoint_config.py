"""Find what a checkpoint needs beside its tensors: its configuration and its tokenizer.

Rule: the configuration is in the checkpoint's run_state.json, and the tokenizer in `tokenizer/`
beside the checkpoint, for runs and for conversions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixtrain.checkpoint import directory, integrity
from mixtrain.checkpoint.shard_writer import FILES_PER_RANK
from mixtrain.checkpoint.state import RunState, state_of
from mixtrain.config import published_models
from mixtrain.config.choices import TransformerImpl
from mixtrain.config.compose import CONF, compose
from mixtrain.config.key_effects import show
from mixtrain.config.plan import resolve
from mixtrain.config.schema import Config
from mixtrain.config.typed_config import from_hydra, to_yaml
from mixtrain.data.tokenizer import TOKENIZER
from mixtrain.errors import UserError
from mixtrain.interop.convert.workers import Advance, Job, split_evenly
from mixtrain.system.links import directory_in


def configuration(overrides: Mapping[str, Any]) -> Config:
    """Return the resolved Config of a model: the given keys, and defaults for the others."""
    words = [f"{key}={show(value)}" for key, value in overrides.items()]
    jobs, problems = compose(["data=mock", "parallel=ep1", *words])
    return resolve(from_hydra(jobs[0].tree, problems))


def checkpoint_at(path: Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest in it. UserError if none is complete.

    Checks the sizes of its files and the SHA-256 of the small ones; see Hashes for the large ones.
    """
    checkpoint = directory.newest(path)
    if checkpoint is None:
        raise UserError(directory.no_checkpoint_at(path))
    if problem := integrity.problem(checkpoint, full=False):
        raise UserError(problem)
    return checkpoint


class Hashes:
    """Compare the SHA-256 of a checkpoint's files, in processes beside the ones that read them."""

    def __init__(self, checkpoint: Path, names: set[str]):
        """UserError if a name is not in the manifest."""
        manifest = integrity.read_manifest(checkpoint)
        if missing := sorted(names - manifest.keys()):
            raise UserError(
                f"{checkpoint / missing[0]} holds weights, and {integrity.MANIFEST} does not have"
                " it"
            )
        self.checkpoint = checkpoint
        self.files = [(name, manifest[name].size) for name in sorted(names)]
        self.size = sum(size for _, size in self.files)  # bytes

    def jobs(self, processes: int) -> list[Job]:
        """Return the work for so many processes, at least two.

        A job raises a UserError that names a damaged file.
        """
        shares = split_evenly(self.files, max(processes, FILES_PER_RANK), lambda file: file[1])
        return [partial(self._compare, {name for name, _ in share}) for share in shares if share]

    def _compare(self, names: set[str], advance: Advance) -> None:
        heartbeat = partial(advance, integrity.BLOCK)
        if problem := integrity.problem(
            self.checkpoint, full=True, heartbeat=heartbeat, only=names.__contains__
        ):
            raise UserError(problem)


def config_of(checkpoint: Path) -> Config:
    """Return the resolved Config of the run that wrote a checkpoint.

    Keys that are newer than the checkpoint have their default values.
    """
    (job,), _ = compose([])
    saved = OmegaConf.create(state_of(checkpoint).config)
    return from_hydra(OmegaConf.merge(job.tree, saved))


def for_one_rank(config: Config, precision: str) -> Config:
    """Return the same model on one CPU rank, computing as transformers does.

    Without jitter and forced load balancing.
    """
    single_rank = configuration({"trainer.precision": precision})
    model = replace(config.model, transformer_impl=TransformerImpl.torch)
    router = replace(
        config.router, moe_input_jitter_eps=None, moe_router_force_load_balancing=False
    )
    return replace(single_rank, model=model, router=router)


def untrained_state(config: Config, hf_source: dict[str, Any] | None = None) -> RunState:
    """Return the RunState of weights that no run has trained yet."""
    container = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    return RunState(config=container, hf_source=hf_source)


def tokenizer_of(checkpoint: Path, config: Config) -> Path | None:
    """Return the tokenizer's directory beside a checkpoint, or None.

    UserError if it is a link to another place, or if there is none but run_state.json names one
    that exists: anyone may have written that path, and the export would publish its files.
    """
    if beside := directory_in(checkpoint.resolve().parent, TOKENIZER):
        return beside
    named = config.data.tokenizer
    if named and Path(named).is_dir():
        raise UserError(
            f"there is no tokenizer beside {checkpoint}, which names {named}; to use that, type"
            f" --tokenizer {named}"
        )
    return None


def model_yaml(overrides: Mapping[str, Any], source: str) -> str:
    """Return conf/model/NAME.yaml for the keys of from_hugging_face.

    Other keys have the values of mixtral_8x7b.
    """
    matching = [
        name
        for name, published in published_models.published().items()
        if all(overrides.get(key) == value for key, value in published.items())
    ]
    hf_model = min(matching, key=len, default=None)  # the base model, not its -Instruct
    base = OmegaConf.load(CONF / "model" / "_base.yaml")
    example = OmegaConf.load(CONF / "model" / "mixtral_8x7b.yaml")
    lines = [f"# {source}, config.json", "defaults: [_base]"]
    for name, default in OmegaConf.to_container(base).items():
        value = (
            hf_model if name == "hf_model" else overrides.get(f"model.{name}", example.get(name))
        )
        if value not in (None, default):
            lines.append(f"{name}: {show(value)}")
    return "\n".join(lines) + "\n"
