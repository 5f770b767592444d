"""Reads a table of pairs, CSV or JSONL, as spreadsheets and scripts write it; tells all faulty rows at once.

Called by folder.py, which builds a corpus of it, and by checking.py. The columns are documented in
docs/how-to/your-own-data.md.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.progress import track

from rime_pl.datamodules.faults import Fault
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair

_SIDES = ("query", "target")
SPLITS = ("train", "val", "test", "distractors")
_SIDE_COLUMNS = ("text", "image", "instruction", "rewrite", "cot", "content_id")
COLUMNS = (
    *(f"query_{name}" for name in _SIDE_COLUMNS),
    *(f"target_{name}" for name in _SIDE_COLUMNS),
    "task",
    "gallery",
    "split",
)
#: Names, not texts: spaces around them mean nothing.
_NAMES = ("query_content_id", "target_content_id", "task", "gallery", "split")
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Row:
    """One good row. Its pictures are only known to be there; nobody has opened them."""

    where: str  # "pairs.csv line 7"
    pair: Pair  # without its pictures
    files: dict[str, tuple[Path, ...]]  # "query" and "target" -> pictures
    split: str  # "" if the table does not say
    values: dict[str, Any] = field(default_factory=dict)  # column -> value, as the table holds it


@dataclass
class Table:
    """What a table holds: good rows, faults, and notes on how it was read."""

    rows: list[Row] = field(default_factory=list)
    faulty: list[Row] = field(default_factory=list)  # their texts can be checked as well
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, media: Path | None = None) -> Table:
    """Return the rows of a table and the faults of all others.

    Args:
        path: CSV file with a header line, or JSONL file with one object a line. A CSV may use comma,
            semicolon, tab or vertical bar, whichever makes its header known. Text is UTF-8, UTF-16 with a
            mark at its start, or Windows-1252.
        media: Folder of the pictures; that of the table if None.

    Raises:
        DataError: If there is no such table or folder, or if the table as a whole cannot be understood.
    """
    media = path.parent if media is None else media
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise DataError(f"--table must be a CSV or JSONL file, but {path} {wrong}.")
    if path.suffix.lower() not in (".csv", ".jsonl"):
        hint = " Save it as CSV (UTF-8)." if path.suffix.lower() in (".xlsx", ".xls", ".ods") else ""
        raise DataError(f"--table must end in .csv or .jsonl, but {path} ends in {path.suffix!r}.{hint}")
    found = Table()
    text = _text(path, found.notes)
    read = _csv_lines if path.suffix.lower() == ".csv" else _json_lines
    lines = list(read(text, path.name, found.faults))
    if not lines and not found.faults:
        raise DataError(f"--table must have rows, but {path} has none.")
    if not media.is_dir() and any(values.get(f"{side}_image") for *_, values in lines for side in _SIDES):
        raise DataError(f"--media must be the folder of the pictures, but {media} is no folder.")
    for number, where, values in track(
        lines, f"rows of {path.name}", transient=True, disable=not sys.stdout.isatty()
    ):
        before = len(found.faults)
        row = _Line(where, values, media, found.faults).row(f"row-{number:08d}")
        (found.rows if len(found.faults) == before else found.faulty).append(row)
    return found


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
    delimiter = max(headers, key=lambda each: len(set(headers[each]) & set(COLUMNS)))
    columns = headers[delimiter]
    _refuse_unknown(f"{name} line {line}", [column for column in columns if column])
    if twice := sorted({column for column in columns if column and columns.count(column) > 1}):
        raise DataError(f"{name} line {line}: a column may be named once, but {twice} are named twice.")
    return columns, delimiter


def _refuse_unknown(where: str, columns: list[str]) -> None:
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise DataError(f"{where}: columns {unknown} are unknown. Known are {list(COLUMNS)}.")


def _json_lines(text: str, name: str, faults: list[Fault]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
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


class _Line:
    """Checks one row and tells every fault in it.

    Args:
        where: What a fault calls the row.
        values: Column -> value.
        media: Folder of the pictures.
        faults: Where faults are added.
    """

    def __init__(self, where: str, values: dict[str, Any], media: Path, faults: list[Fault]) -> None:
        self.where, self.values, self.media, self.faults = where, values, media, faults

    def row(self, key: str) -> Row:
        """Return the row; if it has faults, what can be read of it."""
        before = len(self.faults)
        texts = {column: self._text(column) for column in COLUMNS if not column.endswith("_image")}
        files = {side: self._files(f"{side}_image") for side in _SIDES}
        split = texts["split"]
        if split and split not in SPLITS:
            self._tell("unknown split", f"field 'split' must be one of {list(SPLITS)}, but is {split!r}.")
        target = self._item("target", texts, files, "")
        content = "" if target is None else target.content_id
        query = None if split == "distractors" else self._item("query", texts, files, content)
        if len(self.faults) == before and not any(texts.values()) and not any(files.values()):
            self._tell("empty row", "the row is empty. Delete it.")
        else:
            if target is None:
                self._tell("no target", f"{_one_of('target')} Add one.")
            if query is None and split != "distractors":
                hint = "or set 'split' to 'distractors' if this is a gallery item without a query."
                self._tell("no query", f"{_one_of('query')} Add one, {hint}")
        gallery = texts["gallery"] or ("pictures" if files["target"] else "texts")
        pair = Pair(key, texts["task"] or "pairs", gallery, query, target or Item(""))
        return Row(self.where, pair, files if query else {**files, "query": ()}, split, self.values)

    def _is_empty(self, side: str) -> bool:
        """Return whether a side is given neither text nor picture; a wrong value is told elsewhere."""
        text, image = (self.values.get(f"{side}_{name}") for name in ("text", "image"))
        names = image.split(";") if isinstance(image, str) else image
        given = names if isinstance(names, list) else [names]
        return not any(value.strip() if isinstance(value, str) else value for value in (text, *given))

    def _item(
        self, side: str, texts: dict[str, str], files: dict[str, tuple[Path, ...]], content_id: str
    ) -> Item | None:
        """Return one side without its pictures, or None if it has neither text nor picture."""
        given = {name: texts[f"{side}_{name}"] for name in _SIDE_COLUMNS if name != "image"}
        if self._is_empty(side):
            return None
        content = given["content_id"] or content_id
        try:
            content = content or _content(given["text"], files[side])
        except PermissionError as error:
            self._tell("unreadable picture", f"field '{side}_image': {error.filename} may not be read.")
        rewrite, cot = given["rewrite"] or None, given["cot"] or None
        return Item(given["text"], (), content, given["instruction"], rewrite, cot)

    def _text(self, column: str) -> str:
        value = self.values.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            self._tell("not a string", f"field '{column}' must be a string, but is {value!r:.90}.")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start : error.end]
            self._tell(
                "not a string", f"field '{column}' must be text, but holds half a character ({half!a})."
            )
            return ""
        if not value.strip():
            return ""
        return value.strip() if column in _NAMES else value

    def _files(self, column: str) -> tuple[Path, ...]:
        names = self.values.get(column) or []
        if isinstance(names, str):
            names = names.split(";")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._tell(
                "not a string", f"field '{column}' must name files, but is {self.values[column]!r:.90}."
            )
            return ()
        return tuple(filter(None, (self._file(column, name.strip()) for name in names if name.strip())))

    def _file(self, column: str, name: str) -> Path | None:
        path = self.media / name
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a text in the place of a name: too long, or a zero byte
            pass
        self._tell("missing file", f"field '{column}': file {path!s:.300} {_why_not(path, name)}")
        return None

    def _tell(self, kind: str, says: str) -> None:
        self.faults.append(Fault(kind, self.where, says))


@lru_cache(maxsize=16)
def _names(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder by their small letters; it is read once, however many rows are wrong."""
    return {each.name.lower(): each.name for each in folder.iterdir()}


def _why_not(path: Path, name: str) -> str:
    """Return why a name leads to no file, and what to do."""
    try:
        same = _names(path.parent, path.parent.stat().st_mtime_ns).get(path.name.lower())
        folder = path.is_dir()
    except (OSError, ValueError):
        same, folder = None, False
    if "://" in name:
        return "does not exist, because it is an address. Download the picture."
    if folder:
        return "is a folder. Name a picture in it."
    if same:
        return f"does not exist, but {same!r} does. Write small and capital letters as in the name."
    return "does not exist." + (" Write '/' in the place of '\\'." if "\\" in name else " Check --media.")


def _one_of(side: str) -> str:
    return f"field '{side}_text' or '{side}_image' must have a value, but both are empty."


def _content(text: str, files: tuple[Path, ...]) -> str:
    """Return a content id by hash: equal for the same text and the same files."""
    digest = hashlib.sha256(text.encode())
    for path in files:
        digest.update(b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
