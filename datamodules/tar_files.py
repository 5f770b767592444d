"""Reads bytes of tars by their offset, and keeps only the tars that were read last open.

A corpus may have thousands of tars, but a process may have only about a thousand files open. shards.py
uses it.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from rime_pl.errors import RimeError

#: Tars that are open at once: a small part of the 256 to 1,024 files that systems allow a process.
MAX_OPEN = 64

_REMEDIES = {
    errno.EMFILE: "Allow this process more open files: `ulimit -n 4096`.",
    errno.ENFILE: "Close other programs, or allow this machine more open files.",
    errno.ENOMEM: "Close other programs, or set data.num_workers lower.",
    errno.ENOENT: "Was the corpus moved or built again while it was in use? Start the same command again.",
    errno.EACCES: "Allow this user to read the corpus.",
}
_TRIES = 3  # to open a tar of the cache before another process removes it
_CHECK_DISK = "Check the disk or the network share, then start the same command again."


class TarFiles:
    """Open tars of one process. A forked worker can use what it inherits, and closes only its own copies.

    Args:
        limit: Number of tars that are open at once; the one that was read longest ago is closed first.
    """

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self.limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}  # a spawned worker opens the tars itself

    def __setstate__(self, state: dict[str, int]) -> None:
        self.limit, self._open = state["limit"], OrderedDict()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def read(self, tar: Path, offset: int, size: int, fetch: Callable[[], object] | None = None) -> bytes:
        """Return ``size`` bytes of a tar from ``offset`` on; fewer if the tar ends before.

        Args:
            tar, offset, size: What to read.
            fetch: Function that puts the tar in its place before it is opened; None if it is there.

        Raises:
            RimeError: If the machine fails. It is no DataError: no sample is to blame, so none is skipped.
        """
        try:
            # pread does not move a shared file position, so a forked worker can use inherited descriptors
            return os.pread(self._descriptor(tar, fetch), size, offset)
        except (OSError, MemoryError) as error:
            number = error.errno or 0 if isinstance(error, OSError) else errno.ENOMEM
            raise RimeError(
                f"{tar} must be readable, but the machine fails to read it: {os.strerror(number)}. This is "
                "not a broken sample, so data.max_broken_share does not skip it. "
                f"{_REMEDIES.get(number, _CHECK_DISK)}"
            ) from error

    def _descriptor(self, tar: Path, fetch: Callable[[], object] | None) -> int:
        if tar in self._open:
            self._open.move_to_end(tar)
        else:
            while len(self._open) >= self.limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = _opened(tar, fetch)
        return self._open[tar]


def _opened(tar: Path, fetch: Callable[[], object] | None) -> int:
    for _ in range(_TRIES if fetch else 0):
        assert fetch is not None
        fetch()
        try:
            return os.open(tar, os.O_RDONLY)
        except FileNotFoundError:  # another process has made room in the cache just now
            continue
    return os.open(tar, os.O_RDONLY)
