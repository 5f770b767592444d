"""Corpora that lie elsewhere: their files are copied into a cache of limited size when they are needed.

corpus_file.py and shards.py open remote corpora with it, and readers ask it for tars. A place is a URL of any
file system of fsspec (http, s3, gs, hf ...) or ``pipe:COMMAND``, which runs a command of the user's own
settings. No file of a corpus is ever taken for a place.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rime_pl.bounds import at_least, greater_than_0
from rime_pl.errors import DataError, RimeError

PIPE = "pipe:"
_READ = 1 << 20  # bytes that are read at once
_BLOCK = 8 << 20  # bytes of a request
_LONGEST_WAIT = 30.0  # seconds
_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class CacheSettings:
    """Where the files of remote corpora are kept.

    Args:
        folder: Folder of the cache (default: ~/.cache/rime_pl/shards). Processes may share it.
        gib: Size of the cache in GiB. The tars used longest ago go first. Those being copied come on top.
        retries: Number of further tries of a copy that fails without a byte; with bytes, it goes on.
        wait: Seconds before the first further try; each next wait is twice as long, up to 30 seconds.
    """

    folder: str | None = None
    gib: float = 50.0
    retries: int = 5
    wait: float = 1.0

    def check(self) -> None:
        """Raise a RimeError if a setting is out of bounds."""
        greater_than_0("data.cache", self, "gib", "wait")
        at_least(0, "data.cache", self, "retries")

    @property
    def path(self) -> Path:
        return Path(self.folder or "~/.cache/rime_pl/shards").expanduser()


def is_remote(path: str | Path) -> bool:
    """Return whether ``data.path`` names a corpus that lies elsewhere.

    Example:
        >>> is_remote("https://example.org/corpus"), is_remote("pipe:cat /mnt/corpus/{}"), is_remote("data/a")
        (True, True, False)
    """
    return "://" in str(path) or str(path).startswith(PIPE)


class _TryAgain(Exception):
    """A copy that failed and may succeed later."""


@dataclass(frozen=True)
class RemoteFolder:
    """A remote corpus and the folder of the cache that holds its files.

    Args:
        place: URL, or ``pipe:COMMAND`` in which {} stands for the name of a file.
        cache: Settings of the cache.
        version: What names the folder of the cache besides the place: a changed corpus gets another one.
    """

    place: str
    cache: CacheSettings
    version: str = ""

    @property
    def folder(self) -> Path:
        name = hashlib.sha256(f"{self.place}\n{self.version}".encode()).hexdigest()[:24]
        return self.cache.path / name

    def file(self, name: str, sha256: str | None = None, size: int | None = None) -> Path:
        """Return the copy of a file, which is made if it is not there.

        Args:
            name: Relative name in the corpus, such as "train/train-000000.tar".
            sha256, size: What the copy must be; None if that is not known.

        Raises:
            DataError: If the corpus has no such file, or if it has other bytes than its index says.
            RimeError: If it cannot be copied.
        """
        target = self.folder / name
        if target.exists():
            with contextlib.suppress(FileNotFoundError):
                os.utime(target)  # used now
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target.with_name(f".{target.name}.lock")):
                if not target.exists():
                    part = target.with_name(f"{target.name}.part")
                    self._copy(name, part, sha256, size)
                    part.replace(target)
                    self._make_room(target)
        except OSError as error:
            raise RimeError(
                f"The cache {self.cache.path} must take {name} of {self.place}, but it cannot: {error}. Free "
                "the disk, or set data.cache.folder or data.cache.gib."
            ) from error
        return target

    def forget(self, name: str) -> None:
        """Remove the copy of a file that turned out to be something else, so that it is copied again."""
        (self.folder / name).unlink(missing_ok=True)

    def refuse_larger(self, size: int) -> None:
        """Raise a RimeError if the cache cannot hold a tar of this size."""
        if size > self.cache.gib * 2**30:
            raise RimeError(
                f"data.cache.gib must be at least {size / 2**30:.3g}, the size of the largest tar of "
                f"{self.place}, but is {self.cache.gib}."
            )

    def _copy(self, name: str, part: Path, sha256: str | None, size: int | None) -> None:
        failures = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if self.place.startswith(PIPE):
                    _run(self.place.removeprefix(PIPE), name, part)
                else:
                    most = int(self.cache.gib * 2**30) if size is None else size
                    _download(f"{self.place.rstrip('/')}/{name}", part, most)
                _refuse_other(part, sha256, size)
                return
            except _TryAgain as error:
                after = part.stat().st_size if part.exists() else 0
                failures = 0 if after > before else failures + 1
                if failures > self.cache.retries:
                    raise RimeError(
                        f"{name} of {self.place} must be readable, but is not after {failures} tries: "
                        f"{error}. Check the network and the server, then start the same command again; the "
                        "copy goes on."
                    ) from error
                time.sleep(min(self.cache.wait * 2 ** max(0, failures - 1), _LONGEST_WAIT))

    def _make_room(self, newest: Path) -> None:
        """Remove the tars used longest ago until the cache has its size; open ones stay readable."""
        limit = self.cache.gib * 2**30
        with _lock(self.cache.path / ".lock"):
            used = []
            for tar in self.cache.path.glob("*/*/*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    about = tar.stat()
                    used.append((about.st_mtime_ns, about.st_size, tar))
            total = sum(size for _, size, _ in used)
            for _, size, tar in sorted(used):
                if total <= limit:
                    return
                if tar != newest:
                    tar.unlink(missing_ok=True)
                    total -= size


@functools.cache
def open_remote(place: str, cache: CacheSettings) -> tuple[RemoteFolder, bytes]:
    """Return a remote corpus and its ``corpus.json``, which is read once by each process.

    Raises:
        DataError: If there is no such file.
        RimeError: If it cannot be copied.
    """
    if place.startswith(PIPE) and "{}" not in place:
        raise RimeError(
            f"data.path must be 'pipe:COMMAND' with {{}} where the name of a file belongs, but is {place!r}."
        )
    fresh = RemoteFolder(place, cache, f"{os.getpid()} {time.time_ns()}")
    try:
        content = fresh.file("corpus.json").read_bytes()
    finally:
        for file in [*fresh.folder.glob("*"), *fresh.folder.glob(".*.lock")]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fresh.folder.rmdir()
    return RemoteFolder(place, cache, hashlib.sha256(content).hexdigest()), content


def _download(url: str, part: Path, most: int) -> None:
    """Append the rest of a file to what is there of it; a server that cannot resume begins again.

    A file of more than ``most`` bytes is refused: a server may send without end.
    """
    start = part.stat().st_size if part.exists() else 0
    try:
        with _opened(url, _BLOCK) as remote:
            if start:
                remote.seek(start)
            _append(remote, part, start, most)
    except (ValueError, NotImplementedError):  # what fsspec raises if a server has no ranges
        with _opened(url, 0) as remote:  # 0: the whole file, from its beginning
            _append(remote, part, 0, most)


def _append(remote: Any, part: Path, start: int, most: int) -> None:
    with part.open("r+b" if part.exists() else "wb") as file:
        file.seek(start)
        file.truncate()
        while block := _read(remote):
            if file.tell() + len(block) > most:
                file.truncate(0)
                raise _TryAgain(f"it must have at most {most:,} bytes, but more came")
            file.write(block)


def _opened(url: str, block_size: int) -> Any:
    """Open a remote file, to be read in blocks.

    Raises:
        DataError: If there is none.
        RimeError: If fsspec does not know the protocol, or needs a package for it.
        _TryAgain: If the server fails.
    """
    from fsspec.core import url_to_fs  # only remote corpora need it

    try:
        system, path = url_to_fs(url, **_options(url))
    except (ImportError, ValueError) as error:
        raise RimeError(f"data.path: {url} cannot be opened: {error}") from error
    try:
        return system.open(path, "rb", block_size=block_size)
    except (FileNotFoundError, PermissionError) as error:
        cause = error.__cause__  # fsspec says "not found" of a server that fails, too
        if (
            cause is None
            or isinstance(cause, FileNotFoundError)
            or getattr(cause, "status", 0) in range(400, 500)
        ):
            raise DataError(f"{url} must be there and readable, but is not. Check data.path.") from error
        raise _TryAgain(str(cause) or type(cause).__name__) from error
    except Exception as error:
        raise _TryAgain(str(error) or type(error).__name__) from error


def _read(remote: Any) -> bytes:
    """Return the next bytes; whatever a file system raises, the copy may go on later."""
    try:
        return bytes(remote.read(_READ))
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:
        raise _TryAgain(str(error) or type(error).__name__) from error


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
    return {"client_kwargs": {"timeout": timeout}}


def _run(command: str, name: str, part: Path) -> None:
    """Write what the user's command prints for a file."""
    with part.open("wb") as file:
        done = subprocess.run(
            command.replace("{}", shlex.quote(name)),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
        )
    if done.returncode:
        part.unlink()
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise _TryAgain(f"the command ended with code {done.returncode}: {said}")


def _refuse_other(part: Path, sha256: str | None, size: int | None) -> None:
    """Begin again if a copy is not what the index says."""
    found = part.stat().st_size
    if size is not None and found < size:
        raise _TryAgain(f"it must have {size} bytes, but {found} came")
    if sha256 is None:
        return
    with part.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return
    part.unlink()
    raise _TryAgain("its bytes are not those that the index of the corpus was made of")


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process or worker at a time do what follows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
