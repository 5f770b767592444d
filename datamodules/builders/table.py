"""Reads a table of pairs as spreadsheets and scripts write it, and tells all faulty rows at once.

Called by folder.py, which builds a corpus of it, and by checking.py. The columns are documented in
docs/how-to/your-own-data.md.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rime_pl.bars import track
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.json_files import strict_json
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.table_file import TABLES
from rime_pl.datamodules.builders.table_rows import (
    CAPTION_COLUMNS,
    COLUMNS,
    MEDIA,
    Line,
    MediaSettings,
    Row,
    captioned,
    in_words_of_captions,
)
from rime_pl.datamodules.faults import Fault
from rime_pl.errors import DataError

_DELIMITERS = (",", ";", "\t", "|")
_KNOWN = {*COLUMNS, *CAPTION_COLUMNS}


@dataclass
class Table:
    """What a table holds: good rows, faults, and notes on how it was read."""

    rows: list[Row] = field(default_factory=list)
    faulty: list[Row] = field(default_factory=list)  # their texts can be checked as well
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


_CAPTIONS_AS_REWRITES = (
    " has no rewrites, so each caption is also the rewrite of its picture and of itself. `rime rewrite "
    "--again` lets a larger model write better ones; --caption_rewrites false leaves them out."
)


def read_table(
    path: Path,
    media: Path | None = None,
    settings: MediaSettings = MediaSettings(),  # noqa: B008 - frozen
    caption_rewrites: bool = False,
) -> Table:
    """Return the rows of a table and the faults of all others.

    Args:
        path: CSV or TSV file with a header line, JSONL file with one object a line, or Parquet file. A CSV
            may use comma, semicolon, tab or vertical bar, whichever makes its header known. Text is UTF-8,
            UTF-16 with a mark at its start, or Windows-1252.
        media: Folder of the media; that of the table if None.
        settings: How media are taken.
        caption_rewrites: Whether a caption is also the rewrite of its picture and of itself.

    Raises:
        DataError: If there is no such table or folder, or if the table as a whole cannot be understood.
    """
    media = path.parent if media is None else media
    kind = _kind(path)
    found = Table()
    if kind == ".parquet":
        lines = list(_parquet_rows(path))
    else:
        read = _json_lines if kind == ".jsonl" else _csv_lines
        lines = list(read(_text(path, found.notes), path.name, found.faults))
    if not lines and not found.faults:
        raise DataError(f"--table must have rows, but {path} has none.")
    named = [name for name in _KNOWN if name.rpartition("_")[2] in MEDIA]
    if not media.is_dir() and any(values.get(name) for *_, values in lines for name in named):
        raise DataError(f"--media must be the folder of the pictures, but {media} is no folder.")
    for number, where, values in track(lines, f"rows of {path.name}", transient=True):
        both = "caption" in values
        for part, pair in enumerate(captioned(values, caption_rewrites) if both else [values]):
            before = len(found.faults)
            key = f"row-{number:08d}" + (f"-{part}" if part else "")
            line = Line(where, pair, media, found.faults, settings)
            row = line.row(key, content_of="query" if part else "target")
            if both:
                row = replace(row, captioned=True)
                found.faults[before:] = map(in_words_of_captions, found.faults[before:])
            (found.rows if len(found.faults) == before else found.faulty).append(row)
            if len(found.faults) > before:
                break  # the other direction would tell the same
    if caption_rewrites and any(row.captioned for row in found.rows):
        found.notes.append(path.name + _CAPTIONS_AS_REWRITES)
    return found


def _kind(path: Path) -> str:
    """Return the suffix of a table; raise a DataError if there is none that is known."""
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise DataError(f"--table must be a CSV or JSONL file, but {path} {wrong}.")
    kind = path.suffix.lower()
    if kind not in TABLES:
        hint = " Save it as CSV (UTF-8)." if kind in (".xlsx", ".xls", ".ods") else ""
        raise DataError(f"--table must end in .csv or .jsonl, but {path} ends in {path.suffix!r}.{hint}")
    return kind


def _text(path: Path, notes: list[str]) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            raise DataError(
                f"{path.name} line {line}: the table must be UTF-8, but holds byte {data[error.start]:#04x}. "
                "Save it as UTF-8."
            ) from error
        example = re.search(r"\w*[^\W\x00-\x7f]\w*|[^\x00-\x7f]", text)
        notes.append(
            f"{path.name} is not UTF-8, so it was read as Windows-1252. Line {line} then holds "
            f"{example.group() if example else ''!r}. If that is wrong, save the table as UTF-8."
        )
    if "\0" in text:
        raise DataError(f"--table must be a text file, but {path} holds zero bytes. Save it as CSV (UTF-8).")
    return text


def _csv_lines(text: str, name: str, faults: list[Fault]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, name and values of each record; a line break inside quotes belongs to its record."""
    skipped = 0
    if text[:4].lower() == "sep=":  # the first line that Excel understands
        text, skipped = text.partition("\n")[2], 1
    columns, delimiter = _header(text, name, 1 + skipped)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    next(reader, None)
    while True:
        first = reader.line_num + 1 + skipped
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quote opens here and is never closed" if "unexpected end" in str(error) else error
            said = f'malformed CSV ({reason}). Write a quote inside a quoted value as "".'
            faults.append(Fault("malformed line", f"{name} line {first}", said))
            continue
        last = reader.line_num + skipped
        where = f"{name} line {first}" if first == last else f"{name} lines {first} to {last}"
        if not values:
            continue
        extra = [value for value in values[len(columns) :] if value.strip()]
        unnamed = [value for column, value in zip(columns, values, strict=False) if not column]
        if extra or any(value.strip() for value in unnamed):
            said = (
                f"the row has {len(values)} values, but the header names {sum(map(bool, columns))} columns. "
                f"Put quotes around a value that holds a {delimiter!r}."
            )
            faults.append(Fault("too many values", where, said))
            continue
        yield first, where, {column: v for column, v in zip(columns, values, strict=False) if column}


