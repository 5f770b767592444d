"""Reads JSON files of any size row by row: one array of objects, an array inside an object, or JSON lines.

A file of a million rows is never in memory as a whole. Called by the builders of public data sets.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.records import Place, Record, SourceFile
from rime_pl.datamodules.corpus_file import refuse_constant
from rime_pl.errors import DataError

_CHUNK = 1 << 20  # bytes that are read at once
_LONGEST = 1 << 24  # characters of a row
_SPACE = " \t\r\n"


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with the same name twice: JSON readers would keep one of them, in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise Refused("duplicate key", f"an object names {twice!r:.90} twice.")
    return values


_PLAIN = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=refuse_constant)


def strict_json(text: str) -> Any:
    """Return what ``json.loads`` does.

    Raises:
        Refused: If an object names a key twice.
        ValueError: If it is no JSON, or holds NaN or Infinity.
    """
    return _STRICT.decode(text)


class JsonFile(SourceFile):
    """The rows of a JSON file.

    Args:
        path: The file.
        name: What errors and samples call it.
        array: Name of the list that holds the rows, if the file is one object.

    Raises:
        DataError: If there is no such file, or it does not begin as a list or as JSON lines.
    """

    def __init__(self, path: Path, name: str, array: str = "") -> None:
        self.path, self.name = path, name
        if not path.is_file():
            raise DataError(f"{path} must be a JSON file, but there is none.")
        self.total = path.stat().st_size
        self.start, self.lines = self._start(array)

    def _start(self, array: str) -> tuple[int, bool]:
        """Return the byte at which the rows begin, and whether they are JSON lines."""
        with self.path.open("rb") as file:
            head = file.read(_CHUNK)
        mark = 3 if head.startswith(codecs.BOM_UTF8) else 0
        if array:
            found = re.search(rb'"' + re.escape(array.encode()) + rb'"\s*:\s*\[', head)
            if found is None:
                raise DataError(f"{self.path} must be an object with the list {array!r}, but has none.")
            return found.end(), False
        first = head[mark:].lstrip()[:1]
        if first == b"[":
            return head.index(b"[") + 1, False
        if first == b"{":
            return mark, True
        begins = f"begins with {head[mark : mark + 20]!r}" if head else "is empty"
        raise DataError(f"{self.path} must be a list of JSON objects or JSON lines, but {begins}.")

    def records(self) -> Iterator[Record]:
        """Yield all rows in order; ``Place.at`` is the byte at which a row begins."""
        return self._of_lines() if self.lines else self._of_array()

    def _of_lines(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            at, row = self.start, 0
            while line := file.readline(_LONGEST):
                row += 1
                if len(line) == _LONGEST:
                    raise DataError(
                        f"{self.path} row {row}: a row may have {_LONGEST:,} bytes, but is longer."
                    )
                if line.strip():
                    yield Record(Place(row, at), _object_of(line), at + len(line))
                at += len(line)

    def _of_array(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            window = _Window(file, self.path, self.start)
            row = 0
            while window.next_value(first=row == 0):
                row += 1
                at = window.at
                values = window.value(row)
                yield Record(Place(row, at), values, window.at)

    def read(self, places: Sequence[Place]) -> Iterator[Record]:
        """Yield the rows at the given places."""
        with self.path.open("rb") as file:
            for place in sorted(places, key=lambda place: place.at):
                file.seek(place.at)
                if self.lines:
                    yield Record(place, _object_of(file.readline(_LONGEST)), 0)
                else:
                    yield Record(place, _Window(file, self.path, place.at, 1 << 14).value(place.row), 0)


def _object_of(line: bytes) -> dict[str, Any] | Refused:
    try:
        return _checked(_STRICT.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Refused("not UTF-8", f"the row must be UTF-8, but holds byte {line[error.start]:#04x}.")
    except (ValueError, RecursionError) as error:
        return Refused("malformed JSON", f"the row must be JSON, but is not ({error}).")
    except Refused as refused:
        return refused


def _checked(value: Any) -> dict[str, Any] | Refused:
    if isinstance(value, dict):
        return value
    return Refused("malformed JSON", f"the row must be a JSON object, but is {value!r:.90}.")


class _Window:
    """The part of a JSON array that has been read and not yet taken.

    Args:
        file: The file, at byte ``at``.
        path: What errors call it.
        at: The byte at which the window begins.
        chunk: Bytes that are read at once.
    """

    def __init__(self, file: BinaryIO, path: Path, at: int, chunk: int = _CHUNK) -> None:
        self.file, self.path, self.at, self.chunk = file, path, at, chunk
        self.text, self.begin, self.ended = "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self, size: int) -> bool:
        """Read on; return whether there was anything."""
        if self.ended:
            return False
        data = self.file.read(size)
        self.ended = not data
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            near = self.at + len(self.text[self.begin :].encode())
            raise DataError(
                f"{self.path} must be UTF-8, but holds byte {error.object[error.start]:#04x} after byte "
                f"{near:,}. Convert it to UTF-8."
            ) from error
        self.text, self.begin = self.text[self.begin :] + text, 0
        return not self.ended

    def next_value(self, first: bool) -> bool:
        """Move to the next value of the array; False at its end.

        Raises:
            DataError: If the array is cut off, or something else stands between two values.
        """
        comma = first
        while True:
            while self.begin < len(self.text) and self.text[self.begin] in _SPACE:
                self.begin += 1
                self.at += 1
            if self.begin == len(self.text):
                if not self.more(self.chunk):
                    raise DataError(
                        f"{self.path} is cut off: its list has no end. Copy or download it again."
                    )
                continue
            here = self.text[self.begin]
            if here == "]":
                return False
            if comma:
                return True
            if here != ",":
                raise DataError(
                    f"{self.path}: there must be a comma at byte {self.at:,}, but there is {here!r}."
                )
            comma = True
            self.begin += 1
            self.at += 1

    def value(self, row: int) -> dict[str, Any] | Refused:
        """Take one value.

        Raises:
            DataError: If it is not JSON. The start of the next value cannot be found then.
        """
        size = self.chunk
        while True:
            values: dict[str, Any] | Refused
            try:
                try:
                    value, end = _STRICT.raw_decode(self.text, self.begin)
                    values = _checked(value)
                except Refused as refused:
                    _, end = _PLAIN.raw_decode(self.text, self.begin)
                    values = refused
                if end < len(self.text) or self.ended:
                    break
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or len(self.text) - self.begin > _LONGEST or self.ended:
                    said = f"{self.path} row {row}, byte {self.at:,}: malformed JSON ({error})."
                    raise DataError(f"{said} Download it again.") from error
            self.more(size)
            size *= 2
        self.at += len(self.text[self.begin : end].encode())
        self.begin = end
        return values
