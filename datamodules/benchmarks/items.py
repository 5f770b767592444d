"""Items that are made when they are asked for, and the candidates of a task, each name once.

Called by the readers of all benchmarks: 26,000 pages are never open at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar, overload

from PIL import Image

from rime_pl.datamodules.benchmarks.task import Name
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.records import Place
from rime_pl.errors import DataError
from rime_pl.media import open_picture
from rime_pl.types import Item

T = TypeVar("T")


class LazyItems(Sequence[Item], Generic[T]):
    """The items of some rows of plain data; each is made when it is asked for.

    Args:
        rows: What each item is made of.
        make: Makes an item of a row.
    """

    def __init__(self, rows: Sequence[T], make: Callable[[T], Item]) -> None:
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self.make(row) for row in self.rows[place]]
        return self.make(self.rows[place])


class Candidates(Generic[T]):
    """The candidates of a task. Each name is embedded once, and its first occurrence wins."""

    def __init__(self) -> None:
        self.places: dict[Name, int] = {}
        self.rows: list[T] = []
        self._repeats = 0

    def add(self, name: Name, row: T) -> int:
        """Return the place of a candidate; a name that is there already keeps its content."""
        place = self.places.setdefault(name, len(self.rows))
        if place == len(self.rows):
            self.rows.append(row)
        else:
            self._repeats += 1
        return place

    @property
    def names(self) -> list[Name]:
        """The names in the order of their places."""
        return list(self.places)

    @property
    def notes(self) -> list[str]:
        """What is odd about a corpus: there, no name should come twice."""
        return (
            [f"{self._repeats:,} rows of the corpus repeat an id, and are left out"] if self._repeats else []
        )


class StoredPictures:
    """Pictures whose bytes lie in a column of Parquet files.

    Who reads them in order reads each row group once. A step back begins its group again, and groups
    in between are not read.

    Args:
        files: The files, opened with ``column`` among their media.
        column: The column: a struct with the field ``bytes``, or bytes.
    """

    def __init__(self, files: Sequence[ParquetFile], column: str) -> None:
        self.files, self.column = files, column
        self._places: dict[int, list[Place]] = {}
        self._last = (-1, Place(0, 0))  # file and place of the row that the reader gave last
        self._reader: Any = None
        self._lock = Lock()  # a retriever opens items in several threads

    def add(self, file: int, place: Place) -> None:
        """Tell of a row whose picture may be asked for, in the order of the file."""
        self._places.setdefault(file, []).append(place)

    def __call__(self, file: int, place: Place) -> Image.Image:
        """Return the picture of a row as a person would see it, mode RGB.

        Raises:
            DataError: If the row holds no picture, or one that cannot be decoded.
        """
        with self._lock:
            value = self._value(file, place)
        where = f"{self.files[file].where(place.row)}, {self.column!r}"
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise DataError(f"{where} must hold the bytes of a picture, but holds none.")
        return open_picture(data, where)

    def _value(self, file: int, place: Place) -> Any:
        at, last = self._last
        if at != file or last.row >= place.row or place.at > last.at + 1:
            later = [one for one in self._places.get(file, ()) if one.row >= place.row]
            self._reader = self.files[file].read(later)
        self._last = (-1, place)  # should the file be damaged, the next call begins anew
        for record in self._reader:
            self._last = (file, record.place)
            if record.place == place:
                if isinstance(record.values, Refused):
                    raise DataError(f"{self.files[file].where(place.row)}: {record.values.says}")
                return record.values[self.column]
        self._last = (-1, place)  # no more rows
        raise DataError(f"{self.files[file].where(place.row)} is not there any more: the file has changed.")