def _header(text: str, name: str, line: int) -> tuple[list[str], str]:
    """Return the columns and the delimiter that makes most of them known."""
    headers = {}
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        headers[delimiter] = [cell.strip() for cell in cells]
    if not any(headers.values()):
        raise DataError(f"--table must begin with a line of column names, but {name} does not.")
    delimiter = max(headers, key=lambda each: len(set(headers[each]) & _KNOWN))
    columns = headers[delimiter]
    _refuse_unknown(f"{name} line {line}", [column for column in columns if column])
    if twice := sorted({column for column in columns if column and columns.count(column) > 1}):
        raise DataError(f"{name} line {line}: a column may be named once, but {twice} are named twice.")
    return columns, delimiter


def _refuse_unknown(where: str, columns: list[str]) -> None:
    """Raise a DataError on unknown columns; those of captions go together with each other only."""
    if unknown := sorted(set(columns) - _KNOWN):
        raise DataError(
            f"{where}: columns {unknown} are unknown. Known are {list(COLUMNS)}, or for captions "
            f"{list(CAPTION_COLUMNS)}."
        )
    if "caption" not in columns and (alone := sorted(set(columns) - set(COLUMNS))):
        raise DataError(f"{where}: columns {alone} need a column 'caption' beside them.")
    if "caption" in columns and (other := sorted(set(columns) - set(CAPTION_COLUMNS))):
        raise DataError(
            f"{where}: column 'caption' goes with {list(CAPTION_COLUMNS)}, but there are {other}."
        )


def _parquet_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, name and values of each row."""
    for record in ParquetFile(path, path.name).records():
        assert isinstance(record.values, dict)  # a Parquet file is refused as a whole
        if record.place.row == 1:
            _refuse_unknown(path.name, list(record.values))
        yield record.place.row, f"{path.name} row {record.place.row}", record.values


def _json_lines(text: str, name: str, faults: list[Fault]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            values = strict_json(line)
        except Refused as refused:
            faults.append(Fault(refused.kind, where, refused.says))
            continue
        except (ValueError, RecursionError) as error:
            faults.append(Fault("malformed line", where, f"malformed JSON ({error})."))
            continue
        if not isinstance(values, dict):
            said = f"must be a JSON object, but is {line.strip()!r:.90}."
            faults.append(Fault("malformed line", where, said))
            continue
        try:
            _refuse_unknown(where, list(values))
        except DataError as error:
            faults.append(Fault("unknown column", where, str(error).removeprefix(f"{where}: ")))
            continue
        yield number, where, values
