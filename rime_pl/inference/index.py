"""Builds an index of items, and keeps it up to date: only what is new is embedded, what has gone is dropped.

`rime index` calls it. It works part by part, so a build that was killed goes on where it was, and ends in the
same parts as one that was not. index_folder.py knows the files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rime_pl.backbone.lora import merged
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.collection import Scan
from rime_pl.inference.index_folder import (
    COLUMNS,
    PART,
    Facts,
    IndexFolder,
    Part,
    Record,
    read_columns,
    records_of,
    table_of,
    vectors_of,
    write_part,
)
from rime_pl.inference.indexed_media import Media, Opened
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.sources import Source, one_item
from rime_pl.places import places_of
from rime_pl.run_folder import RunFolder, write_json, write_text
from rime_pl.run_lock import locked
from rime_pl.types import Mode

#: What an error calls an item of several; the index names it by its id.
_NUMBERED = re.compile(r"^(?:item \d+|the item)[,:]? ")


@dataclass
class Counts:
    """What one call did with the items."""

    total: int = 0  # in the index now
    embedded: int = 0
    kept: int = 0  # the same as before
    renamed: int = 0  # the same content under another id: its vectors were kept
    copied: int = 0  # the same content as another item: embedded once
    dropped: int = 0  # not there any more, or with other content
    unusable: int = 0


@dataclass
class Building:
    """What must not be forgotten when a build is killed: items of finished parts that cannot be used."""

    folder: IndexFolder
    refused: list[tuple[str, str, str, str]] = field(default_factory=list)  # id, digest, reason, part

    @classmethod
    def begin(cls, folder: IndexFolder) -> Building:
        """Go on with the build that was killed, or begin one."""
        found = cls(folder)
        if folder.building.is_file():
            try:
                rows = [tuple(map(str, row)) for row in json.loads(folder.building.read_text())]
                found.refused = [(id, digest, reason, part) for id, digest, reason, part in rows]
            except (ValueError, TypeError):  # items are looked at again
                found.refused = []
        found.save()
        return found

    def save(self) -> None:
        write_json(self.folder.building, self.refused)

    def add(self, refused: Mapping[str, tuple[bytes, str]], part: Path) -> None:
        """Keep what is wrong with items, id -> digest and reason, before their part is written."""
        if refused:
            self.refused = [row for row in self.refused if row[0] not in refused]
            self.refused += [(id, digest.hex(), why, part.name) for id, (digest, why) in refused.items()]
            self.save()

    def known(self) -> dict[str, tuple[str, str]]:
        """Return id -> digest and reason of the items whose part was written."""
        there = {part.path.name for part in self.folder.parts()}
        return {id: (digest, reason) for id, digest, reason, part in self.refused if part in there}


def update_index(
    path: Path,
    scan: Scan,
    media: Media,
    retriever: Retriever,
    wanted: Facts,
    batch_size: int = 32,
    part_size: int = PART,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Counts:
    """Make an index hold exactly the items of a scan, and return the counts.

    Args:
        path: Folder of the index; it is made if it is not there.
        scan: The items.
        media: Opens them.
        retriever: The model.
        wanted: What index.json shall say; roots and counts are filled in.
        batch_size: Largest number of items in a forward.
        part_size: Items of a part.
        progress: Called with the items that are embedded and the items that are to be embedded.

    Raises:
        RimeError: If the folder is no index, is one of another model, or is in use; or no item can be used.
    """
    folder = IndexFolder(path)
    refuse_other_folder(folder)
    path.mkdir(parents=True, exist_ok=True)
    wanted = replace(wanted, kind=scan.kind, source=scan.source, roots=places_of(scan.root, path))
    with locked(RunFolder(path)):
        old = folder.facts if folder.facts_file.is_file() else None
        if old is not None:
            refuse_other_index(folder, old, wanted)
            _refuse_other_items(folder, old, scan, wanted)
        building = Building.begin(folder)
        folder.write_facts(wanted)
        counts, pending = _reconcile(folder, scan.records)
        known = building.known()
        pending = [one for one in pending if known.get(one.id, ("",))[0] != one.digest.hex()]
        _Build(folder, building, media, retriever, batch_size, part_size).embed(pending, counts, progress)
        ids = {record.id for record in scan.records}
        unusable = {**scan.unusable, **{id: reason for id, _, reason, _ in building.refused if id in ids}}
        lines = [json.dumps({"id": id, "reason": why}, ensure_ascii=False) for id, why in unusable.items()]
        write_text(folder.unusable, "".join(line + "\n" for line in lines))
        counts.total, counts.unusable = sum(part.rows for part in folder.parts()), len(unusable)
        folder.write_facts(replace(wanted, count=counts.total, unusable=counts.unusable))
        folder.building.unlink()
    if not counts.total:
        raise RimeError(f"{folder} must have a usable item, but has none: {folder.unusable} says why.")
    return counts


def refuse_other_folder(folder: IndexFolder) -> None:
    """Raise a RimeError on a folder that holds something else than an index."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RimeError(f"--output must be the folder of an index, but {path} is a file.")
    there = path.is_dir() and any(path.iterdir())
    if there and not folder.facts_file.is_file() and not folder.building.is_file():
        raise RimeError(f"--output must be an index or an empty folder, but {path} holds other files.")


