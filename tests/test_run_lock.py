"""One process at a time in a run folder; a lock ends with its process; a refused run leaves no trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.run_lock import claimed, give_up, holder, locked

ROOT = Path(__file__).parents[1]
HOLD = """
import os, sys, time
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import locked
with locked(RunFolder(sys.argv[1])):
    worker = os.fork() if sys.argv[2] == "with a worker" else 1
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["alone", "with a worker"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a run, with or without a forked data worker."""
    words = [sys.executable, "-c", HOLD, str(tmp_path), request.param]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    if worker > 1:
        os.kill(worker, signal.SIGKILL)


def test_a_second_process_is_refused_by_the_name_of_the_first_until_that_is_killed(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    found = holder(run)
    assert found is not None and (found.pid, found.host) == (other.pid, socket.gethostname())
    before = run.lock.read_bytes()
    with (
        pytest.raises(RimeError, match=rf"in use by process {other.pid} on {socket.gethostname()}, since 20"),
        claimed(run),
    ):
        pass
    give_up(run)  # what `rime run` does after a failure
    assert run.lock.read_bytes() == before and holder(run) == found
    other.kill()
    other.wait()
    assert holder(run) is None, "a data worker that outlives the process holds nothing"
    with claimed(run):
        mine = holder(run)
        assert mine is not None and mine.pid == os.getpid()
    assert not list(tmp_path.iterdir()) and holder(run) is None


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock.json")
    assert holder(RunFolder(tmp_path)) is None


def test_looking_does_not_keep_anybody_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    words = "from rime_pl.run_lock import *\nwhile True: holder(RunFolder(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", f"import sys\n{words}", str(tmp_path)], cwd=ROOT)
    try:
        for _ in range(100):
            with locked(run):
                pass
    finally:
        process.kill()
        process.wait()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [RimeError("refused"), KeyboardInterrupt(), SystemExit(1)])
def test_a_run_that_saved_nothing_leaves_the_folder_as_it_was(error: BaseException, tmp_path: Path) -> None:
    old = RunFolder(tmp_path / "old" / "sft")
    old.begin({"model": {"temperature": 0.02}}, {"recipe": []})
    old.last_checkpoint.parent.mkdir()
    old.last_checkpoint.write_text("step 3")
    before = tree(tmp_path)
    for run in (old, RunFolder(tmp_path / "new" / "below" / "sft")):
        with pytest.raises(type(error)), claimed(run):
            run.config.write_text("other: settings")
            (run.path / "tensorboard").mkdir()
            (run.path / "tensorboard" / "events").write_text("a curve")
            raise error
    assert tree(tmp_path) == before


def test_what_was_saved_stays(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "sft")
    with pytest.raises(RimeError), claimed(run):
        run.config.write_text("settings")
        run.last_checkpoint.parent.mkdir()
        run.last_checkpoint.write_text("step 3")
        raise RimeError("the disk is full")
    assert run.config.is_file() and run.last_checkpoint.is_file() and not run.lock.exists()


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    take = "rime_pl.run_lock._take"
    monkeypatch.setattr(
        take, lambda run: write_json(run.marker, {}) or os.open(run.lock, os.O_RDWR | os.O_CREAT)
    )
    with pytest.raises(RimeError, match="finished by another process just now"), claimed(run):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with claimed(RunFolder(tmp_path)):
        assert "no locks on this file system" in capsys.readouterr().out


def test_a_folder_that_was_given_up_is_gone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "scenes-tiny-seed0" / "sft")
    run.begin({}, {})
    give_up(run)
    assert not list(tmp_path.iterdir())
