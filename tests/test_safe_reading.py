"""A checkpoint that carries a malicious pickle is refused, wherever it hides, and nothing in it runs."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import unequal
from test_parity import EP
from test_resume import INTERVAL, path_of, start

from mixtrain.checkpoint import integrity, safe
from mixtrain.errors import FINISHED, REFUSED, UserError

ONE = [EP + "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run_dir, codes, log = start(tmp_path_factory.mktemp("trained"), "trainer.max_steps=2", INTERVAL, *ONE)
    assert codes == {FINISHED}, log
    return run_dir


class Attack:
    """Unpickled without restriction, it makes the file `sentinel`, by way of `route`."""

    def __init__(self, sentinel: Path, route: str):
        self.sentinel, self.route = sentinel, route

    def __reduce__(self):
        touch = f"open({str(self.sentinel)!r}, 'w').close()"
        nested = io.BytesIO()
        if self.route == "torch.load":
            torch.save(Attack(self.sentinel, "os.system"), nested)
            return torch.load, (io.BytesIO(nested.getvalue()), None, None)
        return {
            "os.system": (os.system, (f"touch {self.sentinel}",)),
            "exec": (exec, (touch,)),
            "getattr": (getattr(builtins, "eval"), (touch,)),  # noqa: B009
        }[self.route]


ROUTES = ["os.system", "exec", "getattr", "torch.load"]


def in_metadata(checkpoint: Path, attack: Attack) -> None:
    """Deep in an index that is otherwise as it should be."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"x": [attack]}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, attack: Attack) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    torch.save({**common, "args": attack}, checkpoint / "common.pt")


def in_an_object(checkpoint: Path, attack: Attack) -> None:
    """In the random state, an object in the shards: its place in the index now leads to the attacker's bytes."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    torch.save([{"random_rng_state": attack}], checkpoint / "__9_9.distcp")
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("rng_state"):
            place.relative_path, place.offset = "__9_9.distcp", 0
            place.length = (checkpoint / "__9_9.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = {"metadata": in_metadata, "common": in_common, "object": in_an_object}


def attacked(trained: Path, folder: Path, place: str, route: str) -> tuple[Path, Path]:
    """(a copy of the run whose checkpoint is malicious, and whose manifest agrees with it; the sentinel)."""
    shutil.copytree(trained, folder / "run")
    checkpoint, sentinel = path_of(folder / "run", 2), folder / "it_ran"
    PLACES[place](checkpoint, Attack(sentinel, route))
    files = [path for path in checkpoint.iterdir() if path.name != integrity.MANIFEST]
    integrity.write_manifest(checkpoint, integrity.describe(files))
    return checkpoint, sentinel


@pytest.mark.parametrize("place", PLACES)
def test_a_run_refuses_a_malicious_checkpoint_and_nothing_in_it_runs(place, trained, tmp_path):
    _, sentinel = attacked(trained, tmp_path, place, "os.system")
    _, codes, log = start(tmp_path, "trainer.max_steps=3", *ONE)
    assert codes == {REFUSED}, log
    assert "is not loaded" in log and ".system" in log and "Traceback" not in log
    assert not sentinel.exists()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", PLACES)
def test_the_readers_refuse_every_route(place, route, trained, tmp_path):
    checkpoint, sentinel = attacked(trained, tmp_path, place, route)
    with pytest.raises(UserError, match="is not loaded"):
        safe.read_metadata(checkpoint)
        safe.read_common(checkpoint)
        try:
            safe.load_object(open(checkpoint / "__9_9.distcp", "rb"))
        except pickle.UnpicklingError as error:
            raise UserError(safe.refusal(error)) from None
    assert not sentinel.exists()


@pytest.mark.parametrize("place", PLACES)
def test_the_attacks_are_attacks(place, trained, tmp_path):
    """What PyTorch itself does with them: else the tests above would show nothing."""
    checkpoint, sentinel = attacked(trained, tmp_path, place, "exec")
    if place == "metadata":
        pickle.loads((checkpoint / ".metadata").read_bytes())
    else:
        torch.load(checkpoint / {"common": "common.pt", "object": "__9_9.distcp"}[place], weights_only=False)
    assert sentinel.exists()


def test_an_index_that_leads_out_of_its_directory_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = path_of(tmp_path / "run", 2)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="leads out of its directory, to ../../secret"):
        safe.read_metadata(checkpoint)


GARBAGE = {"empty": b"", "bytes": b"\x80\x05garbage", "a string": pickle.dumps("x"), "half": None}


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("file, read", [(".metadata", safe.read_metadata), ("common.pt", safe.read_common)])
def test_a_damaged_file_is_named(file, read, name, trained, tmp_path):
    checkpoint = tmp_path / "iter_0000002"
    shutil.copytree(path_of(trained, 2), checkpoint)
    whole = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(whole[: len(whole) // 2] if GARBAGE[name] is None else GARBAGE[name])
    with pytest.raises(UserError, match=file):
        read(checkpoint)
    (checkpoint / file).unlink()
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        read(checkpoint)


def test_an_honest_checkpoint_is_read(trained, tmp_path):
    checkpoint = path_of(trained, 2)
    assert "output_layer.weight" in safe.read_metadata(checkpoint).state_dict_metadata
    assert safe.read_common(checkpoint)["iteration"] == 2
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert unequal(checkpoint, tmp_path / "copy") == []
