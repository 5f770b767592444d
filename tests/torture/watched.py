"""Gives mutated inputs to their readers in a process that is watched: time, memory, files, pickles, messages.

mutations.py starts it, once for each kind of file. What a case is and how it ends is defined here.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError

#: Seconds of work that one input may take. It may wait ``WAITING`` times as long, and its process is ended
#: ``PATIENCE`` seconds later.
SECONDS, WAITING, PATIENCE = 30, 4, 10
#: Bytes of address space that one input may take, on top of what its process had before.
MEMORY = 2 << 30
#: File that an unpickled payload would make, next to the folder of the input.
MARKER = "unpickled"
#: Ends of an input, in the order of the table's columns.
GOOD = ("same", "other", "refused", "counted")
BAD = ("accepted", "hang", "traceback", "memory", "outside", "unpickled", "nameless")


@dataclass(frozen=True)
class Reading:
    """What a reader made of an input: a digest of the result, and what it said of parts that it left out."""

    result: str
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One mutated input."""

    change: str  # what was changed, such as "PNG: header says 60000 x 60000"
    write: Callable[[Path], object]  # writes the input into an empty folder
    read: Callable[[Path], Reading]
    names: tuple[str, ...]  # each message must contain one of these
    original: str = ""  # digest of what the unchanged input gives
    must: bool = False  # whether it must not be read as if it were good


@dataclass
class Outcome:
    """How a case ended."""

    change: str
    ends: set[str] = field(default_factory=set)  # of GOOD and BAD
    said: str = ""  # messages, or the traceback
    result: str = ""  # digest of what was read


class HangError(BaseException):
    """The time of an input is over. No handler of ordinary errors catches it."""


def watch(cases: Sequence[Case], work: Path, seconds: float = SECONDS, memory: int = MEMORY) -> list[Outcome]:
    """Return how each case ended. A case that cannot be stopped from within is killed.

    Args:
        cases: The inputs; their functions are called in a forked process.
        work: Folder to work in.
        seconds: Time of one input.
        memory: Bytes that one input may take.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        here, there = multiprocessing.Pipe(duplex=False)
        rest = cases[len(outcomes) :]
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(rest, work, seconds, memory, there)
        )
        process.start()
        there.close()
        outcomes += _received(here, len(rest), seconds)
        if len(outcomes) < len(cases) and process.is_alive():
            process.kill()
        process.join()
        if len(outcomes) < len(cases):
            change = cases[len(outcomes)].change
            died = process.exitcode != -signal.SIGKILL
            said = f"the process ended with {process.exitcode}" if died else f"killed after {seconds} s"
            outcomes.append(Outcome(change, {"traceback" if died else "hang"}, said))
    return outcomes


def result_of(case: Case, work: Path) -> str:
    """Return what an unchanged input gives, read in a process of its own.

    Raises:
        AssertionError: If it is not read without a word: then the cases that start from it show nothing.
    """
    (found,) = watch([case], work)
    assert found.ends == {"other"}, f"{case.change}: {found.ends}\n{found.said}"
    return found.result


def _received(pipe: Connection, number: int, seconds: float) -> Iterator[Outcome]:
    for _ in range(number):
        try:
            if not pipe.poll(WAITING * seconds + PATIENCE):
                return
            yield pipe.recv()
        except EOFError:
            return


def _work(cases: Sequence[Case], work: Path, seconds: float, memory: int, pipe: Connection) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for case in cases:
            pipe.send(_outcome(case, work, seconds, memory))
    pipe.close()
    os._exit(0)  # without the exit handlers that this process inherited


def _outcome(case: Case, work: Path, seconds: float, memory: int) -> Outcome:
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "inside"
    folder.mkdir(parents=True)
    (work / "outside.txt").write_text("Nobody may change this file.")
    case.write(folder)
    found = Outcome(case.change)
    before = snapshot(work, folder)
    os.chdir(work)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        told = _read(case, folder, found, seconds, memory)
    told += [str(one.message) for one in warned if "/PIL/" in one.filename]
    found.ends |= {"nameless"} if any(not _names(case, message) for message in told) else set()
    marked = (work / MARKER).exists()
    found.ends |= {"unpickled"} if marked else set()
    (work / MARKER).unlink(missing_ok=True)
    if (after := snapshot(work, folder)) != before:
        found.ends.add("outside")
        found.said += f"\nchanged: {sorted(str(one) for one in before.items() ^ after.items())}"
    return found


def _read(case: Case, folder: Path, found: Outcome, seconds: float, memory: int) -> list[str]:
    """Read the input within its bounds, note how that ended, and return the messages."""
    told: list[str] = []
    try:
        with Bounded(seconds, memory):
            reading = case.read(folder)
    except RimeError as error:
        found.ends.add("refused")
        told = [str(error)]
    except HangError:
        found.ends.add("hang")
        found.said = traceback.format_exc()
    except MemoryError:
        found.ends.add("memory")
        found.said = traceback.format_exc()
    except BaseException:
        found.ends.add("traceback")
        found.said = traceback.format_exc()
    else:
        told, found.result = list(reading.told), reading.result
        found.ends.add("counted" if told else "same" if reading.result == case.original else "other")
        found.ends |= {"accepted"} if case.must and not told else set()
    found.said += "\n".join(told)
    return told


def _names(case: Case, message: str) -> bool:
    return any(name in message for name in case.names)


class Bounded:
    """Raises a HangError after ``seconds`` of work, or ``WAITING`` times as long; bounds the memory, too."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory

    def __enter__(self) -> None:
        def late(signum: int, _: Any) -> None:
            raise HangError(f"{self.seconds} s of {'work' if signum == signal.SIGPROF else 'waiting'}")

        for one in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(one, late)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + self.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        self._set(self.seconds)

    def __exit__(self, *_: object) -> None:
        self._set(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    @staticmethod
    def _set(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # other processes may leave little of the machine
        signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)


def snapshot(work: Path, without: Path) -> dict[Path, str]:
    """Return a digest of each file below ``work``, except those in one folder and the marker."""
    found = {}
    for path in sorted(work.rglob("*")):
        if path.is_relative_to(without) or path == work / MARKER:
            continue
        kind = os.lstat(path).st_mode
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[path] = f"{kind:o} {hashlib.sha256(content).hexdigest()}"
    return found


def digest(*parts: object) -> str:
    """Return a hash of values that have a repr, or are bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace"))
    return found.hexdigest()
