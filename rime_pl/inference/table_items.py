"""The rows of a table, as items of an index. `rime index TABLE` scans them.

Columns are those of the targets of a table of pairs, and are checked by the same code as for a corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.sources.drafts import PdfPage, PictureFile, Refused, VideoFile
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.datamodules.builders.table_rows import Line, MediaSettings, TableFile
from rime_pl.datamodules.faults import Fault
from rime_pl.errors import RimeError
from rime_pl.inference.collection import DOCUMENTS, Each, Scan, Stamp, digest_of, hash_file
from rime_pl.inference.index_folder import Record
from rime_pl.inference.indexed_media import PAGE
from rime_pl.inference.sources import VIDEO_SUFFIXES

#: Tables: their columns are those of the targets of a table of pairs, with or without `target_`.
TABLES = {".jsonl", ".json", ".parquet"}
_COLUMNS = ("text", "image", "video", "page", "instruction")
_IDS = ("id", "target_content_id", "content_id")
_KNOWN = {*_IDS, *_COLUMNS, *(f"target_{name}" for name in _COLUMNS)}


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
    table = _Table(Scan("files", root, path.name))
    for record in file.records():
        each(record.done, file.total)
        try:
            table.add(f"row {record.place.row}", record.values)
        except Refused as refused:
            table.found.refuse(f"row {record.place.row}", refused.says)
    if not table.used:
        raise RimeError(
            f"{path} must have one of the columns text, image, video and page, also with target_ before it, "
            f"with a value, but has {sorted(table.unused) or 'none'}."
        )
    table.note()
    return table.found


@dataclass
class _Table:
    """The rows of a table that were looked at."""

    found: Scan
    digests: dict[str, bytes] = field(default_factory=dict)  # by id
    used: set[str] = field(default_factory=set)  # columns
    unused: set[str] = field(default_factory=set)
    again: int = 0  # rows that repeat an earlier one

    def add(self, where: str, given: dict[str, Any] | Refused) -> None:
        """Add a row.

        Raises:
            Refused: If something is wrong with it.
        """
        if isinstance(given, Refused):
            raise given
        values, taken = _as_target(given)
        self.used |= set(taken.values())
        self.unused |= given.keys() - _KNOWN
        _refuse_both_names(given)
        try:
            row, stamps = _row(where, values, given, self.found.root)
        except Refused as refused:
            raise Refused(refused.kind, _in_own_columns(refused.says, taken)) from refused
        if row.id not in self.digests:
            self.digests[row.id] = row.digest
            self.found.add(row, stamps)
        elif self.digests[row.id] == row.digest:
            self.again += 1
        else:
            said = "its id must be its own, but an earlier row has it, too."
            self.found.refuse(f"{row.id} ({where})", said)

    def note(self) -> None:
        """Tell what a user should know."""
        if self.again:
            rows, are = ("row repeats", "is") if self.again == 1 else ("rows repeat", "are")
            self.found.notes.append(
                f"{self.again} {rows} an earlier one, id and content, and {are} indexed once."
            )
        if unused := sorted(self.unused - self.used):
            self.found.notes.append(f"columns that are not part of an item: {', '.join(unused)}.")


def _as_target(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values under the names of targets, and the column that each comes from."""
    taken: dict[str, str] = {}
    for name in _COLUMNS:
        for column in (f"target_{name}", name):
            if values.get(column):
                taken.setdefault(f"target_{name}", column)
    if values.get("caption") and not taken.keys() & {"target_image", "target_video", "target_page"}:
        taken.setdefault("target_text", "caption")
    return {name: values[column] for name, column in taken.items()}, taken


def _refuse_both_names(values: dict[str, Any]) -> None:
    """Raise a Refused if a column has a value under both of its names, of which one would be ignored."""
    for name in _COLUMNS:
        if values.get(name) and values.get(f"target_{name}"):
            raise Refused(
                "two values", f"fields {name!r} and 'target_{name}' mean the same. Give one of them."
            )


def _in_own_columns(says: str, taken: Mapping[str, str]) -> str:
    """Return what is wrong with a row, with the columns of the table in the place of those of a pair."""
    for name, column in taken.items():
        says = says.replace(f"field '{name}'", f"field '{column}'")
    return says


def _row(
    where: str, values: dict[str, Any], given: dict[str, Any], root: Path
) -> tuple[Record, tuple[Stamp, ...]]:
    """Return the item of a row, and the files of its media.

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
    media = tuple(_reference(file, root) for file in files)
    try:
        stamps = tuple(Stamp.of(file.path) for file in files)
        hashes = [
            (_kind(file), hash_file(stamp), file.number if isinstance(file, PdfPage) else 0)
            for file, stamp in zip(files, stamps, strict=True)
        ]
    except (PermissionError, FileNotFoundError) as error:
        raise Refused("unreadable file", str(error)) from error
    if len(files) == 1 and not item.text and not item.instruction and not PAGE.fullmatch(media[0]):
        digest = digest_of("file", hashes[0][1], files[0].path.suffix.lower())  # as in a folder
    else:
        digest = digest_of("row", item.text, item.instruction, hashes)
    return Record(_id(given, where), digest, media, item.text, item.instruction), stamps


def _reference(file: TableFile, root: Path) -> str:
    """Return what the index calls a medium: its path below the root, and of a page its number."""
    name = file.path.relative_to(root).as_posix()
    if isinstance(file, PdfPage):
        return f"{name}#{file.number + 1}"
    if _kind(file) == _PAGE_PICTURE:
        return f"{name}#1"
    if PAGE.fullmatch(name):
        raise Refused("malformed path", f"{name!r:.300} ends like the number of a page. Rename the file.")
    kind, suffix = "video" if isinstance(file, VideoFile) else "image", file.path.suffix.lower()
    if suffix in DOCUMENTS or (suffix in VIDEO_SUFFIXES) != (kind == "video"):
        what = "a document" if suffix in DOCUMENTS else f"no {kind}"
        raise Refused("unusable medium", f"field 'target_{kind}': {name!r:.300} is {what}, by its ending.")
    return name


_PAGE_PICTURE = "PagePicture"


def _kind(file: TableFile) -> str:
    return _PAGE_PICTURE if isinstance(file, PictureFile) and file.page else type(file).__name__


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
