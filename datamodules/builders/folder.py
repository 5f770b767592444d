"""Builds a corpus from your own pairs: a CSV or JSONL table and a folder of pictures.

All faults are told at once, each with its line and field, and a corpus that was there stays. Called by
``rime shards folder``. The columns are documented in docs/how-to/your-own-data.md.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console

from rime_pl.datamodules.builders.table import SPLITS, Row, read_table
from rime_pl.datamodules.faults import Fault, counted, listed, place_of
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import DataError, RimeError
from rime_pl.media import stored_picture
from rime_pl.types import Pair

_SHOWN = 20  # faults that an error lists


def build(
    output: Path,
    seed: int = 0,
    *,
    table: Path,
    media: Path | None = None,
    name: str = "folder",
    licence: str = "not stated",
    val_share: float = 0.1,
    test_share: float = 0.1,
    skip_broken: bool = False,
) -> None:
    """Turn your own table of pairs into shards.

    Args:
        output: Corpus folder to write. A corpus that is there is replaced when the new one is complete.
        seed: Seed of the split, for rows without a value in column 'split'.
        table: CSV file with a header line, or JSONL file with one object per line.
        media: Folder of the files that the picture columns name; the folder of the table if not given.
        name: Name of the corpus.
        licence: Licence of your data, recorded in corpus.json.
        val_share: Share of the contents in the validation split, for rows without a split.
        test_share: Share of the contents in the test split, for rows without a split.
        skip_broken: Whether faulty rows are left out and listed in broken.txt of the corpus.

    Raises:
        RimeError: If the table has faulty rows (they are listed), or if a split that is needed gets no rows.
    """
    found = read_table(table, media)
    rows = deal(found.rows, seed, val_share, test_share)
    pictures = Pictures(found.faults, skip_broken)
    wanted = {split: len(of_split) for split, of_split in rows.items()}
    if not found.faults:
        missing_splits(table, wanted)  # raises before any picture is opened

    def left_out() -> list[str]:
        if found.faults and not skip_broken:
            raise DataError(_refusal(table, found.faults))
        kept = {split: wanted[split] - pictures.left_out[split] for split in wanted}
        for note in (*found.notes, *_missing(table, kept, found.faults)):
            _say(note)
        return [str(fault) for fault in sorted(found.faults, key=place_of)]

    splits = {split: pictures.pairs(split, of_split) for split, of_split in rows.items()}
    arguments = {"table": table.name, "val_share": val_share, "test_share": test_share}
    write_corpus(output, name, licence, splits, wanted, seed, arguments, left_out=left_out)
    if found.faults:
        rows_were = counted(_rows(found.faults), "row was", "rows were")
        _say(f"{rows_were} left out. {output / 'broken.txt'} lists them:")
        _say(listed(found.faults, _SHOWN))


def deal(rows: Sequence[Row], seed: int, val_share: float, test_share: float) -> dict[str, list[Row]]:
    """Return the rows of each split: as the table says, or else by hash of the target's content.

    Raises:
        RimeError: If the shares are negative or add up to more than 1.
    """
    if min(val_share, test_share) < 0 or val_share + test_share > 1:
        raise RimeError(
            f"val_share and test_share must be at least 0 and add up to at most 1, but are {val_share} and "
            f"{test_share}."
        )
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        splits[row.split or _split_of(row, seed, val_share, test_share)].append(row)
    return splits


def missing_splits(table: Path, counts: Mapping[str, int]) -> list[str]:
    """Return notes on splits without rows. A corpus without a train split serves evaluation.

    Raises:
        RimeError: If there are training rows but nothing to validate or test with, or no rows at all.
    """
    missing = [split for split in SPLITS[:3] if not counts[split]]
    if not missing:
        return []
    if counts["train"] or len(missing) == 3:
        has = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise RimeError(
            f"{table}: split {missing[0]!r} must have rows, but has none ({has}). Add rows, name the "
            "split of some in column 'split', or raise --val_share and --test_share."
        )
    names = " and ".join(missing)
    return [f"{table.name} has no rows for {names}: the corpus can be evaluated, but not trained on."]


def _missing(table: Path, kept: Mapping[str, int], faults: Sequence[Fault]) -> list[str]:
    """Return what `missing_splits` does; its error also lists the rows that were left out."""
    try:
        return missing_splits(table, kept)
    except RimeError as error:
        raise RimeError(f"{error}\n{listed(faults, _SHOWN)}" if faults else str(error)) from error


class Pictures:
    """Opens the pictures of rows, decodes each once, and tells which cannot be used.

    Args:
        faults: Where faults are added, with the line and the field of the row.
        skip_broken: Whether good rows are still handed on after a fault; otherwise nothing will be built.
    """

    def __init__(self, faults: list[Fault], skip_broken: bool = True) -> None:
        self.faults, self.skip_broken = faults, skip_broken
        self.left_out: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self._plain: set[Path] = set()  # decoded before, and kept as they are
        self._broken: dict[Path, str] = {}

    def pairs(self, split: str, rows: Sequence[Row]) -> Iterator[Pair | None]:
        """Yield the pairs of a split with their pictures, None for one that is left out."""
        for row in rows:
            pair = self._pair(row)
            self.left_out[split] += pair is None
            yield pair if self.skip_broken or not self.faults else None

    def _pair(self, row: Row) -> Pair | None:
        before = len(self.faults)
        query, target = self._images(row, "query"), self._images(row, "target")
        if len(self.faults) > before:
            return None
        of_query = None if row.pair.query is None else replace(row.pair.query, media=query)
        return replace(row.pair, query=of_query, target=replace(row.pair.target, media=target))

    def _images(self, row: Row, side: str) -> tuple[Image.Image, ...]:
        """Return undecoded pictures: the writer copies their bytes."""
        images = []
        for path in row.files[side]:
            try:
                images.append(Image.open(io.BytesIO(self._bytes(path))))
            except (DataError, FileNotFoundError, PermissionError) as error:
                said = f"field '{side}_image': {error}"
                self.faults.append(Fault("unusable picture", row.where, said))
        return tuple(images)

    def _bytes(self, path: Path) -> bytes:
        if path in self._plain:
            return path.read_bytes()
        if path in self._broken:
            raise DataError(self._broken[path])
        data = path.read_bytes()
        try:
            stored = stored_picture(data, str(path))
        except DataError as error:
            self._broken[path] = str(error)
            raise
        if stored is data:
            self._plain.add(path)
        return stored


def _split_of(row: Row, seed: int, val_share: float, test_share: float) -> str:
    """Return the split of a row by hash of its target's content, so that no content is in two splits."""
    digest = hashlib.sha256(f"{seed} {row.pair.target.content_id}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def _refusal(table: Path, faults: Sequence[Fault]) -> str:
    if len(faults) == 1:
        return str(faults[0])
    return (
        f"{counted(_rows(faults), 'row', 'rows')} of {table} cannot be used, so nothing was built:\n"
        f"{listed(faults, _SHOWN)}\n"
        "Repair them, or leave them out with --skip_broken. `rime shards check` lists all of them, "
        "and texts that are too long."
    )


def _rows(faults: Sequence[Fault]) -> int:
    """Return the number of rows that have faults; some have several."""
    return len({fault.where for fault in faults})


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
