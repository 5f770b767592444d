"""Replaces a folder as a whole: the new one is built beside it, so that a failure leaves the old one.

A long build can go on where it was killed: what it has finished then stays beside the folder. Called by
shard_writer.py and builders/building.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rime_pl.errors import RimeError

#: What a build that can go on is, in its hidden folder.
_PLAN_FILE = "plan"


def state_of(output: Path) -> Path:
    """Return the hidden folder in which a build that can go on notes what it has finished."""
    return _beside(output.resolve(), "state")


@contextmanager
def replacing(output: Path, strangers: Callable[[Path], list[str]], plan: str = "") -> Iterator[Path]:
    """Give a folder to build in; it becomes ``output`` if the block ends without an error.

    It is empty, unless a build with the same ``plan`` has noted there what it has finished. Without a plan, a
    process that is killed leaves a hidden folder beside ``output``, and the next build takes it away.

    Args:
        output: Folder to replace, or to make.
        strangers: Function that returns the files in a folder that must not be lost.
        plan: Name of what is built; "" if it cannot go on.

    Raises:
        RimeError: If ``output`` is no folder or holds such files, if another process builds it just now, or
            if it cannot be written.
    """
    output = output.resolve()  # a link stays a link: the folder that it names is replaced
    new, old, state = (_beside(output, what) for what in ("building", "old", "state"))
    try:
        new.mkdir(parents=True, exist_ok=True)
        lock = os.open(new, os.O_RDONLY)
        try:
            _lock(lock, output)
            try:
                _clean_up(output, new, old, state, plan)
                _refuse(output, strangers)
                yield new
                _refuse(output, strangers)
            except BaseException:
                if not _has_finished_parts(state):
                    shutil.rmtree(new, ignore_errors=True)
                    shutil.rmtree(state, ignore_errors=True)
                raise
            if output.exists():
                output.rename(old)
            new.rename(output)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(state, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        kept = " What was there is as it was." if output.exists() else ""
        if _has_finished_parts(state):
            kept += " What is finished is kept, and the same command goes on."
        raise RimeError(f"{output} cannot be built: {error}.{kept}") from error


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


def _clean_up(output: Path, new: Path, old: Path, state: Path, plan: str) -> None:
    """Take away what a killed build left, and finish the two renames if the kill came between them.

    What a build with the same plan has finished stays.
    """
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    file = state / _PLAN_FILE
    if plan and file.is_file() and file.read_bytes() == plan.encode():
        return
    shutil.rmtree(state, ignore_errors=True)
    for path in new.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if plan:
        state.mkdir()
        file.write_bytes(plan.encode())


def _has_finished_parts(state: Path) -> bool:
    return state.is_dir() and any(path.name != _PLAN_FILE for path in state.iterdir())


def _refuse(output: Path, strangers: Callable[[Path], list[str]]) -> None:
    if output.exists() and not output.is_dir():
        raise RimeError(f"--output must be a folder, but {output} is a file.")
    if os.path.ismount(output):
        raise RimeError(
            f"--output must not be a mount point, but {output} is one, and it cannot be replaced as a whole. "
            f"Give a folder below it, such as {output / 'corpus'}."
        )
    if output.exists() and (names := strangers(output)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RimeError(
            f"--output must be a new folder or a corpus, because it is replaced, but {output} also holds "
            f"{', '.join(names[:3])}{more}. Move these files, or give another folder."
        )


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RimeError(
            f"Another process builds {output} just now. Wait for it, or give another --output."
        ) from error
    except OSError:  # some network file systems cannot lock a folder
        pass
