"""One process at a time works in a run folder, and a run that never began leaves nothing behind.

Used by `rime STAGE` (cli.py), `rime run` and `rime runs`. The lock is the operating system's, on an open
file. It ends with its process, also when that is killed, so a lock is never stale. The file says whose it is.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rime_pl.errors import RimeError
from rime_pl.run_folder import CONTROLS, RunFolder

#: Seconds that a start waits for a process that only looks whether the lock is held.
PATIENCE = 1.0
#: What a stage writes into its folder before the first checkpoint: a run that leaves nothing leaves none.
OWN = ("config.yaml", "origin.json", "tensorboard", "checkpoints", "adapter.half")
#: What a file system without locks answers.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_held: set[int] = set()


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now, " ".join(["rime", *sys.argv[1:]]))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since} ({self.command})"


def holder(run: RunFolder) -> Holder | None:
    """Return the process that works in a run folder; None if there is none."""
    try:
        file = os.open(run.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(file)
    except OSError:
        return None
    finally:
        os.close(file)
    return None


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold the lock of a run folder, which must exist.

    Raises:
        RimeError: If another process holds it; the message names that process.
    """
    file = _take(run)
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        run.lock.unlink(missing_ok=True)  # before the lock ends: who has opened this file looks again
        os.close(file)


@contextmanager
def claimed(run: RunFolder) -> Iterator[None]:
    """Make and lock a run folder; after an error before anything was saved, leave it as it was found.

    Raises:
        RimeError: If another process works in the folder, or has just finished the run.
    """
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.path.mkdir(parents=True, exist_ok=True)
    finished = run.finished
    try:
        with locked(run):
            if run.finished and not finished:
                raise RimeError(f"{run} was finished by another process just now.")
            files, saved = _contents(run), _saved(run)
            try:
                yield
            except BaseException:
                if _saved(run) == saved:
                    _restore(run, files)
                raise
    except BaseException:
        for folder in made:  # the deepest first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def give_up(run: RunFolder) -> None:
    """Free a folder in which nothing was trained, unless another process works in it by now."""
    with suppress(RimeError), locked(run):
        run.give_up()
    with suppress(OSError):  # not empty
        run.path.rmdir()
        run.path.parent.rmdir()


def _take(run: RunFolder) -> int:
    """Return the open lock file, locked by this process."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = os.open(run.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(file)
            os.close(file)
            if time.monotonic() > deadline:
                raise RimeError(
                    f"{run} is in use by {other or 'another process'}. Wait until it ends, stop it, or "
                    "choose another folder."
                ) from None
            time.sleep(0.05)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{run}: no locks on this file system. Start no second process in this folder.")
        if _is_at(file, run.lock):
            os.ftruncate(file, 0)
            os.write(file, json.dumps(asdict(Holder.this_process())).encode())
            return file
        os.close(file)  # its last owner has removed it


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(file, 1 << 16, 0)))
    except (ValueError, TypeError):  # it is being written
        return None


def _saved(run: RunFolder) -> dict[Path, int]:
    """Return the times of the files that make a run worth keeping."""
    files = (*run.last_checkpoint.parent.glob("*.ckpt"), *run.path.glob("summary.json"))
    return {file: file.stat().st_mtime_ns for file in files}


def _contents(run: RunFolder) -> dict[Path, bytes | None]:
    """Return the paths in a run folder, without its controls, and what a start may overwrite."""
    kept = {run.config, run.path / "tensorboard" / "hparams.yaml"}
    paths = (path for path in run.path.rglob("*") if path.relative_to(run.path).parts[0] != CONTROLS)
    return {path: path.read_bytes() if path in kept else None for path in paths}


def _restore(run: RunFolder, files: dict[Path, bytes | None]) -> None:
    for path in _contents(run).keys() - files.keys():
        if path.relative_to(run.path).parts[0] not in OWN:
            continue  # of somebody else: notes, a search that runs meanwhile
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path, content in files.items():
        if content is not None and (not path.is_file() or path.read_bytes() != content):
            path.write_bytes(content)


def _let_go() -> None:
    """Close the locks in a forked process, such as a data worker, which may outlive a killed parent."""
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
