"""What a user wants to index, item by item, without opening media: a folder, a file, a table or a text.

`rime index` scans; index.py embeds. Each item has an id, a digest of its content, and references to its
media, which are opened when their batch is due. No file outside the root is opened. Corpora:
corpus_targets.py.
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
from rime_pl.datamodules.builders.sources.drafts import PdfPage, Refused
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.paths import file_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.datamodules.builders.table_rows import Line, MediaSettings
from rime_pl.datamodules.faults import Fault, counted
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.index_folder import Record
from rime_pl.inference.sources import SUFFIXES, VIDEO_SUFFIXES

DOCUMENTS = {".pdf"}
#: Tables: their columns are those of the targets of a table of pairs, with or without `target_`.
TABLES = {".jsonl", ".json", ".parquet"}
TEXTS = {".txt"}
_COLUMNS = ("text", "image", "video", "page", "instruction")
_IDS = ("id", "target_content_id", "content_id")
_KNOWN = {*_IDS, *_COLUMNS, *(f"target_{name}" for name in _COLUMNS)}
#: A longer line is no text that a model reads.
_LONGEST = 1 << 20

#: Called with what is done and the whole, while a source is scanned.
Each = Callable[[int, int], object]


@dataclass
class Scan:
    """The items of a source, in a fixed order."""

    kind: str  # see Facts.kind
    root: Path
    source: str = ""  # see Facts.source
    records: list[Record] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)  # id -> reason
    notes: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Add an item; a text that no file can hold is unusable."""
        try:
            "".join((record.id, record.text, record.instruction, *record.media)).encode()
        except UnicodeEncodeError as error:
            self.refuse(record.id, f"must be text, but holds half a character ({error.object!a:.60}).")
            return
        self.records.append(record)

    def refuse(self, id: str, reason: str) -> None:
        """Count an item that cannot be used."""
        self.unusable[id.encode(errors="replace").decode()] = reason


def digest_of(*parts: Any) -> bytes:
    """Return a digest of what decides the vectors of an item."""
    shown = json.dumps(parts, default=lambda part: part.hex(), ensure_ascii=True)
    return hashlib.blake2b(shown.encode(), digest_size=16).digest()


def hash_file(path: Path) -> bytes:
    """Return the SHA-256 of a file; many rows may name one file, so the last ones are kept."""
    about = path.stat()
    key = path, about.st_size, about.st_mtime_ns
    if key not in _hashes:
        if len(_hashes) > 4096:
            _hashes.clear()
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").digest()
    return _hashes[key]


_hashes: dict[tuple[Path, int, int], bytes] = {}


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
        content = hash_file(path)
        if path.suffix.lower() not in DOCUMENTS:
            found.add(Record(name, digest_of("file", content, path.suffix.lower()), (name,)))
            return
        for number in range(1, count_pages(path) + 1):
            page = f"{name}#{number}"
            found.add(Record(page, digest_of("page", content, number, PAGE_SIDE), (page,)))
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


def scan_table(path: Path, media: Path | None = None, each: Each = lambda done, total: None) -> Scan:
    """Return the rows of a table, JSONL, JSON or Parquet; each is an item of a text, media or both.

    Columns: `text`, `image`, `video`, `page`, `instruction` as in a table of pairs, there also with
    `target_` before them, and `id` (or `content_id`). Of a row with a caption and a medium, the medium is
    the item.

    Args:
        path: The table.
        media: Folder of the media that it names (default: that of the table).
        each: Called with what is done.

    Raises:
        RimeError: If the table as a whole cannot be read, or has no column that makes an item.
    """
    root = path.parent if media is None else media
    if not root.is_dir():
        raise RimeError(f"--media must be the folder of the files that the table names, but is {root}.")
    file: SourceFile = (
        ParquetFile(path, path.name) if path.suffix.lower() == ".parquet" else JsonFile(path, path.name)
    )
    found, ids = Scan("files", root, path.name), dict[str, bytes]()
    used, unused = set[str](), set[str]()
    for record in file.records():
        each(record.done, file.total)
        where = f"row {record.place.row}"
        if isinstance(record.values, Refused):
            found.refuse(where, record.values.says)
            continue
        values, taken = _as_target(record.values)
        used |= taken
        unused |= record.values.keys() - _KNOWN
        try:
            row = _row(where, values, record.values, root)
        except Refused as refused:
            found.refuse(where, refused.says)
            continue
        if row.id not in ids:
            ids[row.id] = row.digest
            found.add(row)
        elif ids[row.id] != row.digest:
            found.refuse(f"{row.id} ({where})", "its id must be its own, but an earlier row has it, too.")
    if not used:
        raise RimeError(
            f"{path} must have one of the columns text, image, video and page, also with target_ before it, "
            f"with a value, but has {sorted(unused) or 'none'}."
        )
    if unused:
        found.notes.append(f"columns that are not part of an item: {', '.join(sorted(unused))}.")
    return found


def _as_target(values: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return the values under the names of targets, and the columns that they come from."""
    taken: dict[str, str] = {}
    for name in _COLUMNS:
        for column in (f"target_{name}", name):
            if values.get(column):
                taken.setdefault(f"target_{name}", column)
    if values.get("caption") and not taken.keys() & {"target_image", "target_video", "target_page"}:
        taken.setdefault("target_text", "caption")
    return {name: values[column] for name, column in taken.items()}, set(taken.values())


def _row(where: str, values: dict[str, Any], given: dict[str, Any], root: Path) -> Record:
    """Return the item of a row.

    Raises:
        Refused: If something is wrong with it.
    """
    faults: list[Fault] = []
    # an id of its own, so that the builder does not hash the media for one
    line = Line(where, {**values, "target_content_id": where, "split": "distractors"}, root, faults, _MEDIA)
    row = line.row(where)
    if faults:
        raise Refused(faults[0].kind, " ".join(fault.says for fault in faults))
    files, item = row.files["target"], row.pair.target
    media = tuple(file.name for file in files)
    try:
        hashes = [
            (type(file).__name__, hash_file(file.path), file.number if isinstance(file, PdfPage) else 0)
            for file in files
        ]
    except (PermissionError, FileNotFoundError) as error:
        raise Refused("unreadable file", str(error)) from error
    if len(files) == 1 and not item.text and not item.instruction and not isinstance(files[0], PdfPage):
        digest = digest_of("file", hashes[0][1], files[0].path.suffix.lower())  # as in a folder
    else:
        digest = digest_of("row", item.text, item.instruction, hashes)
    return Record(_id(given, where), digest, media, item.text, item.instruction)


_MEDIA = MediaSettings()


def _id(values: dict[str, Any], where: str) -> str:
    for column in _IDS:
        value = values.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if value is not None and not isinstance(value, str):
            raise Refused(
                "no id", f"field {column!r} must be a text or a whole number, but is {value!r:.60}."
            )
    return where


def checked_media(records: Iterable[Record], limit: int, scan: Scan) -> Sequence[Record]:
    """Return the items with at most ``limit`` media; the others are counted as unusable."""
    good = []
    for record in records:
        if len(record.media) > limit:
            scan.refuse(record.id, f"must have at most {limit} media, but has {len(record.media)}.")
        else:
            good.append(record)
    return good
