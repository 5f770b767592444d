"""Makes an index of vectors that were made elsewhere, such as by a server with the exported model.

`rime index --from_parquet` calls it. The vectors are read batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rime_pl.datamodules.builders.sources.paths import seen_from
from rime_pl.datamodules.faults import counted
from rime_pl.errors import RimeError
from rime_pl.inference.collection import digest_of
from rime_pl.inference.index import Counts, refuse_other_folder
from rime_pl.inference.index_folder import (
    COLUMNS,
    PART,
    Facts,
    IndexFolder,
    Record,
    table_of,
    told,
    write_part,
)
from rime_pl.places import places_of
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.run_lock import locked
from rime_pl.types import Mode

#: A vector whose length differs more from 1 is normalised, and that is told.
_LENGTH = 1e-2


def import_vectors(
    path: Path,
    source: Path,
    wanted: Facts,
    media: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[Counts, list[str]]:
    """Make an index of the rows of a Parquet file, and return counts and notes.

    Args:
        path: Folder of the index: empty, not there yet, or one whose import was stopped.
        source: File with the columns `id` (text or whole number, each once) and `disc` or `gen` or both
            (lists of D numbers), and if there are any `rewrite`, `text`, and `media` (a text or a list).
        wanted: What index.json shall say; modes, roots and counts are filled in.
        media: Folder that `media` counts from; None if they are not to be shown.
        progress: Called with the rows done and all rows.

    Raises:
        RimeError: If the file cannot be read, lacks a column, or its vectors have another dimension than the
            model; or the folder holds something else.
    """
    folder = IndexFolder(path)
    _check(folder, source, media)
    path.mkdir(parents=True, exist_ok=True)
    with told(source):
        file = pq.ParquetFile(source)
    modes = _modes(file.schema_arrow, source, wanted.dimension)
    facts = replace(wanted, modes=modes, kind="vectors", roots=places_of(media, path) if media else [])
    with locked(RunFolder(path)):
        if folder.facts_file.is_file() and folder.facts.kind != "vectors":
            raise RimeError(f"--output must be an empty folder, but {path} is another index.")
        write_json(folder.building, [])
        for part in path.glob("part-*.parquet"):  # of an import that was stopped; it is done again
            part.unlink()
        folder.write_facts(facts)
        reader = _Reader(file, source, facts, media)
        start = 0
        for number, (records, vectors, rewrites) in enumerate(reader.batches(progress)):
            table = table_of(facts, records, vectors, rewrites)
            write_part(path / f"part-{number:05d}.parquet", table)
            start += len(records)
        if not start:
            raise RimeError(f"{source} must have rows that can be used, but has none. {reader.first()}")
        folder.write_unusable(reader.unusable)
        folder.write_facts(replace(facts, count=start, unusable=len(reader.unusable)))
        folder.building.unlink()
    normalised = counted(reader.normalised, "vector was", "vectors were")
    notes = [f"{normalised} not of length 1, and normalised."] if reader.normalised else []
    return Counts(total=start, kept=start, unusable=len(reader.unusable)), notes


def _check(folder: IndexFolder, source: Path, media: Path | None) -> None:
    if not source.is_file():
        raise RimeError(f"--from_parquet must be a Parquet file, but there is none: {source}.")
    if media is not None and not media.is_dir():
        raise RimeError(f"--media must be a folder, but is {media}.")
    refuse_other_folder(folder)
    if folder.facts_file.is_file() and not folder.building.is_file():
        raise RimeError(f"--output must be an empty folder, but {folder} is an index. Choose another one.")


def _modes(schema: pa.Schema, source: Path, dimension: int) -> list[Mode]:
    modes: list[Mode] = [mode for mode, column in COLUMNS.items() if column in schema.names]
    if "id" not in schema.names or not modes:
        raise RimeError(f"{source} must have the column id, and disc or gen or both, but has {schema.names}.")
    for mode in modes:
        kind = schema.field(COLUMNS[mode]).type
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not listed or not pa.types.is_floating(kind.value_type):
            raise RimeError(f"{source}: column {COLUMNS[mode]!r} must hold lists of numbers, but is {kind}.")
        if pa.types.is_fixed_size_list(kind) and kind.list_size != dimension:
            raise RimeError(
                f"{source}: vectors must have {dimension} numbers, as those of the model, but column "
                f"{COLUMNS[mode]!r} has {kind.list_size}."
            )
    return modes


class _Reader:
    """Reads the rows of the file, and counts those that cannot be used."""

    def __init__(self, file: pq.ParquetFile, source: Path, facts: Facts, root: Path | None) -> None:
        self.file, self.source, self.facts, self.root = file, source, facts, root
        self.unusable: list[tuple[str, str]] = []
        self.normalised = 0
        self._ids: set[str] = set()

    def first(self) -> str:
        return f"{self.unusable[0][0]}: {self.unusable[0][1]}" if self.unusable else ""

    def batches(
        self, progress: Callable[[int, int], object]
    ) -> Iterator[tuple[list[Record], dict[Mode, Tensor], list[str | None]]]:
        """Yield the good rows of each batch."""
        there = set(self.file.schema_arrow.names)
        names = ["id", *(COLUMNS[mode] for mode in self.facts.modes)]
        names += [name for name in ("rewrite", "media", "text") if name in there]
        done, total = 0, int(self.file.metadata.num_rows)
        batches = self.file.iter_batches(PART, columns=names)
        while True:
            with told(self.source):
                batch = next(batches, None)
                rows = None if batch is None else batch.to_pydict()
            if rows is None:
                return
            good = self._good(rows, done)
            done += len(rows["id"])
            progress(done, total)
            if good:
                records, vectors, rewrites = (list(each) for each in zip(*good, strict=True))
                modes = self.facts.modes
                stacked = torch.from_numpy(np.stack(vectors))  # (n, modes, D)
                yield records, {mode: stacked[:, n] for n, mode in enumerate(modes)}, rewrites

    def _good(self, rows: Mapping[str, list[Any]], done: int) -> list[tuple[Record, Any, str | None]]:
        found = []
        for row in range(len(rows["id"])):
            values = {name: column[row] for name, column in rows.items()}
            where = f"row {done + row + 1}"
            try:
                found.append(self._row(values))
            except ValueError as error:
                self.unusable.append((where, str(error)))
        return found

    def _row(self, values: Mapping[str, Any]) -> tuple[Record, Any, str | None]:
        """Return a row; raises a ValueError that says what is wrong with it."""
        id = values["id"]
        if isinstance(id, bool) or not isinstance(id, int | str) or not str(id).strip():
            raise ValueError(f"field 'id' must be a text or a whole number, but is {id!r:.60}.")
        id = str(id)
        if id in self._ids:
            raise ValueError(f"field 'id' must be its own, but an earlier row has {id!r:.60}, too.")
        vectors = [self._vector(COLUMNS[mode], values[COLUMNS[mode]]) for mode in self.facts.modes]
        media = values.get("media") or []
        media = [media] if isinstance(media, str) else media
        texts = [values.get("rewrite"), values.get("text")]
        if not isinstance(media, list) or not all(isinstance(name, str) for name in media):
            raise ValueError(f"field 'media' must be a text or a list of texts, but is {media!r:.60}.")
        media = media if self.root is None else [seen_from(self.root, name) for name in media]
        if self.root is not None and (outside := [name for name in media if Path(name).is_absolute()]):
            raise ValueError(f"field 'media' must be below {self.root}, but names {outside[0]!r:.300}.")
        if not all(isinstance(text, str | None) for text in texts):
            raise ValueError(f"fields 'rewrite' and 'text' must be texts, but are {texts!r:.60}.")
        self._ids.add(id)
        stacked = np.stack(vectors)
        digest = digest_of("vectors", stacked.tobytes())
        return Record(id, digest, tuple(media), texts[1] or ""), stacked, texts[0]

    def _vector(self, name: str, value: Any) -> Any:
        size = self.facts.dimension
        if not isinstance(value, list) or len(value) != size or any(number is None for number in value):
            found = f"{len(value)} numbers, or null" if isinstance(value, list) else repr(value)[:60]
            raise ValueError(
                f"field {name!r} must hold {size} numbers, as a vector of the model, but is {found}."
            )
        vector = np.asarray(value, np.float32)
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"field {name!r} must be a vector of length 1, but its length is {length}.")
        self.normalised += abs(length - 1) > _LENGTH  # told; less is rounding
        return vector / length
