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

from rime_pl.__main__ import FIRST_PROCESS, failed, failed_thread, main

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


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_further_process_that_starts_too_late_ends() -> None:
    """The first one was killed before this one could ask the system to be killed with it."""
    words = "from rime_pl import __main__ as m; m.end_with_first_process(); print('goes on')"
    for first, expected in ((os.getpid(), (0, "goes on\n")), (2**22, (1, ""))):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "1"}
        environment[FIRST_PROCESS] = str(first)
        command = [sys.executable, "-c", words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == expected


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


#: Be `rime` with another `main`; `press()` is Ctrl-C.
CONSOLE = """
import os, signal, time
from rime_pl import __main__ as m
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
press = lambda: os.kill(os.getpid(), signal.SIGINT)
def as_an_import():
    try:
        press()
        time.sleep(5)
    except KeyboardInterrupt as error:
        raise ImportError("numpy failed to import") from error
def forgotten():
    class Held:
        def __del__(self):
            press()
            time.sleep(5)
    Held()
    time.sleep(20)
def cut_off():
    class Loader:
        def __init__(self):
            press()
            time.sleep(5)
        def __del__(self):
            self.workers
    Loader()
def again():
    try:
        press()
        time.sleep(5)
    except KeyboardInterrupt:
        press()
        time.sleep(5)
m.main = %s
m.console()
"""


@pytest.mark.parametrize("moment", ["as_an_import", "forgotten", "cut_off", "again"])
def test_ctrl_c_is_one_sentence_at_any_moment(moment: str) -> None:
    """A library may turn it into its own error, Python may print and forget it, and it may come twice."""
    words = [sys.executable, "-c", CONSOLE % moment]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (130, "rime: stopped.\n")


def test_a_fault_without_ctrl_c_is_shown() -> None:
    words = [sys.executable, "-c", CONSOLE % "lambda: 1 // 0"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


#: A process of a run, at whose end a thread still exchanges tensors; ``main`` returns its exit code.
EXCHANGING = """
import atexit, threading, time, torch
import torch.distributed as dist
from rime_pl import __main__ as m
def busy():
    while True:
        dist.all_gather([torch.empty(1000)], torch.ones(1000))
def main():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    threading.Thread(target=busy, daemon=True).start()
    time.sleep(0.3)
    print("all is written")
    return 3
m.main = main
atexit.register(print, "workers are ended")
m.console()
"""


def test_one_of_several_processes_ends_with_its_own_code() -> None:
    """In Python's own last steps a thread of gloo aborted it, now and then, after all was done."""
    words = [sys.executable, "-c", EXCHANGING]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "all is written\nworkers are ended\n"