def refuse_other_index(folder: IndexFolder, old: Facts, wanted: Facts) -> None:
    """Raise a RimeError that says what differs, unless both are made alike and by the same model."""
    differs = model_difference(old.model, wanted.model)
    for name in ("dimension", "modes", "instruction", "dtype", "kind", "source"):
        there, new = getattr(old, name), getattr(wanted, name)
        if there != new:
            differs.append(f"{name} is {there!r} there and {new!r} here")
    if differs:
        raise RimeError(
            f"{folder} must be an index of the same model and source, but is not: {'; '.join(differs)}. "
            "Choose another folder, or remove this one."
        )


def model_difference(there: str, here: str) -> list[str]:
    """Return what differs between the identities of two models; [] if nothing does.

    Example:
        >>> model_difference('[{"r": 4}, {"weights_hash": "aa"}]', '[{"r": 4}, {"weights_hash": "bb"}]')
        ["the model's weights_hash is 'aa' there and 'bb' here"]
    """
    if there == here:
        return []
    try:
        first, second = (
            {k: v for part in json.loads(name) for k, v in part.items()} for name in (there, here)
        )
    except (ValueError, TypeError, AttributeError):
        return [f"the model is {there or 'unknown'!r:.80} there and {here or 'unknown'!r:.80} here"]
    values = {name: (first.get(name), second.get(name)) for name in first | second}
    values = {name: both for name, both in values.items() if both[0] != both[1]}
    short = [(name, *both) for name, both in values.items() if len(f"{both}") < 40]
    told = [f"the model's {name} is {there!r} there and {here!r} here" for name, there, here in short]
    return told[:3] or [f"the model's {', '.join(values)} differ"]


def _refuse_other_items(folder: IndexFolder, old: Facts, scan: Scan, wanted: Facts) -> None:
    """Raise a RimeError on a source that shares nothing with the index: all of it would be dropped."""
    if not old.count or set(old.roots) & set(wanted.roots):
        return
    digests = {record.digest for record in scan.records}
    if not any(record.digest in digests for part in folder.parts() for record in records_of(part)):
        raise RimeError(
            f"{folder} is an index of {old.roots[0] if old.roots else 'other items'}, and {scan.root} has "
            "none of its items. Choose another --output, or remove this folder."
        )


def _reconcile(folder: IndexFolder, records: Iterable[Record]) -> tuple[Counts, list[Record]]:
    """Drop and rename rows of the parts, so that all of them are wanted; return what is to be embedded.

    A row with the content of an item under another id becomes that item. Each part is replaced at once, so
    after a kill at any moment the next call does what is left.
    """
    counts, wanted = Counts(), {record.id: record for record in records}
    parts = folder.parts()
    rows = {part.path: records_of(part) for part in parts}
    assigned: dict[Path, list[Record | None]] = {}
    for part in parts:
        assigned[part.path] = []
        for row in rows[part.path]:
            same = wanted.get(row.id)
            keep = same is not None and same.digest == row.digest
            assigned[part.path].append(wanted.pop(row.id) if keep else None)
            counts.kept += keep
    waiting: dict[bytes, list[Record]] = {}
    for record in reversed(wanted.values()):
        waiting.setdefault(record.digest, []).append(record)
    for part in parts:
        new = assigned[part.path]
        for number, row in enumerate(rows[part.path]):
            if new[number] is None and waiting.get(row.digest):
                new[number] = wanted.pop(waiting[row.digest].pop().id)
                counts.renamed += 1
        counts.dropped += new.count(None)
        if new != rows[part.path]:
            _replace_rows(part, new)
    return counts, list(wanted.values())


def _replace_rows(part: Part, records: Sequence[Record | None]) -> None:
    """Write a part again with other records for its rows; those of None are dropped."""
    kept = [number for number, record in enumerate(records) if record is not None]
    if not kept:
        part.path.unlink()
        return
    table = read_columns(part, None).take(kept)
    found = [record for record in records if record is not None]
    columns: dict[str, list[Any]] = {
        "id": [record.id for record in found],
        "media": [list(record.media) for record in found],
        "text": [record.text for record in found],
        "instruction": [record.instruction for record in found],
    }
    for name, values in columns.items():
        about = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), about, pa.array(values, about.type))
    write_part(part.path, table)


@dataclass
class _Embedded:
    """Items of one chunk by their digests."""

    vectors: dict[bytes, Tensor] = field(default_factory=dict)  # digest -> (modes, D)
    rewrites: dict[bytes, str | None] = field(default_factory=dict)
    refused: dict[bytes, str] = field(default_factory=dict)  # digest -> reason


