"""Interrupted runs and full disks: no worker survives, and incomplete output is removed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from preprocessing import TOOL, command, wait_for
from tiny_disks import tiny_disk

from mixtrain.data.json_lines import JsonLines
from mixtrain.data.preprocess import preprocess
from mixtrain.errors import UserError
from mixtrain.system.partial import claim

pytestmark = pytest.mark.long


class Endless:
    """A run of the command on a pipe, which the test keeps open."""

    def __init__(self, folder: Path, tokenizer: Path):
        self.folder = folder
        os.mkfifo(folder / "endless.jsonl")
        words = ["endless.jsonl", "--output", "x", "--tokenizer", str(tokenizer), "--workers", "2"]
        self.process = subprocess.Popen(
            [sys.executable, TOOL, *words], cwd=folder, stderr=subprocess.PIPE, text=True
        )
        wait_for(self.is_read, 120)
        self.write()

    def __enter__(self) -> "Endless":
        wait_for(self.written, 120)
        self.children = self.find_children()
        return self

    def write(self) -> None:
        for _ in range(4000):
            self.stream.write(json.dumps({"text": "words " * 50}) + "\n")
        self.stream.flush()

    def written(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("x.writing/data.bin"))

    def is_read(self) -> bool:
        assert self.process.poll() is None
        try:
            descriptor = os.open(self.folder / "endless.jsonl", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # the pipe has no reader yet
            return False
        os.set_blocking(descriptor, True)
        self.stream = open(descriptor, "w")  # noqa: SIM115
        return True

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.stream.close()

    def find_children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [
            int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()
        ]

    def none_is_alive(self) -> bool:
        return not any(is_alive(pid) for pid in self.children)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_end_leaves_no_worker_and_no_file(sent, code, tokenizer, tmp_path):
    with Endless(tmp_path, tokenizer) as run:
        assert len(run.children) >= 2
        run.process.send_signal(sent)
        assert run.process.wait(60) == code
        wait_for(run.none_is_alive)
        assert os.listdir(tmp_path) == ["endless.jsonl"]
        assert "Traceback" not in run.process.stderr.read()


def test_a_signal_to_all_of_its_processes_is_one_to_the_run(tokenizer, tmp_path):
    with Endless(tmp_path, tokenizer) as run:
        for pid in run.children:
            os.kill(pid, signal.SIGTERM)
        before = run.written()
        run.write()  # which the workers still take
        wait_for(lambda: run.written() > before)
        run.process.terminate()
        assert run.process.wait(60) == 143
        wait_for(run.none_is_alive)
        said = run.process.stderr.read()
        assert "Traceback" not in said and "killed" not in said


def test_the_workers_of_a_run_that_was_killed_end_and_the_next_run_removes_what_it_left(
    tokenizer, tmp_path
):
    with Endless(tmp_path, tokenizer) as run:
        run.process.kill()
        run.process.wait()
        wait_for(run.none_is_alive)
    assert sorted(os.listdir(tmp_path)) == ["endless.jsonl", "x.writing"]
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    preprocess(
        JsonLines(tmp_path / "a.jsonl", "text"), tmp_path / "x", tokenizer, log=lambda line: None
    )
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "endless.jsonl", "x.bin", "x.idx", "x.json"]


def test_what_a_living_run_writes_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "x.writing").mkdir()
    (tmp_path / "x.writing" / "data.bin").write_bytes(b"half")
    with claim(tmp_path / "x.writing", "run"):
        with pytest.raises(UserError, match="x.writing is being written by another run"):
            preprocess(JsonLines(tmp_path / "a.jsonl", "text"), tmp_path / "x", tokenizer)
    assert (tmp_path / "x.writing" / "data.bin").read_bytes() == b"half"


def test_a_folder_of_that_name_with_other_files_is_never_cleared(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n')
    (tmp_path / "x.writing").mkdir()
    (tmp_path / "x.writing" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(
        UserError, match="x.writing/thesis.txt was not written by an interrupted run"
    ):
        preprocess(JsonLines(tmp_path / "a.jsonl", "text"), tmp_path / "x", tokenizer)
    assert (tmp_path / "x.writing" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    "words", [["--tokenizer", "{}"], ["--train-tokenizer", "400"]], ids=["given", "trained"]
)
@pytest.mark.parametrize("size", ["4k", "128k"])
def test_a_disk_that_runs_full_is_one_line_and_nothing_is_left(
    words, size, tokenizer, library, tmp_path
):
    text = (library / "argparse.py").read_text()
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": text}) + "\n") * 20)
    with tiny_disk(tmp_path, size) as disk:
        words = [word.format(tokenizer) for word in words]
        done = command(
            "a.jsonl", "--output", str(disk / "x"), *words, "--workers", "1", cwd=tmp_path
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("mixtrain: ")]
        assert (
            line.startswith(f"mixtrain: {disk / 'x'} was not written: ")
            and "No space left on device" in line
        )
        assert " bytes were written, and " in line and line.endswith(" were free then")
        assert os.listdir(disk) == []
