"""Embeds what is new in an index, part by part, and remembers which items cannot be used.

Called by index.py. A part is written when all of it is known, so a stop loses one part at most.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from rime_pl.backbone.lora import merged
from rime_pl.errors import DataError
from rime_pl.inference.collection import Scan
from rime_pl.inference.index_folder import (
    COLUMNS,
    Facts,
    IndexFolder,
    Part,
    Record,
    read_columns,
    table_of,
    vectors_of,
    write_part,
)
from rime_pl.inference.indexed_media import Media, Opened
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.sources import Source, one_item
from rime_pl.run_folder import write_json
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
    changed: int = 0  # of the unusable: its file changed since the scan; the next call embeds it
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

    def reasons(self, records: Iterable[Record]) -> dict[str, str]:
        """Return id -> reason of those items that cannot be used as they are now."""
        now = {record.id: record.digest.hex() for record in records}
        return {id: reason for id, digest, reason, _ in self.refused if now.get(id) == digest}

    def known(self) -> dict[str, tuple[str, str]]:
        """Return id -> digest and reason of the items whose part was written."""
        there = {part.path.name for part in self.folder.parts()}
        return {id: (digest, reason) for id, digest, reason, part in self.refused if part in there}


@dataclass
class _Embedded:
    """Items of one chunk by their digests."""

    vectors: dict[bytes, Tensor] = field(default_factory=dict)  # digest -> (modes, D)
    rewrites: dict[bytes, str | None] = field(default_factory=dict)
    refused: dict[bytes, str] = field(default_factory=dict)  # digest -> reason
    changed: dict[bytes, str] = field(default_factory=dict)  # digest -> reason


@dataclass
class Build:
    """Embeds what is new, part by part."""

    folder: IndexFolder
    building: Building
    scan: Scan
    media: Media
    retriever: Retriever
    batch_size: int
    part_size: int

    def embed(
        self, pending: Sequence[Record], counts: Counts, progress: Callable[[int, int], object]
    ) -> dict[str, str]:
        """Write the parts of new items; return id -> reason of those that changed since the scan."""
        changed: dict[str, str] = {}
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
                self._take_back_changed(list(new.values()), found)
                path = self.folder.next_part(parts)
                refused = {
                    one.id: (one.digest, found.refused[one.digest])
                    for one in chunk
                    if one.digest in found.refused
                }
                self.building.add(refused, path)
                changed |= {one.id: found.changed[one.digest] for one in chunk if one.digest in found.changed}
                good = [one for one in chunk if one.digest in found.vectors]
                counts.embedded += len(new.keys() & found.vectors.keys())
                counts.copied += len(good) - len(new.keys() & found.vectors.keys())
                if good:
                    write_part(path, self._table(facts, good, found))
                    parts = [*parts, Part(path, len(good))]
                    rows = {one.digest: (path, row) for row, one in enumerate(good) if times[one.digest] > 1}
                    places |= {digest: place for digest, place in rows.items() if digest not in places}
        progress(len(pending), len(pending))
        counts.changed = len(changed)
        return changed

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

    def _take_back_changed(self, records: Sequence[Record], found: _Embedded) -> None:
        """Take back what was made of a file that changed since the scan: the digest is of what it was."""
        for record in records:
            if (file := self.scan.changed(record)) is not None:
                found.vectors.pop(record.digest, None)
                found.refused.pop(record.digest, None)
                found.changed[record.digest] = (
                    f"{file} changed while it was indexed. Give the same command again."
                )

    def _table(self, facts: Facts, records: Sequence[Record], found: _Embedded) -> pa.Table:
        vectors = torch.stack([found.vectors[record.digest] for record in records])
        of_mode: dict[Mode, Tensor] = {mode: vectors[:, number] for number, mode in enumerate(facts.modes)}
        return table_of(facts, records, of_mode, [found.rewrites[record.digest] for record in records])


def _plain(reason: str) -> str:
    return _NUMBERED.sub("", reason)