@dataclass
class _Build:
    """Embeds what is new, part by part."""

    folder: IndexFolder
    building: Building
    media: Media
    retriever: Retriever
    batch_size: int
    part_size: int

    def embed(
        self, pending: Sequence[Record], counts: Counts, progress: Callable[[int, int], object]
    ) -> None:
        """Write the parts of new items."""
        facts, parts = self.folder.facts, self.folder.parts()
        times = Counter(record.digest for record in pending)
        places = self._places(parts, times)
        with merged(self.retriever.backbone):
            for start in range(0, len(pending), self.part_size):
                chunk = pending[start : start + self.part_size]
                progress(start, len(pending))

                def each(done: int, start: int = start, size: int = len(chunk)) -> None:
                    progress(start + min(done, size), len(pending))

                found = self._copied([one for one in chunk if one.digest in places], places)
                new = {one.digest: one for one in chunk if one.digest not in places}
                self._encode(list(new.values()), found, each)
                path = self.folder.next_part(parts)
                refused = {
                    one.id: (one.digest, found.refused[one.digest])
                    for one in chunk
                    if one.digest in found.refused
                }
                self.building.add(refused, path)
                good = [one for one in chunk if one.digest in found.vectors]
                counts.embedded += len(new.keys() & found.vectors.keys())
                counts.copied += len(good) - len(new.keys() & found.vectors.keys())
                if good:
                    write_part(path, self._table(facts, good, found))
                    parts = [*parts, Part(path, len(good))]
                    rows = {one.digest: (path, row) for row, one in enumerate(good) if times[one.digest] > 1}
                    places |= {digest: place for digest, place in rows.items() if digest not in places}
        progress(len(pending), len(pending))

    def _places(self, parts: Sequence[Part], wanted: Mapping[bytes, int]) -> dict[bytes, tuple[Path, int]]:
        """Return where contents that are wanted are in the parts already."""
        found: dict[bytes, tuple[Path, int]] = {}
        for part in parts if wanted else ():
            for row, digest in enumerate(read_columns(part, ["digest"])["digest"].to_pylist()):
                if digest in wanted:
                    found.setdefault(digest, (part.path, row))
        return found

    def _copied(self, records: Sequence[Record], places: Mapping[bytes, tuple[Path, int]]) -> _Embedded:
        found = _Embedded()
        by_part: dict[Path, dict[bytes, int]] = {}
        for record in records:
            path, row = places[record.digest]
            by_part.setdefault(path, {})[record.digest] = row
        modes = self.folder.facts.modes
        for path, rows in by_part.items():
            names = [*(COLUMNS[mode] for mode in modes), "rewrite"]
            table = read_columns(Part(path, 0), names).take(list(rows.values()))
            vectors = torch.stack([vectors_of(table, mode) for mode in modes], dim=1)
            found.vectors |= dict(zip(rows, vectors, strict=True))
            found.rewrites |= dict(zip(rows, table["rewrite"].to_pylist(), strict=True))
        return found

    def _encode(self, records: Sequence[Record], found: _Embedded, each: Callable[[int], object]) -> None:
        """Embed items of distinct content: files sorted by size and opened by threads, others in order."""
        ready: list[Source] = []
        files: list[Record] = []
        for record in filter(self.media.is_file, records):
            try:
                ready.append(self.media.source(record))
                files.append(record)
            except DataError as error:
                found.refused[record.digest] = str(error)
        others = [record for record in records if not self.media.is_file(record)]
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            each(done)

        self._encode_rows(ready, files, found, count)
        self._encode_rows(Opened(self.media, others), others, found, count)

    def _encode_rows(
        self,
        items: Sequence[Source],
        records: Sequence[Record],
        found: _Embedded,
        each: Callable[[int], object],
    ) -> None:
        """Embed items; of several that fail together, halves are tried until the faulty ones are found."""
        if not records:
            return
        facts = self.folder.facts
        given = (facts.modes, self.batch_size, facts.instruction)
        try:
            encoded = self.retriever.encode_modes(items, *given, skip_unusable=True, each=each)
        except DataError as error:
            if len(records) > 1:
                half = len(records) // 2
                for part in (slice(0, half), slice(half, None)):
                    self._encode_rows(items[part], records[part], found, each)
                return
            wrong: dict[int, str] = {}
            one_item(items, 0, facts.instruction, wrong)
            found.refused[records[0].digest] = _plain(wrong.get(0, str(error)))
            return
        unusable = next(iter(encoded.values())).unusable
        found.refused |= {records[number].digest: _plain(why) for number, why in unusable.items()}
        good = [record for number, record in enumerate(records) if number not in unusable]
        vectors = torch.stack([encoded[mode].embeddings for mode in facts.modes], dim=1)
        rewrites = encoded["generative"].rewrites if "generative" in encoded else None
        for number, record in enumerate(good):
            found.vectors[record.digest] = vectors[number]
            found.rewrites[record.digest] = rewrites[number] if rewrites else None

    def _table(self, facts: Facts, records: Sequence[Record], found: _Embedded) -> pa.Table:
        vectors = torch.stack([found.vectors[record.digest] for record in records])
        of_mode: dict[Mode, Tensor] = {mode: vectors[:, number] for number, mode in enumerate(facts.modes)}
        return table_of(facts, records, of_mode, [found.rewrites[record.digest] for record in records])


def _plain(reason: str) -> str:
    return _NUMBERED.sub("", reason)
