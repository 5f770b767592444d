"""A process or thread that fails elsewhere: it takes the run along, and is told once, in a plain sentence."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rime_pl.__main__ import failed, failed_thread, main

ROOT = Path(__file__).parents[1]
#: Starts a further process, which waits for a minute, as if for the first one.
FIRST = """
import os, subprocess, sys, time
words = "import time; from rime_pl import __main__ as m; m.end_with_first_process(); print(1); time.sleep(60)"
further = subprocess.Popen(
    [sys.executable, "-c", words], env={**os.environ, "LOCAL_RANK": "1"}, stdout=subprocess.PIPE
)
further.stdout.read(1)
print(further.pid, flush=True)
time.sleep(60)
"""
LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1500"


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_further_process_ends_when_the_first_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    first = subprocess.Popen(
        [sys.executable, "-c", FIRST], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert first.stdout is not None
    further = int(first.stdout.readline())
    first.kill()
    first.wait()
    end = time.monotonic() + 10
    while alive(further) and time.monotonic() < end:
        time.sleep(0.02)
    left = alive(further)
    if left:
        os.kill(further, signal.SIGKILL)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_lost_process_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert failed(RuntimeError(LOST)) == 2
    said = capsys.readouterr().err
    assert said.startswith("rime: error: another process of this run has ended") and said.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert failed(RuntimeError(LOST)) == 0 and not capsys.readouterr().err
    with pytest.raises(RuntimeError):
        failed(RuntimeError("shapes do not match"))


def test_an_error_of_a_thread_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """TensorBoard's thread cannot write, and the next curve raises the same error, which names the folder."""

    def work(words: list[str]) -> int:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def write() -> None:
            raise full

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        if words == ["curves"]:
            full.filename = "runs/x"
            raise full
        return 0

    monkeypatch.setattr(threading, "excepthook", failed_thread)
    monkeypatch.setattr("rime_pl.__main__.dispatch", work)
    for words, where in (["curves"], "runs/x: "), ([], ""):
        assert main(words) == 2
        room = "Make room on the disk, and give the same command again."
        assert capsys.readouterr().err == f"rime: error: {where}No space left on device. {room}\n"
