"""What a user wants to index, item by item, without opening media: a folder, a file, a table or a text.

`rime index` scans; index.py embeds. Each item has an id, a digest of its content, and references to its
media, which are opened when their batch is due. No file outside the root is opened. Tables:
table_items.py, corpora: corpus_targets.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_pl.clips import PAGE_SIDE, count_pages
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.paths import file_below
from rime_pl.datamodules.faults import counted
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.index_folder import Record
from rime_pl.inference.sources import SUFFIXES, VIDEO_SUFFIXES

DOCUMENTS = {".pdf"}
TEXTS = {".txt"}
#: A longer line is no text that a model reads.
_LONGEST = 1 << 20

#: Called with what is done and the whole, while a source is scanned.
Each = Callable[[int, int], object]


@dataclass(frozen=True)
class Stamp:
    """A file as it was before its content was looked at."""

    path: Path
    size: int
    changed: int  # ns

    @classmethod
    def of(cls, path: Path) -> Stamp:
        about = path.stat()
        return cls(path, about.st_size, about.st_mtime_ns)

    def holds(self) -> bool:
        """Return whether the file is still there, and was not written since."""
        try:
            return Stamp.of(self.path) == self
        except OSError:
            return False


@dataclass
class Scan:
    """The items of a source, in a fixed order."""

    kind: str  # see Facts.kind
    root: Path
    source: str = ""  # see Facts.source
    records: list[Record] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)  # id -> reason
    notes: list[str] = field(default_factory=list)
    stamps: dict[str, tuple[Stamp, ...]] = field(default_factory=dict)  # id -> the files of its media

    def add(self, record: Record, stamps: tuple[Stamp, ...] = ()) -> None:
        """Add an item and the files that its digest was made of; a text that no file can hold is unusable."""
        try:
            "".join((record.id, record.text, record.instruction, *record.media)).encode()
        except UnicodeEncodeError as error:
            self.refuse(record.id, f"must be text, but holds half a character ({error.object!a:.60}).")
            return
        self.records.append(record)
        if stamps:
            self.stamps[record.id] = stamps

    def changed(self, record: Record) -> Path | None:
        """Return a file of an item that is not as it was scanned; None if there is none."""
        return next((stamp.path for stamp in self.stamps.get(record.id, ()) if not stamp.holds()), None)

    def refuse(self, id: str, reason: str) -> None:
        """Count an item that cannot be used."""
        self.unusable[id.encode(errors="replace").decode()] = reason


def digest_of(*parts: Any) -> bytes:
    """Return a digest of what decides the vectors of an item."""
    shown = json.dumps(parts, default=lambda part: part.hex(), ensure_ascii=True)
    return hashlib.blake2b(shown.encode(), digest_size=16).digest()


def hash_file(stamp: Stamp) -> bytes:
    """Return the SHA-256 of a file; many rows may name one file, so the last ones are kept."""
    if stamp not in _hashes:
        if len(_hashes) > 4096:
            _hashes.clear()
        with stamp.path.open("rb") as file:
            _hashes[stamp] = hashlib.file_digest(file, "sha256").digest()
    return _hashes[stamp]


_hashes: dict[Stamp, bytes] = {}


def scan_folder(folder: Path, each: Each = lambda done, total: None) -> Scan:
    """Return the pictures, videos and pages of PDF files in a folder and below it, by name.

    Links to folders are not followed. A link to a file is used if the file lies below the folder.

    Raises:
        RimeError: If there is nothing of the kind in it.
    """
    found = Scan("files", folder)
    names, others = [], 0
    for name in _names(folder, found):
        if Path(name).suffix.lower() in SUFFIXES | VIDEO_SUFFIXES | DOCUMENTS:
            names.append(name)
        else:
            others += 1
    for number, name in enumerate(names):
        each(number, len(names))
        _add_file(found, name)
    each(len(names), len(names))
    if not names:
        raise RimeError(
            f"{folder} must hold pictures, videos or PDF files, but holds none "
            f"({', '.join(sorted(SUFFIXES | VIDEO_SUFFIXES | DOCUMENTS))})."
        )
    if others:
        found.notes.append(
            f"{counted(others, 'other file is', 'other files are')} no picture, video or PDF and left alone."
        )
    return found


def scan_file(path: Path) -> Scan:
    """Return the item of one picture or video, or the pages of one PDF; its root is its folder."""
    found = Scan("files", path.parent, path.name)
    _add_file(found, path.name)
    return found


def _names(folder: Path, found: Scan) -> Iterator[str]:
    """Yield the paths of files below a folder, in order; folders that cannot be read are counted."""

    def refuse(error: OSError) -> None:
        name = Path(str(error.filename)).relative_to(folder).as_posix()
        found.refuse(name, f"the folder cannot be read: {error.strerror}.")

    for place, folders, files in os.walk(folder, onerror=refuse):
        below = Path(place).relative_to(folder)
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                found.refuse((below / name).as_posix(), "is a link to a folder, which is not followed.")
        folders.sort()
        yield from ((below / name).as_posix() for name in sorted(files))


def _add_file(found: Scan, name: str) -> None:
    try:
        path = file_below(found.root, name)
        stamp = Stamp.of(path)
        content = hash_file(stamp)
        if path.suffix.lower() not in DOCUMENTS:
            found.add(Record(name, digest_of("file", content, path.suffix.lower()), (name,)), (stamp,))
            return
        for number in range(1, count_pages(path) + 1):
            page = f"{name}#{number}"
            found.add(Record(page, digest_of("page", content, number, PAGE_SIDE), (page,)), (stamp,))
    except Refused as refused:
        found.refuse(name, refused.says)
    except (DataError, PermissionError, FileNotFoundError) as error:
        found.refuse(name, str(error))


def scan_texts(path: Path, each: Each = lambda done, total: None) -> Scan:
    """Return the lines of a text file in UTF-8; each is an item, without the empty ones.

    Raises:
        RimeError: If it has no line with a text.
    """
    found, total = Scan("files", path.parent, path.name), path.stat().st_size
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), b""), 1):
            done += len(line)
            each(done, total)
            if len(line) > _LONGEST:
                raise DataError(f"{path} line {number}: a line may have {_LONGEST:,} bytes, but is longer.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                found.refuse(f"line {number}", f"must be UTF-8, but holds byte {line[error.start]:#04x}.")
                continue
            if text:
                found.add(Record(f"line {number}", digest_of("text", text, ""), (), text))
    if not found.records and not found.unusable:
        raise RimeError(f"{path} must have lines of text, but has none.")
    return found


def checked_media(records: Iterable[Record], limit: int, scan: Scan) -> Sequence[Record]:
    """Return the items with at most ``limit`` media; the others are counted as unusable."""
    good = []
    for record in records:
        if len(record.media) > limit:
            scan.refuse(record.id, f"must have at most {limit} media, but has {len(record.media)}.")
        else:
            good.append(record)
    return good
