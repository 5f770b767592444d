"""What all files of a data set have in common: rows with a place, read in order or by their places.

json_files.py, parquet_files.py and the table of your own data implement it; building.py uses it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rime_pl.datamodules.builders.sources.drafts import Refused


class Place(NamedTuple):
    """Where a row lies in its file."""

    row: int  # from 1
    at: int  # byte offset, or number of the row group


@dataclass(frozen=True)
class Record:
    """One row of a file, or what is wrong with it."""

    place: Place
    values: dict[str, Any] | Refused
    done: int  # bytes or rows of the file that have been read, this one included


class SourceFile(ABC):
    """A file with rows.

    Attributes:
        path: The file.
        name: What errors and samples call it: the path below the folder of the data set.
        total: Bytes or rows, whichever ``Record.done`` counts.
        blocked: Whether rows can only be read cheaply together with those of the same ``Place.at``.
    """

    path: Path
    name: str
    total: int
    blocked: bool = False

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """Yield all rows in order.

        Raises:
            DataError: If the file as a whole cannot be read.
        """

    @abstractmethod
    def read(self, places: Sequence[Place]) -> Iterator[Record]:
        """Yield the rows at the given places, in the order of the file, with their media."""

    def where(self, row: int) -> str:
        """Return what errors and samples call a row."""
        return f"{self.name} row {row}"

    def key(self, row: int, part: int) -> str:
        """Return the key of a pair from file and row; a tar allows no dot and no slash in it."""
        stem = re.sub(r"[^\w-]+", "-", str(Path(self.name).with_suffix("")), flags=re.ASCII).strip("-")
        return f"{stem}-{row:08d}" + (f"-{part}" if part else "")
