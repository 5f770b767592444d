"""Builds a corpus from your own pairs: a table and a folder of pictures, videos and documents.

All faults are told at once, each with its line and field, and a corpus that was there stays. Called by
``rime shards folder``. The columns are documented in docs/how-to/your-own-data.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rime_pl.clips import PAGE_SIDE
from rime_pl.datamodules.builders.building import built, corpus_of
from rime_pl.datamodules.builders.planning import (
    PER_SHARD,
    SPLITS,
    Plan,
    Planned,
    Source,
    Unit,
    check_shares,
    say,
    split_of,
)
from rime_pl.datamodules.builders.sources.drafts import Draft
from rime_pl.datamodules.builders.sources.records import Place, Record, SourceFile
from rime_pl.datamodules.builders.table import Table, read_table
from rime_pl.datamodules.builders.table_file import table_hash
from rime_pl.datamodules.builders.table_rows import MediaSettings, Row
from rime_pl.datamodules.faults import Fault, counted, listed, place_of
from rime_pl.datamodules.shard_writer import write_corpus_file
from rime_pl.errors import DataError, RimeError

_SHOWN = 20  # faults that an error lists
_FEW = 30  # contents of a test split, below which its results say little


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
    caption_rewrites: bool = True,
    skip_broken: bool = False,
    frames: int = MediaSettings.frames,
    frame_side: int = MediaSettings.frame_side,
    page_side: int = PAGE_SIDE,
    workers: int = 0,
) -> None:
    """Turn your own table of pairs into shards: texts, pictures, videos and pages of PDF files.

    The columns image and caption are enough: captions then find pictures, and pictures captions.

    Args:
        output: Corpus folder to write; a corpus that is there is replaced when the new one is complete.
        seed: Seed of the split, for rows without a value in column 'split'.
        table: CSV or TSV file with a header line, JSONL file with one object per line, or Parquet file.
        media: Folder of the files that the table names; the folder of the table if not given.
        name: Name of the corpus.
        licence: Licence of your data, recorded in corpus.json.
        val_share: Share of the contents in the validation split, for rows without a split.
        test_share: Share of the contents in the test split, for rows without a split.
        caption_rewrites: Whether a caption is also the rewrite of its picture and of itself.
        skip_broken: Whether faulty rows are left out and listed in broken.txt of the corpus.
        frames: Number of frames of a video.
        frame_side: Pixels of the longer side of a frame; larger ones are made smaller.
        page_side: Pixels of the longer side of a page of a PDF.
        workers: Number of threads that open media; 0 takes one for each CPU.

    Raises:
        RimeError: If the table has faulty rows (they are listed), or a split that is needed gets no rows.
    """
    found = read_table(table, media, MediaSettings(frames, frame_side, page_side), caption_rewrites)
    splits = deal(found.rows, seed, val_share, test_share)
    wanted = {split: len(rows) for split, rows in splits.items()}
    if not found.faults:
        missing_splits(table, wanted)
        found.notes += _few_to_test(splits)
    arguments = _origin(table, caption_rewrites, val_share=val_share, test_share=test_share)
    source = _Rows(name, licence, table, _all(splits), arguments)
    plan = _plan(source, wanted, (seed, frames, frame_side, page_side))
    _tell_left_out(_write(output, source, plan, found, seed, workers, skip_broken), output)


def _origin(table: Path, caption_rewrites: bool, **shares: float) -> dict[str, Any]:
    made = {"table": table.name, "table_sha256": table_hash(table)}
    return {**made, **shares, "caption_rewrites": caption_rewrites}


def _all(splits: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for rows in splits.values() for row in rows]


def _tell_left_out(faults: Sequence[Fault], output: Path) -> None:
    if faults:
        were = counted(_num_rows(faults), "row was", "rows were")
        say(f"{were} left out. {output / 'broken.txt'} lists them:\n{listed(faults, _SHOWN)}")


def _write(
    output: Path, source: _Rows, plan: Plan, found: Table, seed: int, workers: int, skip_broken: bool
) -> list[Fault]:
    """Write the corpus and return the faults of the rows that were left out; tell what a user should know."""
    with built(output, source, plan, workers, dry=bool(found.faults) and not skip_broken) as build:
        unusable = (Fault(*refused) for refused in build.refused())
        faults = [*dict.fromkeys([*found.faults, *unusable])]  # two pairs may show one picture
        about = build.about()
        kept = {split: about[split]["samples"] if split in about else 0 for split in SPLITS}
        try:
            if faults and not skip_broken:
                raise DataError(_refusal(source.path, faults))
            notes = [*found.notes, *_missing(source.path, kept, faults)]
        except RimeError:
            build.forget()
            raise
        for note in notes:
            say(note)
        corpus = corpus_of(build.folder, source, seed, dict(source.arguments), about)
        write_corpus_file(build.folder, corpus, [str(fault) for fault in sorted(faults, key=place_of)])
    return faults


class _Rows(Source, SourceFile):
    """The good rows of a table, as the file that the second pass reads."""

    expected: Mapping[str, Any] = {}

    def __init__(
        self, name: str, licence: str, table: Path, rows: Sequence[Row], arguments: Mapping[str, Any]
    ) -> None:
        self.name, self.licence, self.path, self.rows = name, licence, table, rows
        self.arguments = arguments
        self.files = [self]
        self.total = len(rows)

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return one name for all rows."""
        return self.name

    def records(self) -> Iterator[Record]:
        """Yield all rows."""
        return self.read([Place(number, 0) for number in range(len(self.rows))])

    def read(self, places: Sequence[Place]) -> Iterator[Record]:
        """Yield the rows at the given places."""
        for place in places:
            yield Record(place, {"row": self.rows[place.row]}, place.row + 1)

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pair of a row."""
        yield self.rows[row].draft()

    def where(self, row: int) -> str:
        """Return what errors and samples call a row."""
        return self.rows[row].where

    def key(self, row: int, part: int) -> str:
        """Return the key of a row."""
        return self.rows[row].pair.key


def _plan(source: _Rows, wanted: Mapping[str, int], settings: Sequence[Any]) -> Plan:
    """Return shards with the rows of each split, in the order of the table."""
    plan = Plan(pairs=dict(wanted))
    start = 0
    for split, count in wanted.items():
        numbers = [Planned(0, number, 0, 0) for number in range(start, start + count)]
        for first in range(0, count, PER_SHARD):
            chunk = tuple(numbers[first : first + PER_SHARD])
            plan.units.append(Unit(len(plan.units), split, first // PER_SHARD, chunk))
        start += count
    digest = hashlib.sha256(
        repr((source.name, source.licence, dict(source.arguments), *settings, dict(wanted))).encode()
    )
    for row in source.rows:
        files = [file for side in row.files.values() for file in side]
        looks = [(file, about.st_size, about.st_mtime_ns) for file in files for about in [file.path.stat()]]
        digest.update(repr((row.where, row.pair, looks)).encode(errors="surrogatepass"))
    plan.fingerprint = digest.hexdigest()
    return plan


def _few_to_test(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return a note if training is possible, but its test would say little."""
    contents = len({row.pair.target.content_id for row in splits["test"]})
    if not splits["train"] or contents >= _FEW:
        return []
    return [
        f"The test split has {counted(contents, 'target', 'targets')}, so one right answer more changes a "
        f"result by {1 / contents:.0%}. --test_share makes the split larger."
    ]


def deal(rows: Sequence[Row], seed: int, val_share: float, test_share: float) -> dict[str, list[Row]]:
    """Return the rows of each split: as the table says, or else by hash of the target's content.

    Raises:
        RimeError: If the shares are negative or add up to more than 1.
    """
    check_shares(val_share, test_share)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        by_hash = split_of(row.pair.target.content_id, seed, val_share, test_share)
        splits[row.split or by_hash].append(row)
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


def _refusal(table: Path, faults: Sequence[Fault]) -> str:
    if len(faults) == 1:
        return str(faults[0])
    return (
        f"{counted(_num_rows(faults), 'row', 'rows')} of {table} cannot be used, so nothing was built:\n"
        f"{listed(faults, _SHOWN)}\n"
        "Repair them, or leave them out with --skip_broken. `rime shards check` lists all of them, "
        "and texts that are too long."
    )


def _num_rows(faults: Sequence[Fault]) -> int:
    """Return the number of rows that have faults; some have several."""
    return len({fault.where for fault in faults})
