"""Where the pairs come from, a corpus or a table, one by one and with undecoded pictures.

Called by jobs.py, which looks at all pairs first and reads a pair again when it is due, and by writing.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from rime_pl.datamodules.builders.table import SPLITS, Row, read_table
from rime_pl.datamodules.faults import listed
from rime_pl.datamodules.shards import DISTRACTORS, Entry, read_corpus, read_split
from rime_pl.datamodules.stored import StoredReader
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Item, Pair

_SHOWN = 20  # faults that an error lists


class Source(Protocol):
    """Pairs by their number."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return what an error calls a pair."""

    def is_asked(self, number: int) -> bool:
        """Return whether a pair is in a split that gets rewrites."""

    def read(self, number: int) -> Pair:
        """Return a pair with undecoded pictures; raise a DataError if it cannot be read."""


class CorpusSource:
    """The samples of a corpus, split after split.

    Args:
        path: Corpus folder.
        splits: Splits that get rewrites; None for train, val and test.

    Raises:
        RimeError: If there is no such corpus or split.
    """

    def __init__(self, path: Path, splits: Sequence[str] | None = None) -> None:
        self.path, self.corpus = path, read_corpus(path)
        there = list(self.corpus["splits"])
        if unknown := sorted(set(splits or ()) - set(there)):
            raise RimeError(f"--splits must name splits of {path}, {there}, but {unknown} are not there.")
        if splits and DISTRACTORS in splits:
            raise RimeError(f"--splits must not name {DISTRACTORS!r}: these items answer no query.")
        asked = set(splits) if splits else {"train", "val", "test"}
        self.ranges: dict[str, range] = {}
        entries: list[Entry] = []
        for split in there:
            of_split = read_split(path, split)
            self.ranges[split] = range(len(entries), len(entries) + len(of_split))
            entries += of_split
        self._asked = [rows for split, rows in self.ranges.items() if split in asked]
        self.reader = StoredReader(entries)

    def __len__(self) -> int:
        return len(self.reader.entries)

    def name(self, number: int) -> str:
        return self.reader.entries[number].name

    def is_asked(self, number: int) -> bool:
        return any(number in rows for rows in self._asked)

    def read(self, number: int) -> Pair:
        return replace(self.reader.read(number), key=self.reader.entries[number].key)


class TableSource:
    """The rows of a CSV or JSONL table.

    Args:
        path: The table, as for ``rime shards folder``.
        media: Folder of its pictures; that of the table if None.
        splits: Splits that get rewrites; None for all but the distractors.

    Raises:
        DataError: If the table or a row of it cannot be used.
    """

    def __init__(self, path: Path, media: Path | None = None, splits: Sequence[str] | None = None) -> None:
        if unknown := sorted(set(splits or ()) - set(SPLITS[:3])):
            raise RimeError(f"--splits must name some of {list(SPLITS[:3])}, but {unknown} are none of them.")
        found = read_table(path, media)
        if found.faults:
            raise DataError(
                f"Every row of {path} must be usable, but some are not:\n{listed(found.faults, _SHOWN)}\n"
                "Repair them. `rime shards check` lists all of them."
            )
        self.path, self.rows, self.notes = path, found.rows, found.notes
        self.splits = set(splits) if splits else {"", *SPLITS[:3]}

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return self.rows[number].where

    def is_asked(self, number: int) -> bool:
        return self.rows[number].split in self.splits

    def read(self, number: int) -> Pair:
        row = self.rows[number]
        query = None if row.pair.query is None else _with_pictures(row.pair.query, row, "query")
        return replace(row.pair, query=query, target=_with_pictures(row.pair.target, row, "target"))


def _with_pictures(item: Item, row: Row, side: str) -> Item:
    images = []
    for path in row.files[side]:
        try:
            images.append(Image.open(io.BytesIO(path.read_bytes())))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{row.where}: field '{side}_image': {path} must be a picture, but cannot be opened: {error}."
            ) from error
    return replace(item, media=tuple(images))
