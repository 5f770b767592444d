"""Writes a corpus again with its mined negatives: new tars of the training split, other splits as they are.

Called by the command. A tar keeps its name and its samples, so that the same pairs keep their rewrites at any
``data.annotated_share``, and a run with the negatives sees the pairs in the order of a run without them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rime_pl.datamodules.mining.choosing import Choice
from rime_pl.datamodules.mining.items import Catalogue
from rime_pl.datamodules.replacing import replacing
from rime_pl.datamodules.shard_writer import (
    BROKEN_FILE,
    Encoder,
    add_to_hash,
    strangers,
    write_corpus_file,
    write_index,
    write_shard,
)
from rime_pl.datamodules.split_index import INDEX_FILES
from rime_pl.types import Pair

TRAIN = "train"


def write_mined(
    source: Path,
    corpus: Mapping[str, Any],
    output: Path,
    catalogue: Catalogue,
    chosen: Mapping[int, Sequence[Choice]],
    keep: bool,
    record: Mapping[str, Any],
    each: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write a corpus folder with hard negatives in its training split, and return its ``corpus.json``.

    Args:
        source: The corpus that was mined.
        corpus: Its ``corpus.json``.
        output: Folder to write. A corpus that is there is replaced at the end; if anything fails, it stays.
        catalogue: Of the training split.
        chosen: Row of a pair -> its new negatives.
        keep: Whether the negatives that a pair has already stay in front of them; otherwise they go.
        record: What made them; added to ``arguments.mined_negatives``.
        each: Called after each training sample and after each tar of another split.

    Raises:
        RimeError: If ``output`` holds other files, or cannot be written.
    """
    arguments = dict(corpus.get("arguments") or {})
    before = arguments.get("mined_negatives") if keep else None
    arguments["mined_negatives"] = [*(before if isinstance(before, list) else []), dict(record)]
    with replacing(output, strangers) as folder:
        splits: dict[str, Any] = {}
        digest = hashlib.sha256()
        for split, about in corpus["splits"].items():
            (folder / split).mkdir()
            if split == TRAIN:
                about = _write_training(folder / split, catalogue, chosen, keep, each)
            else:
                _copy(source / split, folder / split, about["shards"], each)
            for name in about["shards"]:
                add_to_hash(digest, folder / split / name)
            splits[split] = about
        written = {**corpus, "arguments": arguments, "data_hash": digest.hexdigest(), "splits": splits}
        write_corpus_file(folder, written, [*_broken(source), *catalogue.broken.values()])
    return written


def _copy(source: Path, folder: Path, shards: Sequence[str], each: Callable[[], object]) -> None:
    for name in INDEX_FILES:
        shutil.copyfile(source / name, folder / name)
    for name in shards:
        shutil.copyfile(source / name, folder / name)
        each()


def _broken(source: Path) -> list[str]:
    file = source / BROKEN_FILE
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _write_training(
    folder: Path,
    catalogue: Catalogue,
    chosen: Mapping[int, Sequence[Choice]],
    keep: bool,
    each: Callable[[], object],
) -> dict[str, Any]:
    encoder, tasks, shards, first = Encoder(), Counter[str](), [], 0
    for shard in catalogue.entries.parts[0].shards:
        pairs = list(_pairs(catalogue, range(first, first + shard.samples), chosen, keep, each))
        first += shard.samples
        if pairs:
            write_shard(folder / shard.name, pairs, encoder)
            shards.append(shard.name)
            tasks.update(pair.dataset for pair in pairs)
    write_index(folder, shards)
    return {"shards": shards, "samples": tasks.total(), "tasks": dict(sorted(tasks.items()))}


def _pairs(
    catalogue: Catalogue,
    rows: range,
    chosen: Mapping[int, Sequence[Choice]],
    keep: bool,
    each: Callable[[], object],
) -> Iterator[Pair]:
    for row in rows:
        if row not in catalogue.broken:
            pair = catalogue.reader.read(row)
            negatives = tuple(catalogue.stored(choice.item) for choice in chosen.get(row, ()))
            kept = pair.hard_negatives if keep else ()
            yield replace(pair, key=catalogue.entries[row].key, hard_negatives=(*kept, *negatives))
        each()


def write_trace(file: Path, catalogue: Catalogue, chosen: Mapping[int, Sequence[Choice]]) -> None:
    """Write a line of JSON for each pair that got negatives: where each comes from, and its scores."""
    with file.open("w", encoding="utf-8") as stream:
        for row, choices in sorted(chosen.items()):
            if not choices:
                continue
            negatives = [
                {
                    **{"from": catalogue.name(one.item), "field": catalogue.places[one.item].field},
                    **{"modes": one.modes, "rank": one.rank, "score": round(one.score, 6)},
                    "lowest_right_answer": round(one.lowest, 6),
                }
                for one in choices
            ]
            line = {"pair": catalogue.entries[row].name, "negatives": negatives}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
