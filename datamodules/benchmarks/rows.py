"""Finds the files of a local copy and reads their rows, from JSON lines or Parquet.

Called by the readers of all benchmarks. Each fault names file, row and field, because a score from half-read
rows would look like any other score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rime_pl.datamodules.benchmarks.task import Name
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile, files_in
from rime_pl.datamodules.builders.sources.paths import file_below, folder_below
from rime_pl.datamodules.builders.sources.records import Place, SourceFile
from rime_pl.errors import DataError

_SHOWN = 3  # missing files that an error names


class MissingFilesError(DataError):
    """Files of a task are not there.

    Args:
        message: What is missing, and where it was looked for.
        code: What the official report holds in the place of the scores: ``"FILE_N/A"`` or ``"DIR_N/A"``.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def find_files(root: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """Return the files of the first pattern that fits any, by name.

    Args:
        root: Folder of the benchmark.
        patterns: Paths below ``root`` that may hold ``*``; they are tried in this order.
        what: What an error calls the files.

    Raises:
        MissingFilesError: If no pattern fits a file.
    """
    for pattern in patterns:
        if found := files_in(root, pattern):
            _refuse_incomplete(found, what)
            return found
    tried = ", ".join(patterns)
    raise MissingFilesError(f"{what} must lie below {root}, but there is none of: {tried}.", "FILE_N/A")


def _refuse_incomplete(files: Sequence[Path], what: str) -> None:
    """Raise a DataError unless numbered files, such as test-00000-of-00002.parquet, are one whole set."""
    numbers = [found for file in files if (found := re.search(r"-(\d{5})-of-(\d{5})\.", file.name))]
    if not numbers:
        return
    sizes = {int(found[2]) for found in numbers}
    there = sorted(int(found[1]) for found in numbers)
    if len(sizes) > 1 or len(numbers) < len(files) or there != list(range(max(sizes))):
        raise DataError(
            f"{what} must be one whole set of files, numbered up to {max(sizes)}, but there are: "
            f"{', '.join(file.name for file in files[:9])}. Download the others, or remove the old set."
        )


def find_folder(root: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of some folders below ``root`` that is there.

    Raises:
        MissingFilesError: If none is there.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    tried = ", ".join(names)
    raise MissingFilesError(f"{what} must lie below {root}, but there is none of: {tried}.", "DIR_N/A")


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turn a refused file or row into a DataError that says where it is."""
    try:
        yield
    except Refused as refused:
        raise DataError(f"{where}: {refused.says}") from refused


def file_in(folder: Path, name: str) -> Path:
    """Return a file below ``folder``; a DataError if it is not there, or lies outside."""
    with told(str(folder)):
        return file_below(folder, name)


def folder_in(folder: Path, name: str) -> Path:
    """Return a folder below ``folder``; a DataError if it is not there, or lies outside."""
    with told(str(folder)):
        return folder_below(folder, name)


def refuse_missing(
    folder: Path, names: Iterable[str], task: str, find: Callable[[Path, object], Path] = file_below
) -> None:
    """Raise a DataError that counts the names which lead to nothing below ``folder``, and lists the first.

    Args:
        folder: Folder of all media of a task.
        names: Paths below it.
        task: What an error calls the task.
        find: ``file_below`` or ``folder_below``.
    """
    missing, total = [], 0
    for name in names:
        total += 1
        try:
            find(folder, name)
        except Refused as refused:
            if refused.kind not in ("missing file", "missing folder"):
                raise DataError(f"{task}: {refused.says}") from refused
            missing.append(name)
    if missing:
        raise DataError(
            f"{task}: all {total:,} files or folders of its media must be below {folder}, but "
            f"{len(missing):,} are missing. The first: {', '.join(missing[:_SHOWN])}."
        )


@dataclass(frozen=True)
class Row:
    """A row of a file, whose fields are checked when they are asked for."""

    values: Mapping[str, Any]
    where: str  # file and row, for errors
    place: Place

    def _value(self, field: str) -> Any:
        if field not in self.values:
            raise DataError(
                f"{self.where} must have the field {field!r}, but has {sorted(self.values)!r:.300}."
            )
        return self.values[field]

    def _fault(self, field: str, must: str) -> DataError:
        return DataError(f"{self.where}: {field!r} must be {must}, but is {self.values.get(field)!r:.90}.")

    def text(self, field: str) -> str:
        """Return a text."""
        value = self._value(field)
        if not isinstance(value, str):
            raise self._fault(field, "a text")
        self._refuse_half(field, value)
        return value

    def _refuse_half(self, field: str, text: str) -> None:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can hold half a character
                raise self._fault(field, "text without half characters (surrogates)") from error

    def text_or(self, field: str, default: str) -> str:
        """Return a text, or ``default`` if the field is not there or null."""
        return default if self.values.get(field) is None else self.text(field)

    def texts(self, field: str) -> list[str]:
        """Return a list of texts, one or more."""
        value = self._value(field)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise self._fault(field, "a list of texts, one or more")
        for text in value:
            self._refuse_half(field, text)
        return value

    def list(self, field: str) -> list[Any]:
        """Return a list of anything."""
        value = self._value(field)
        if not isinstance(value, list):
            raise self._fault(field, "a list")
        return value

    def name(self, field: str) -> Name:
        """Return an id: a text or a whole number, whichever the data have."""
        value = self._value(field)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self._fault(field, "an id, a text or a whole number")
        return self.text(field) if isinstance(value, str) else value

    def index(self, field: str, count: int) -> int:
        """Return a place from 0 to ``count - 1``, which may be written as text."""
        value = self._value(field)
        if not isinstance(value, bool) and isinstance(value, str | int):
            try:
                number = int(value)
            except ValueError:
                number = -1
            if 0 <= number < count:
                return number
        raise self._fault(field, f"a whole number from 0 to {count - 1}")

    def grade(self, field: str) -> float:
        """Return a finite number."""
        value = self._value(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._fault(field, "a finite number")
        return float(value)


def open_rows(
    root: Path,
    paths: Sequence[Path],
    columns: Sequence[str] = (),
    media: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> list[SourceFile]:
    """Return the files, opened by their kind.

    Args:
        root: Folder of the benchmark; errors name files from here.
        paths: Parquet files, JSON lines, or JSON files with a list.
        columns: Columns that a Parquet file must have; () for all that it has.
        media: Columns of a Parquet file that hold pictures, and are not read with the rows.
        optional: Columns of a Parquet file that are read if they are there.
    """
    files: list[SourceFile] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if path.suffix == ".parquet":
            files.append(ParquetFile(path, name, columns, media, optional))
        else:
            files.append(JsonFile(path, name))
    return files


def rows_of(files: Sequence[SourceFile]) -> Iterator[tuple[int, Row]]:
    """Yield the number of the file and the row, for all rows in order.

    Raises:
        DataError: If a row is malformed.
    """
    for number, file in enumerate(files):
        for record in file.records():
            where = file.where(record.place.row)
            if isinstance(record.values, Refused):
                raise DataError(f"{where}: {record.values.says}")
            yield number, Row(record.values, where, record.place)
