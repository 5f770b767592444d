"""Samples of one or several indices as one sequence, without an object for each sample.

shards.py makes it; plans look at its columns, readers at single entries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rime_pl.datamodules.split_index import Entry, SplitIndex


class Samples(Sequence[Entry]):
    """Samples of indices, one index after the other, or some of them.

    Args:
        parts: The indices.
        rows: Numbers of the samples, counted through all parts, that belong to the sequence; None for all.
    """

    def __init__(self, parts: Sequence[SplitIndex], rows: NDArray[Any] | None = None) -> None:
        self.parts, self.rows = tuple(parts), rows
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self._firsts = self.starts.tolist()  # for single rows it is faster

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> Samples: ...
    def __getitem__(self, number: int | slice) -> Entry | Samples:
        if isinstance(number, slice):
            return self.select(np.arange(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        row = number % len(self) if self.rows is None else int(self.rows[number])
        part = bisect_right(self._firsts, row) - 1
        return Entry(self.parts[part], int(row) - self._firsts[part])

    def __add__(self, other: Samples) -> Samples:
        if self.rows is None and other.rows is None:
            return Samples((*self.parts, *other.parts))
        mine, theirs = (np.arange(len(each)) if each.rows is None else each.rows for each in (self, other))
        return Samples((*self.parts, *other.parts), np.concatenate([mine, theirs + self.starts[-1]]))

    def select(self, numbers: NDArray[Any]) -> Samples:
        """Return the samples with these numbers, in this order."""
        rows = numbers if self.rows is None else self.rows[numbers]
        small = self.starts[-1] <= np.iinfo(np.uint32).max
        return Samples(self.parts, rows.astype(np.uint32 if small else np.int64))

    def column(self, name: str, numbers: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return a column of the index for the samples with these numbers; None for all.

        The columns "task" and "gallery" hold numbers of a part's own list: see ``task_codes``.
        """
        if numbers is None and self.rows is None:
            columns = [part.columns[name] for part in self.parts]
            return columns[0] if len(columns) == 1 else np.concatenate(columns)
        rows = self.rows if numbers is None else numbers if self.rows is None else self.rows[numbers]
        assert rows is not None
        if len(self.parts) == 1:
            return self.parts[0].columns[name][rows]
        found = np.empty(len(rows), self.parts[0].columns[name].dtype)
        for part, own, places in self._by_part(np.asarray(rows)):
            found[places] = self.parts[part].columns[name][own]
        return found

    def _by_part(self, rows: NDArray[Any]) -> Iterable[tuple[int, NDArray[Any], NDArray[Any]]]:
        parts = np.searchsorted(self.starts, rows, "right") - 1
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            yield part, rows[places].astype(np.int64) - self.starts[part], places

    @cached_property
    def tasks(self) -> list[str]:
        """All tasks of the indices, sorted, with or without samples here; ``task_codes`` count in it."""
        return sorted({task for part in self.parts for task in part.tasks})

    def task_codes(self) -> NDArray[np.uint16]:
        """Return the task of each sample as its number in ``tasks``."""
        place = {task: number for number, task in enumerate(self.tasks)}
        maps = [np.array([place[task] for task in part.tasks], np.uint16) for part in self.parts]
        if len(self.parts) == 1:
            return maps[0][self.column("task")]
        wide = np.concatenate(maps)
        shifts = np.cumsum([0, *map(len, maps)])[:-1]
        return wide[self.column("task").astype(np.int64) + shifts[self.part_numbers()]]

    def part_numbers(self) -> NDArray[np.int64]:
        """Return the number of the index that each sample comes from."""
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return np.searchsorted(self.starts, rows, "right") - 1

    def shard_numbers(self) -> NDArray[np.uint32]:
        """Return the tar of each sample, counted through all parts."""
        counts = np.concatenate([np.diff(part.starts) for part in self.parts])
        numbers = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        return numbers if self.rows is None else numbers[self.rows]
