"""Starts `rime ...` as a process that may be killed at any moment, and says where a kill hit.

A forked process has torch and our code imported already: that saves 10 seconds for each start, and from there
on it is the command as a user types it. A typed process is `python -m rime_pl ...`, imports and all.
Used by kills.py.
"""

from __future__ import annotations

import importlib
import mmap
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_pl import cli
from rime_pl.__main__ import console
from rime_pl.callbacks.adapter_checkpoint import AdapterCheckpoint
from rime_pl.callbacks.retrieval_recall import RetrievalRecall
from rime_pl.callbacks.settings_record import SettingsRecord
from tests.stages.runs import ROOT

#: Where a process can be hit; the number of each is written to memory that this process shares with it.
PHASES = ("start", "training", "checkpoint", "evaluation", "end")
#: Seconds that no start takes, on a busy machine either.
LONG = 3600
#: Seconds without any work after which processes count as hanging.
PATIENCE = 90.0
#: Seconds between two looks at a process, and at all processes.
LOOK, LOOK_AROUND = 0.005, 0.05


@dataclass
class Started:
    """A process with a session of its own, so that all its children can be found.

    Args:
        pid: Number of the process and of its session.
        log: File with all that it prints.
        shared: One byte, the number of the phase; a typed process leaves it at 0.
        typed: Whether it is a new interpreter.
    """

    pid: int
    log: Path
    shared: mmap.mmap
    typed: bool
    before: int  # bytes in the log when it started
    code: int | None = None
    used: float = 0.0  # seconds of CPU
    _looked: float = 0.0  # when all processes were looked at
    _worked: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), 0.0))  # since when, CPU
    since: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        """Return what the process has printed."""
        return self.log.read_bytes()[self.before :].decode(errors="replace") if self.log.exists() else ""

    @property
    def phase(self) -> str:
        return PHASES[self.shared[0]]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def ended(self) -> bool:
        """Look whether the process has ended, and keep its exit code: below 0 for a signal."""
        if self.code is None:
            self.used = max(self.used, _cpu_seconds(self.pid))
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Wait for the end, for ``until``, or until all hang; return whether the process has ended."""
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end and not (until and until()) and not self.hangs():
            time.sleep(LOOK)
        return self.code is not None

    def wait_for_all(self) -> None:
        """Wait until all processes of the session have ended, or hang."""
        while not (self.ended() and not self.remaining()) and not self.hangs():
            time.sleep(LOOK_AROUND)

    def wait_for_child(self) -> None:
        """Wait until the process has started another one, or has ended."""
        while not self.ended() and not self.children() and not self.hangs():
            time.sleep(LOOK_AROUND)

    def hangs(self) -> bool:
        """Return whether the session has used no CPU time for a while, however busy the machine is."""
        now = time.monotonic()
        if now - self._looked < 5:
            return False
        used = sum(_cpu_seconds(pid) for pid in self.remaining())
        if abs(used - self._worked[1]) > 0.05:
            self._worked = (now, used)
        self._looked = now
        return now - self._worked[0] > PATIENCE

    def wait_until_used(self, seconds: float) -> bool:
        """Wait until the process has used so much CPU time; return whether it has ended before."""
        return self.wait(LONG, lambda: self.used >= seconds)

    def send(self, signum: int, everybody: bool = True) -> None:
        """Send a signal to the whole session, as a terminal does, or only to the first process."""
        with suppress(ProcessLookupError):
            (os.killpg if everybody else os.kill)(self.pid, signum)

    def remaining(self) -> list[int]:
        """Return the processes of the session that are still alive."""
        return [pid for pid, _, session in _processes() if session == self.pid]

    def children(self) -> list[int]:
        """Return the processes that the first process has started."""
        return [pid for pid, parent, _ in _processes() if parent == self.pid]

    def end_all(self) -> None:
        """Kill whatever is left."""
        for pid in self.remaining():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(10)


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of one process: a moment in it does not depend on what else the machine does."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield number, parent and session of each process that is alive."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if state not in "ZX":
                    yield int(folder.name), int(parent), int(session)


def start(words: Sequence[str], log: Path, temporary: Path, typed: bool = False) -> Started:
    """Start `rime WORDS`.

    Args:
        words: What follows `rime` on the command line.
        log: File that all output is added to.
        temporary: Folder for temporary files, so that what is left there is seen.
        typed: Whether to start a new interpreter.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    shared = mmap.mmap(-1, 1)
    before = log.stat().st_size if log.exists() else 0
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _become(list(words), log, temporary, shared, typed)
    return Started(pid, log, shared, typed, before)


def _become(words: list[str], log: Path, temporary: Path, shared: mmap.mmap, typed: bool) -> None:
    """Be the process; this never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(ROOT)
        for one in (signal.SIGINT, signal.SIGTERM):  # a shell lets its background jobs ignore Ctrl-C
            signal.signal(one, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(file, stream)
        os.environ |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if typed:
            os.environ |= {"PYTHONPATH": str(ROOT)}
            os.execv(sys.executable, [sys.executable, "-m", "rime_pl", *words])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None
        sys.argv = ["rime", *words]
        _report_phases(shared)
        try:
            console()
        finally:
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report_phases(shared: mmap.mmap) -> None:
    """Let the methods where a phase begins or ends write its number; what they do does not change."""
    _enter(SettingsRecord, "on_train_start", shared, "training")
    _enter(AdapterCheckpoint, "_save", shared, "checkpoint", leave=True)
    _enter(RetrievalRecall, "on_validation_epoch_start", shared, "evaluation")
    _enter(RetrievalRecall, "on_validation_epoch_end", shared, "evaluation", "training")
    _enter(AdapterCheckpoint, "write_adapter", shared, "end", leave=True)
    _enter(RetrievalRecall, "on_test_epoch_start", shared, "evaluation")
    _enter(RetrievalRecall, "on_test_epoch_end", shared, "evaluation", "end")
    _enter(cli, "finish", shared, "end")


def _enter(
    owner: Any, name: str, shared: mmap.mmap, phase: str, after: str | None = None, leave: bool = False
) -> None:
    method = getattr(owner, name)

    def reporting(*values: Any, **named: Any) -> Any:
        before, shared[0] = shared[0], PHASES.index(phase)
        try:
            return method(*values, **named)
        finally:
            if after or leave:
                shared[0] = before if leave else PHASES.index(str(after))

    setattr(owner, name, reporting)


def import_as(log: Path) -> None:
    """Import what a forked process had imported at its end, so that those after it need not."""
    for name in log.with_suffix(".modules").read_text().splitlines():
        if name not in sys.modules:
            with suppress(Exception):  # some modules are made, not imported
                importlib.import_module(name)


def in_child(work: Callable[[], Any]) -> None:
    """Do ``work`` in a forked process: threads that torch starts must not be there when we fork."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the micro corpus and base model could not be built; see above")


@contextmanager
def no_process_left(started: Started) -> Iterator[None]:
    """Kill what is left of a session, whatever happens."""
    try:
        yield
    finally:
        started.end_all()
