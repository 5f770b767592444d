"""Reads Parquet files by row group and with chosen columns, never as one table: some hold 100 GB of pictures.

Needs the extra ``parquet``. Called by the builders of public data sets and by that of your own data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.sources.records import Place, Record, SourceFile
from rime_pl.errors import DataError

_BATCH = 64  # rows that are in memory at once while a file is read in order
#: A larger row group is refused before it is read: a file of some kilobytes can name one of terabytes.
_LARGEST_GROUP = 8 << 30


class ParquetFile(SourceFile):
    """The rows of a Parquet file.

    Args:
        path: The file.
        name: What errors and samples call it.
        columns: Columns that the first pass needs.
        media: Columns that hold media; the first pass does not read them.
        optional: Columns that may be missing; they are read by both passes.
        first_reads_media: Whether the first pass reads media, too, because they tell what is the same.

    Raises:
        DataError: If the file cannot be read, lacks a column, or the package is missing.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        columns: Sequence[str] = (),
        media: Sequence[str] = (),
        optional: Sequence[str] = (),
        first_reads_media: bool = False,
    ) -> None:
        self.path, self.name, self.blocked = path, name, bool(media)
        file = self._open()
        there = file.schema_arrow.names
        if missing := sorted({*columns, *media} - set(there)):
            raise DataError(f"{path} must have the columns {missing}, but has {there}.")
        if twice := sorted({column for column in there if there.count(column) > 1}):
            raise DataError(f"{path}: a column may be named once, but {twice} are named twice.")
        self.columns = [*columns, *(column for column in optional if column in there)] or list(there)
        self.with_media = [*self.columns, *media]
        if first_reads_media:
            self.columns = self.with_media
        self.total = file.metadata.num_rows
        self.groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        self.first = [0]  # row of each group
        for number, group in enumerate(self.groups):
            if group.total_byte_size > _LARGEST_GROUP:
                raise DataError(
                    f"{path}: a row group may have {_LARGEST_GROUP >> 30} GiB, but number {number} has "
                    f"{group.total_byte_size >> 30} GiB. Write the file again with smaller row groups."
                )
            self.first.append(self.first[-1] + group.num_rows)

    def _open(self) -> Any:
        if not self.path.is_file():
            raise DataError(f"{self.path} must be a Parquet file, but there is none.")
        import pyarrow.parquet

        with _told(self.path):
            return pyarrow.parquet.ParquetFile(self.path)

    def records(self) -> Iterator[Record]:
        """Yield all rows in order, without media; ``Place.at`` is the number of the row group."""
        file, row = self._open(), 0
        for group in range(len(self.groups)):
            batches = file.iter_batches(_BATCH, [group], self.columns, use_threads=False)
            while True:
                with _told(self.path, group):
                    rows = next((batch.to_pylist() for batch in batches), None)
                if rows is None:
                    break
                for values in rows:
                    row += 1
                    yield Record(Place(row, group), values, row)

    def read(self, places: Sequence[Place]) -> Iterator[Record]:
        """Yield the rows at the given places, with their media; each row group is read once."""
        file = self._open()
        wanted: dict[int, list[Place]] = {}
        for place in sorted(places):
            wanted.setdefault(place.at, []).append(place)
        for group, of_group in sorted(wanted.items()):
            numbers = {place.row - 1 - self.first[group]: place for place in of_group}
            yield from self._of_group(file, group, numbers)

    def _of_group(self, file: Any, group: int, numbers: dict[int, Place]) -> Iterator[Record]:
        """Yield some rows of a group, by their numbers in it."""
        start = 0
        batches = file.iter_batches(_BATCH, [group], self.with_media, use_threads=False)
        while start <= max(numbers):
            with _told(self.path, group):
                batch = next(batches, None)
                if batch is None:
                    raise DataError(f"{self.path}: row group {group} has fewer rows than its header says.")
                mine = [number for number in range(batch.num_rows) if start + number in numbers]
                rows = batch.take(mine).to_pylist() if mine else []
            for number, values in zip(mine, rows, strict=True):
                yield Record(numbers[start + number], values, 0)
            start += batch.num_rows


@contextmanager
def _told(path: Path, group: int | None = None) -> Iterator[None]:
    """Turn what pyarrow raises into a DataError that names file and row group."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine; damaged data have no number
            raise
        where = "" if group is None else f", row group {group}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}{where} cannot be read as Parquet: {reason:.200}. Download it again."
        ) from error


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that fit the pattern, by name."""
    return sorted(path for path in folder.glob(pattern) if path.is_file())
