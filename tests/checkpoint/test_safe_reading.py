"""A checkpoint with a malicious pickle anywhere is refused, and the pickle has no effect."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from checkpoints import unequal
from evil_pickles import OPCODES, Watch, alone, attributes, mutants, small_index
from test_evil_pickles import DECLARED, NAMES, READERS, THINGS
from test_parity import EP
from test_resume import INTERVAL, path_of, start

from mixtrain.checkpoint import integrity, metadata, pickles, safe
from mixtrain.checkpoint.archive import Archive
from mixtrain.errors import FINISHED, REFUSED, UserError

ONE = [EP + "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run_dir, codes, log = start(
        tmp_path_factory.mktemp("trained"), "trainer.max_steps=2", INTERVAL, *ONE
    )
    assert codes == {FINISHED}, log
    return run_dir


class Attack:
    """An object that creates the file `sentinel` through `route` when unpickled."""

    def __init__(self, sentinel: Path, route: str):
        self.sentinel = sentinel
        self.route = route

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
    """Deep in an otherwise valid index."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"x": [attack]}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, attack: Attack) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    torch.save({**common, "args": attack}, checkpoint / "common.pt")


def in_an_object(checkpoint: Path, attack: Attack) -> None:
    """In the random state, an object of the shards: its entry in the index leads to the attack."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    torch.save([{"random_rng_state": attack}], checkpoint / "__9_9.distcp")
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith("rng_state"):
            place.relative_path = "__9_9.distcp"
            place.offset = 0
            place.length = (checkpoint / "__9_9.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = {"metadata": in_metadata, "common": in_common, "object": in_an_object}


def attacked(trained: Path, folder: Path, place: str, route: str) -> tuple[Path, Path]:
    """Return (a copy of the run with a malicious checkpoint and a matching manifest, sentinel)."""
    shutil.copytree(trained, folder / "run")
    checkpoint = path_of(folder / "run", 2)
    sentinel = folder / "it_ran"
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


def no_unpickler(identity) -> None:
    """Make PyTorch's and pickle's readers fail on any file of a checkpoint."""
    torch.load = torch.serialization.load = pickle.load = None


def test_a_run_resumes_without_an_unpickler(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    _, codes, log = start(
        tmp_path, "trainer.max_steps=3", "checkpoint.save_last=false", *ONE, before=no_unpickler
    )
    assert codes == {FINISHED} and "after 2 steps" in log, log


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", PLACES)
def test_the_readers_refuse_every_route(place, route, trained, tmp_path):
    checkpoint, sentinel = attacked(trained, tmp_path, place, route)
    with pytest.raises(UserError, match="is not loaded"):
        READERS[place](checkpoint)
    assert not sentinel.exists()


@pytest.mark.parametrize("place", PLACES)
def test_the_attacks_are_attacks(place, trained, tmp_path):
    """PyTorch itself runs them: otherwise the tests above would prove nothing."""
    checkpoint, sentinel = attacked(trained, tmp_path, place, "exec")
    if place == "metadata":
        pickle.loads((checkpoint / ".metadata").read_bytes())
    else:
        torch.load(
            checkpoint / {"common": "common.pt", "object": "__9_9.distcp"}[place],
            weights_only=False,
        )
    assert sentinel.exists()


GARBAGE = {"empty": b"", "bytes": b"\x80\x05garbage", "a string": pickle.dumps("x"), "half": None}


@pytest.mark.parametrize("which", GARBAGE)
@pytest.mark.parametrize(
    "file, read", [(".metadata", safe.read_metadata), ("common.pt", safe.read_common)]
)
def test_a_damaged_file_is_named(file, read, which, trained, tmp_path):
    checkpoint = tmp_path / "iter_0000002"
    shutil.copytree(path_of(trained, 2), checkpoint)
    whole = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(
        whole[: len(whole) // 2] if GARBAGE[which] is None else GARBAGE[which]
    )
    with pytest.raises(
        UserError, match=f"{file}(: a pickle with the opcode GET is not loaded| is damaged)"
    ):
        read(checkpoint)
    (checkpoint / file).unlink()
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        read(checkpoint)
    os.mkfifo(checkpoint / file)
    with pytest.raises(UserError, match=f"{file} is not a file"):
        read(checkpoint)


def test_an_honest_checkpoint_is_read(trained, tmp_path):
    checkpoint = path_of(trained, 2)
    assert "output_layer.weight" in safe.read_metadata(checkpoint).state_dict_metadata
    assert safe.read_common(checkpoint)["iteration"] == 2
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert unequal(checkpoint, tmp_path / "copy") == []


# Random bytes

LEAST = 200  # mutants


def read_bytes(kind: str, data: bytes) -> None:
    if kind == "index":
        metadata.metadata_of(pickles.read(data, metadata.ALLOWED))
        return
    there = Archive(io.BytesIO(data))
    tree = there.tree()
    if kind == "tensor":
        there.load(there.locate(tree))
    elif kind == "object":
        there.plain()


def bases_of(checkpoint: Path) -> list[tuple[str, bytes]]:
    """Return the files of a checkpoint that are read, and the small index of the tests."""
    index = safe.read_metadata(checkpoint)
    parts = {}
    for at, place in index.storage_data.items():
        kind = (
            "object"
            if at.fqn.startswith("rng_state")
            else None
            if "_extra_state" in at.fqn
            else "tensor"
        )
        if kind and place.length < parts.get(kind, place).length + 1:
            parts[kind] = place
    for kind, place in parts.items():
        data = (checkpoint / place.relative_path).read_bytes()
        yield kind, data[place.offset : place.offset + place.length]
    yield "common", (checkpoint / "common.pt").read_bytes()
    yield "index", (checkpoint / ".metadata").read_bytes()
    yield from [("index", pickle.dumps(small_index(), protocol)) for protocol in (2, 4)]


def fuzz(bases: list[tuple[str, bytes]], seconds: float, seed: int, kept: Path) -> int:
    """Return how many mutants were read or refused: at least LEAST, for some seconds, in 2 GiB."""
    assert b"x".decode("cp437")  # zipfile imports this codec for names that are not UTF-8
    attacks = [of(*pair) for of in OPCODES.values() for pair in [*NAMES, *DECLARED]]
    before = attributes(THINGS)
    count = 0
    end = time.monotonic() + seconds
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (
        2 << 30
    )
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for number, data in mutants([base for _, base in bases], attacks, seed):
        kept.write_bytes(data)
        with Watch() as events:
            try:
                read_bytes(bases[number][0], data)
            except (pickles.Damaged, pickles.Unwanted):
                pass
        assert events == [], events
        count += 1
        if count % LEAST == 0:
            assert attributes(THINGS) == before
        if count >= LEAST and time.monotonic() > end:
            return count


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.long)])
def test_bytes_by_chance_are_read_or_refused(seconds, trained, tmp_path):
    bases = [*bases_of(path_of(trained, 2))]
    assert {kind for kind, _ in bases} == {"index", "common", "object", "tensor"}
    for kind, data in bases:
        read_bytes(kind, data)  # unchanged bytes are read
    seed = int.from_bytes(os.urandom(4), "little")
    outcome = tmp_path / "outcome"
    code, told = alone(outcome, lambda: str(fuzz(bases, seconds, seed, tmp_path / "last")))
    assert code == 0 and told.isdigit(), f"seed {seed}, {tmp_path / 'last'}, exit {code}: {told}"
    print(f"{told} mutants")
    assert int(told) >= LEAST
