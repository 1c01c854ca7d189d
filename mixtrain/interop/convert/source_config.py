"""What belongs to weights beside the tensors: the configuration they are of, and the tokenizer.

Rule: a checkpoint's configuration is in its run_state.json; its tokenizer lies beside it, in
`tokenizer/` of the directory that holds the checkpoint, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mixtrain.checkpoint import directory, integrity, state
from mixtrain.checkpoint.shard_writer import FILES_PER_RANK
from mixtrain.checkpoint.state import RunState
from mixtrain.config import published_models
from mixtrain.config.choices import TransformerImpl
from mixtrain.config.compose import CONF, compose
from mixtrain.config.key_effects import show
from mixtrain.config.plan import resolve
from mixtrain.config.schema import Config, to_yaml
from mixtrain.data.tokenizer import TOKENIZER
from mixtrain.errors import UserError
from mixtrain.interop.convert.output import Advance, Job, dealt
from mixtrain.system.links import directory_in


def configuration(values: Mapping[str, Any]) -> Config:
    """The resolved Config of a model of which the keys in `values` are known; the rest is the default's."""
    jobs, problems = compose(
        ["data=mock", "parallel=ep1", *(f"{key}={show(value)}" for key, value in values.items())]
    )
    config = resolve(Config.from_hydra(jobs[0].tree, problems))
    return config


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in it. UserError if there is none, or it is not whole.

    By the sizes of its files, and the SHA-256 of the small ones: the large ones are for who reads them (Hashes).
    """
    found = directory.newest(path)
    if found is None:
        what = (
            "no checkpoint (iter_NNNNNNN, release) and no directory of some"
            if path.is_dir()
            else "no directory"
        )
        raise UserError(f"{path} is {what}")
    if wrong := integrity.problem(found, full=False):
        raise UserError(wrong)
    return found


class Hashes:
    """The SHA-256 of files of a checkpoint, to be computed while they are read."""

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
        """The work for so many processes, two at least. A UserError of a job names the file that is damaged."""
        shares = dealt(self.files, max(processes, FILES_PER_RANK), lambda file: file[1])
        return [partial(self._compare, {name for name, _ in share}) for share in shares if share]

    def _compare(self, names: set[str], advance: Advance) -> None:
        heartbeat = partial(advance, integrity.BLOCK)
        if wrong := integrity.problem(
            self.checkpoint, full=True, heartbeat=heartbeat, only=names.__contains__
        ):
            raise UserError(wrong)


def config_of(checkpoint: Path) -> Config:
    """The resolved Config of the run that wrote a checkpoint; keys it did not know yet have the default's value."""
    (job,), _ = compose([])
    return Config.from_hydra(
        OmegaConf.merge(job.tree, OmegaConf.create(state_of(checkpoint).config))
    )


def state_of(checkpoint: Path) -> RunState:
    """What run_state.json of a checkpoint says."""
    try:
        return state.read(checkpoint)
    except ValueError as error:
        raise UserError(str(error)) from None


def for_one_rank(config: Config, precision: str) -> Config:
    """The same model on one rank of a CPU, computing as transformers does: no jitter, no forced routing."""
    own = configuration({"trainer.precision": precision})
    model = replace(config.model, transformer_impl=TransformerImpl.torch)
    router = replace(
        config.router, moe_input_jitter_eps=None, moe_router_force_load_balancing=False
    )
    return replace(own, model=model, router=router)


def run_state(config: Config, hf_source: dict[str, Any] | None = None) -> RunState:
    """The state of weights of no run: nothing has been trained yet."""
    return RunState(
        config=OmegaConf.to_container(OmegaConf.create(to_yaml(config))), hf_source=hf_source
    )


def tokenizer_of(checkpoint: Path, config: Config) -> Path | None:
    """The directory of a checkpoint's tokenizer, which lies beside it; None if none.

    UserError if it is a link to another place, or if the checkpoint only names one: the path in its
    run_state.json may be anybody's, and what lies there would be given away with the export.
    """
    if beside := directory_in(checkpoint.resolve().parent, TOKENIZER):
        return beside
    named = config.data.tokenizer
    if named and Path(named).is_dir():
        raise UserError(
            f"there is no tokenizer beside {checkpoint}, which names {named}; if it is that, type"
            f" --tokenizer {named}"
        )
    return None


def model_config(values: Mapping[str, Any], source: str) -> str:
    """conf/model/NAME.yaml of the keys that from_hugging_face gives; what is no fact of theirs is mixtral_8x7b's."""
    same = [
        name
        for name, there in published_models.published().items()
        if all(values.get(key) == there[key] for key in there)
    ]
    known = min(same, key=len, default=None)  # that of an -Instruct are the same
    lines = [f"# {source}, config.json"]
    for name, value in OmegaConf.load(CONF / "model" / "mixtral_8x7b.yaml").items():
        mine = values.get(f"model.{name}", known if name == "hf_model" else value)
        lines.append(f"{name}: {show(mine) if not OmegaConf.is_config(mine) else '{}'}")
    return "\n".join(lines) + "\n"
