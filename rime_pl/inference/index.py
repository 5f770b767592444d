"""Builds an index of items, and keeps it up to date: only what is new is embedded, what has gone is dropped.

`rime index` calls it. It works part by part, so a build that was killed goes on where it was, and ends in the
same parts as one that was not. index_parts.py embeds, index_folder.py knows the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from rime_pl.errors import RimeError
from rime_pl.inference.collection import Scan
from rime_pl.inference.index_folder import (
    PART,
    Facts,
    IndexFolder,
    Part,
    Record,
    read_columns,
    records_of,
    write_part,
)
from rime_pl.inference.index_parts import Build, Building, Counts
from rime_pl.inference.indexed_media import Media
from rime_pl.inference.retriever import Retriever
from rime_pl.places import places_of
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import locked


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
        build = Build(folder, building, scan, media, retriever, batch_size, part_size)
        changed = build.embed(pending, counts, progress)
        unusable = {**scan.unusable, **building.reasons(scan.records), **changed}
        folder.write_unusable(unusable.items())
        counts.total, counts.unusable = sum(part.rows for part in folder.parts()), len(unusable)
        folder.write_facts(replace(wanted, count=counts.total, unusable=counts.unusable))
        folder.building.unlink()
    if not counts.total:
        raise RimeError(f"{folder} must have a usable item, but has none: {folder.unusable} says why.")
    return counts


def refuse_other_folder(folder: IndexFolder) -> None:
    """Raise a RimeError on a folder that holds something else than an index."""
    path = folder.path
    if path.is_symlink() and not path.exists():  # a link to a folder is followed
        raise RimeError(f"--output must be the folder of an index, but {path} is a link to nothing.")
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
