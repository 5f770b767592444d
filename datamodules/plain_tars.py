"""Makes a corpus of WebDataset tars that another program wrote, or that have an index of an earlier format.

The tars stay as they are; only the index of each split and ``corpus.json`` are written. Called by
``rime shards index``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rime_pl.bars import track
from rime_pl.datamodules.corpus_file import CORPUS_FILE, is_plain
from rime_pl.datamodules.faults import Fault, by_kind, counted, listed, place_of
from rime_pl.datamodules.index_writer import IndexWriter
from rime_pl.datamodules.split_index import FACTS, FORMAT_VERSION
from rime_pl.errors import DataError

_SHOWN = 20  # faults that an error lists
_HASHED = 1 << 20  # bytes that are hashed at once


def index(
    path: Path, *, name: str | None = None, licence: str | None = None, skip_broken: bool = False
) -> None:
    """Make the index of a folder of WebDataset tars, once; the tars stay as they are.

    Args:
        path: Folder with a folder of tars for each split, such as train, val and test.
        name: Name of the corpus (default: that in its corpus.json, or the folder's name).
        licence: Licence of the data (default: that in its corpus.json, or "not stated").
        skip_broken: Whether samples that cannot be used are left out and listed in broken.txt of the corpus.

    Raises:
        DataError: If there are no tars, if one is truncated, or if samples cannot be used (they are listed).
    """
    splits = _tars(path)
    before = _corpus_before(path)
    faults: list[Fault] = []
    about: dict[str, Any] = {}
    digest = hashlib.sha256()
    (path / CORPUS_FILE).unlink(missing_ok=True)  # an index that is half made is no corpus
    for split in sorted(splits, key=lambda split: _place(split, before)):
        writer = IndexWriter(path / split, faults)
        for tar in track(splits[split], f"split {split}", transient=True):
            writer.add(tar)
            _hash(tar, digest)
        writer.close()
        tasks = {task: count for task, count in sorted(writer.tasks.items()) if count}
        about[split] = {"shards": writer.shards, "samples": sum(tasks.values()), "tasks": tasks}
    if faults and not skip_broken:
        for split in splits:
            (path / split / FACTS).unlink()
        listing = listed(faults, _SHOWN)
        found = counted(len(faults), "sample cannot be used", "samples cannot be used")
        raise DataError(f"{path}: {found}:\n{listing}\nRepair them, or add --skip_broken to leave them out.")
    corpus = {
        "name": name or before.get("name") or path.resolve().name,
        "format": FORMAT_VERSION,
        "licence": licence or before.get("licence") or "not stated",
        "seed": before.get("seed", 0),
        "arguments": before.get("arguments", {}),
        "data_hash": digest.hexdigest(),
        "splits": {split: facts for split, facts in about.items() if facts["samples"]},
    }
    if faults:
        words = "\n".join(str(fault) for fault in sorted(faults, key=place_of))
        (path / "broken.txt").write_text(words + "\n", encoding="utf-8")
        left = counted(len(faults), "sample was", "samples were")
        said = f"{left} left out: {by_kind(faults)}. broken.txt lists all."
        Console(highlight=False, markup=False).print(said)
    (path / CORPUS_FILE).write_text(json.dumps(corpus, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tars(path: Path) -> dict[str, list[Path]]:
    """Return the tars of each split, by name."""
    if not path.is_dir():
        raise DataError(f"--path must be a folder of tars, but {str(path)!r} does not exist.")
    found = {
        folder.name: tars
        for folder in sorted(path.iterdir())
        if folder.is_dir() and is_plain(folder.name) and (tars := sorted(folder.glob("*.tar")))
    }
    if not found:
        raise DataError(
            f"--path must be a folder with a folder of tars for each split, such as {path / 'train'}, but "
            f"{path} has none."
        )
    for tar in (tar for tars in found.values() for tar in tars):
        if not is_plain(tar.name) or not tar.is_file():
            raise DataError(f"{tar}: must be a file with a printable name of at most 200 bytes. Rename it.")
    return found


def _corpus_before(path: Path) -> dict[str, Any]:
    """Return ``corpus.json`` of an earlier index, {} if there is none that can be read."""
    try:
        before = json.loads((path / CORPUS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return before if isinstance(before, dict) else {}


def _place(split: str, before: dict[str, Any]) -> tuple[int, str]:
    """Return a key that keeps the order of an earlier ``corpus.json``, and so its hash."""
    order = list(before["splits"]) if isinstance(before.get("splits"), dict) else []
    return (order.index(split) if split in order else len(order), split)


def _hash(tar: Path, digest: Any) -> None:
    digest.update(f"{tar.parent.name}/{tar.name}\n".encode())
    with tar.open("rb") as file:
        while block := file.read(_HASHED):
            digest.update(block)
