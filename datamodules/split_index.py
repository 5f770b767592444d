"""The index of a split: columns in a file that is mapped into memory, and a file of names beside it.

A split of ten million pairs has an index of 0.6 GB. It is mapped, so all processes share its pages and none
holds an object for each pair. Names are read only when one is needed. Written by index_writer.py, opened by
shards.py.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rime_pl.datamodules.remote import RemoteFolder
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.datamodules.tar_samples import members_of
from rime_pl.errors import DataError

#: The version of the format of a corpus: 1 had a JSON index for each tar.
FORMAT_VERSION = 2
#: Files of a split beside its tars: facts of the tars, the columns, and the names.
INDEX_FILES = FACTS, COLUMNS_FILE, NAMES = "index.json", "index.columns", "index.names"
#: Name and type of each column, in the order of the file; 58 bytes a pair.
COLUMNS: dict[str, np.dtype[Any]] = {
    "offset": np.dtype("<u8"),  # of the sample's first byte in its tar
    "name": np.dtype("<u8"),  # offset of its names in the file of names
    "query_content": np.dtype("<i8"),  # content_hash of the query's content id
    "target_content": np.dtype("<i8"),
    "draw": np.dtype("<i8"),  # decides at which share of annotated pairs the pair keeps its rewrites
    "size": np.dtype("<u4"),  # bytes of the sample, headers and padding included
    "visual_tokens": np.dtype("<u4"),  # of both sides: cells of 28 x 28 pixels, before any limit
    "text_tokens": np.dtype("<u4"),  # of both sides: bytes of instruction, text and rewrite, divided by 4
    "task": np.dtype("<u2"),  # number in the list of tasks
    "gallery": np.dtype("<u2"),
    "modality": np.dtype("u1"),  # bits 0 to 3: text, picture, clip, page of the query; 4 to 7: of the target
    "flags": np.dtype("u1"),  # has a query, a rewrite of the query, a rewrite of the target
}
BYTES_PER_PAIR = sum(kind.itemsize for kind in COLUMNS.values())
HAS_QUERY, QUERY_REWRITE, TARGET_REWRITE = 1, 2, 4
#: Where a corpus with a missing, old or damaged index is sent.
INDEX_AGAIN = "Build the corpus again, or make its index again: `rime shards index --path FOLDER`."
_LINE = 1 << 12  # bytes that hold the names of nearly every sample
_CHUNK = 1 << 20  # rows that are checked at once


#: Key, content ids of query (None without one) and target, CRC-32 of the sample.
Names: TypeAlias = tuple[str, str | None, str, int | None]


@dataclass(frozen=True)
class Shard:
    """One tar as the index knows it."""

    name: str
    size: int  # bytes
    sha256: str
    samples: int


@dataclass(frozen=True)
class Entry:
    """One sample as the index describes it, made when it is asked for; its tar is not read."""

    index: SplitIndex
    row: int

    @cached_property
    def shard(self) -> Path:
        """The tar: where it lies, or where its copy will lie."""
        return self.index.path_of(self.row)

    @property
    def fetch(self) -> Callable[[], object] | None:
        """Function that copies the tar of a remote corpus into its place; None for a local one."""
        remote, shard = self.index.remote, self.index.shard_of(self.row)
        name = f"{self.index.folder.name}/{shard.name}"
        return None if remote is None else partial(remote.file, name, shard.sha256, shard.size)

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte of the sample in its tar, and its number of bytes."""
        return int(self.index.columns["offset"][self.row]), int(self.index.columns["size"][self.row])

    @property
    def key(self) -> str:
        return self._names[0]

    @cached_property
    def _names(self) -> Names:
        return self.index.names_of(self.row)

    @property
    def crc32(self) -> int | None:
        """The CRC-32 of the bytes of the sample in its tar; None in an index of before, which has none."""
        return self._names[3]

    @property
    def query_content(self) -> str | None:
        """The content id of the query; None if the sample has no query."""
        return self._names[1]

    @property
    def target_content(self) -> str:
        return self._names[2]

    @property
    def dataset(self) -> str:
        return self.index.tasks[self.index.columns["task"][self.row]]

    @property
    def gallery(self) -> str:
        return self.index.galleries[self.index.columns["gallery"][self.row]]

    @property
    def has_query(self) -> bool:
        return bool(self.index.columns["flags"][self.row] & HAS_QUERY)

    @property
    def has_rewrite(self) -> tuple[bool, bool]:
        """Whether the query and the target have a rewrite."""
        flags = int(self.index.columns["flags"][self.row])
        return bool(flags & QUERY_REWRITE), bool(flags & TARGET_REWRITE)

    @cached_property
    def name(self) -> str:
        """The unique name of the sample in its corpus, ``<tar>/<key>``; every error names it."""
        return f"{self.index.prefix}{self.shard.name}/{self.key}"

    @property
    def members(self) -> dict[str, tuple[int, int]]:
        """The members, "json", "q0.png" ... -> (byte offset, size); the tar is read for them."""
        start, size = self.extent
        block = TarFiles(limit=1).read(self.shard, start, size, self.fetch)
        try:
            found = members_of(block, self.key)
        except ValueError as error:
            raise DataError(
                f"{self.name}: the index must point at the sample, but {error}. {INDEX_AGAIN}"
            ) from error
        return {name: (start + offset, length) for name, (offset, length) in found.items()}


