"""Replaces a folder as a whole: the new one is built beside it, so that a failure leaves the old one.

Called by shard_writer.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rime_pl.errors import RimeError


@contextmanager
def replacing(output: Path, strangers: Callable[[Path], list[str]]) -> Iterator[Path]:
    """Give an empty folder to build in; it becomes ``output`` if the block ends without an error.

    A process that is killed leaves a hidden folder beside ``output``, and the next build takes it away.

    Args:
        output: Folder to replace, or to make.
        strangers: Function that returns the files in a folder that must not be lost.

    Raises:
        RimeError: If ``output`` is no folder or holds such files, if another process builds it just now, or
            if it cannot be written.
    """
    output = output.resolve()  # a link stays a link: the folder that it names is replaced
    new, old = _beside(output, "building"), _beside(output, "old")
    try:
        new.mkdir(parents=True, exist_ok=True)
        lock = os.open(new, os.O_RDONLY)
        try:
            _lock(lock, output)
            try:
                _clean_up(output, new, old)
                _refuse(output, strangers)
                yield new
                _refuse(output, strangers)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            if output.exists():
                output.rename(old)
            new.rename(output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        kept = " What was there is as it was." if output.exists() else ""
        raise RimeError(f"{output} cannot be built: {error}.{kept}") from error


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


def _clean_up(output: Path, new: Path, old: Path) -> None:
    """Take away what a killed build left, and finish the two renames if the kill came between them."""
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    for path in new.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