class SplitIndex:
    """The index of one split. It is opened anew in a process that gets it by pickle.

    Args:
        folder: Folder of the split, which holds the files of the index; the tars may come there later.
        prefix: Text before the name of a sample, to tell corpora apart.
        remote: Where the corpus lies, if the folder is that of a cache.

    Raises:
        DataError: If a file is missing, damaged or of another version.
    """

    def __init__(self, folder: Path, prefix: str = "", remote: RemoteFolder | None = None) -> None:
        self.folder, self.prefix, self.remote = folder, prefix, remote
        facts = self._facts()
        try:
            self.tasks, self.galleries = (_texts(facts[name]) for name in ("tasks", "galleries"))
            self.shards = [Shard(str(n), int(s), str(h), int(c)) for n, s, h, c in facts["shards"]]
            self.sha256 = {name: str(facts["sha256"][name]) for name in (COLUMNS_FILE, NAMES)}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{folder / FACTS}: is malformed ({error!r}). {INDEX_AGAIN}") from error
        if remote is not None:
            remote.refuse_larger(max((shard.size for shard in self.shards), default=0))
            for name, sha256 in self.sha256.items():
                remote.file(f"{folder.name}/{name}", sha256)
        counts = [shard.samples for shard in self.shards]
        if any(count < 0 for count in counts) or any(shard.size < 0 for shard in self.shards):
            raise DataError(f"{folder / FACTS}: numbers must be at least 0, but one is not. {INDEX_AGAIN}")
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # first row of each tar
        self._paths: dict[int, Path] = {}
        self._firsts = self.starts.tolist()  # for single rows it is faster
        self._map()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("columns", "_names")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _facts(self) -> dict[str, Any]:
        if self.remote:
            self.remote.file(f"{self.folder.name}/{FACTS}")  # nothing says what its bytes must be
        for name in INDEX_FILES if self.remote is None else ():
            if not (self.folder / name).is_file():
                raise DataError(f"{self.folder / name}: this file of the index is missing. {INDEX_AGAIN}")
        file = self.folder / FACTS
        try:
            facts = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            if self.remote:
                self.remote.forget(f"{self.folder.name}/{FACTS}")
            raise DataError(f"{file}: malformed JSON ({error}). {INDEX_AGAIN}") from error
        if not isinstance(facts, dict) or facts.get("format") != FORMAT_VERSION:
            found = facts.get("format") if isinstance(facts, dict) else facts
            raise DataError(f"{file}: 'format' must be {FORMAT_VERSION}, but is {found!r:.90}. {INDEX_AGAIN}")
        return facts

    def _map(self) -> None:
        file, rows = self.folder / COLUMNS_FILE, len(self)
        if (size := file.stat().st_size) != rows * BYTES_PER_PAIR:
            raise DataError(
                f"{file}: must have {rows * BYTES_PER_PAIR} bytes, {BYTES_PER_PAIR} for each of {rows} "
                f"samples, but has {size}. {INDEX_AGAIN}"
            )
        self.columns: dict[str, NDArray[Any]] = {}
        mapped = np.memmap(file, np.uint8, "r") if rows else np.empty(0, np.uint8)
        position = 0
        for name, kind in COLUMNS.items():
            end = position + rows * kind.itemsize
            self.columns[name] = mapped[position:end].view(kind).view(np.ndarray)
            position = end
        self._names: NDArray[Any] | None = None

    def shard_of(self, row: int) -> Shard:
        return self.shards[self.shard_number(row)]

    def path_of(self, row: int) -> Path:
        """Return the tar of a sample; a path is made once, because that takes long."""
        number = self.shard_number(row)
        if number not in self._paths:
            self._paths[number] = self.folder / self.shards[number].name
        return self._paths[number]

    def shard_number(self, row: int) -> int:
        return bisect_right(self._firsts, row) - 1

    def names_of(self, row: int) -> Names:
        """Return what the file of names says of a sample."""
        if self._names is None:
            self._names = np.memmap(self.folder / NAMES, np.uint8, "r").view(np.ndarray)
        begin, line = int(self.columns["name"][row]), b""
        for size in (_LINE, len(self._names)):
            line, newline, _ = self._names[begin : begin + size].tobytes().partition(b"\n")
            if newline:
                break
        try:
            key, query, target, crc32 = [*json.loads(line.decode()), None][:4]
            if not (isinstance(key, str) and isinstance(query, str | None) and isinstance(target, str)):
                raise TypeError("names must be texts")
            if not isinstance(crc32, int | None):
                raise TypeError("a CRC-32 must be a number")
        except (ValueError, TypeError, RecursionError) as error:
            where = self.shard_of(row).name
            raise DataError(
                f"{self.prefix}{where}: the names of sample {row} in {self.folder / NAMES} are malformed "
                f"({error}). {INDEX_AGAIN}"
            ) from error
        return key, query, target, crc32

    def check(self) -> None:
        """Raise a DataError if a tar is missing or of another size, or if a row points outside its tar."""
        for shard in self.shards if self.remote is None else ():
            file = self.folder / shard.name
            if not file.is_file():  # to read a pipe or a device may never end
                raise DataError(
                    f"{file}: this file is missing or no file, but the index lists it. {INDEX_AGAIN}"
                )
            size = file.stat().st_size
            if size != shard.size:
                raise DataError(
                    f"{file}: the tar must have {shard.size} bytes, as its index says, but has {size}. Is it "
                    "truncated? Copy it or build it again."
                )
        sizes = np.array([shard.size for shard in self.shards], np.uint64)
        for begin in range(0, len(self), _CHUNK):
            rows = np.arange(begin, min(begin + _CHUNK, len(self)))
            shards = np.searchsorted(self.starts, rows, "right") - 1
            part = slice(begin, begin + len(rows))
            end = self.columns["offset"][part] + self.columns["size"][part]
            wrong = (end > sizes[shards]) | (end < self.columns["offset"][part])
            wrong |= self.columns["task"][part] >= len(self.tasks)
            wrong |= self.columns["gallery"][part] >= len(self.galleries)
            if wrong.any():
                row = begin + int(wrong.argmax())
                raise DataError(
                    f"{self.folder / COLUMNS_FILE}: sample {row} of {self.shard_of(row).name} must lie "
                    f"in its tar and have a task and a gallery of {FACTS}, but does not. {INDEX_AGAIN}"
                )

    def changed_files(self) -> Iterator[Path]:
        """Yield the tars and files of the index whose bytes are not those that the index was made of.

        Those of a remote corpus were compared when they were copied.
        """
        if self.remote is not None:
            return
        for shard in self.shards:
            if _sha256(self.folder / shard.name) != shard.sha256:
                yield self.folder / shard.name
        for name, sha256 in self.sha256.items():
            if _sha256(self.folder / name) != sha256:
                yield self.folder / name


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names must be a list of texts")
    "".join(values).encode()  # half a character is no name
    return values


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
