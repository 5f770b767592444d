"""What is kept of each evaluated item next to its embeddings, and what is counted over all of them.

Used by retrieval_recall.py beside it, which ranks the embeddings.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from rime_pl.metrics.derangement import derange
from rime_pl.metrics.modes import Results
from rime_pl.metrics.retrieval import RankTable
from rime_pl.types import Item, Side


@dataclass
class Record:
    """The facts about one evaluated item that are kept next to its embeddings."""

    key: str
    task: str
    distractor: bool
    rewrite: str
    length: int  # generated tokens
    well_formed: bool
    slots: tuple[float, float] | None  # recall and F1 of words against the reference rewrite, if there is one
    content: int  # of the right target
    tokens: list[int]  # of the generated rewrite, with <gen_emb> and end of turn; only for queries


@dataclass
class Seen:
    """The items that one process evaluated; after ``gather_objects``, those of all processes."""

    #: side -> item id -> record; an item that a process repeats is kept once
    records: dict[Side, dict[int, Record]]
    seconds: dict[str, float]  # mode -> wall seconds
    rows: int = 0  # embedded items, repeats counted


def together(parts: list[Seen]) -> Seen:
    """Return the items of all processes as one."""
    whole = Seen({"query": {}, "target": {}}, {})
    for part in parts:
        for side, records in part.records.items():
            whole.records[side].update(records)
        whole.rows += part.rows
        for mode, seconds in part.seconds.items():
            whole.seconds[mode] = whole.seconds.get(mode, 0.0) + seconds
    return whole


def annotated(item: Item) -> bool:
    """Return whether an item has a reference rewrite."""
    return bool((item.rewrite or "").strip())


def partners_of(queries: dict[int, Record]) -> dict[int, int]:
    """Return for each query the query whose rewrite it gets: of its task, with other content."""
    tasks: dict[str, list[int]] = {}
    for item in sorted(queries):  # item ids are hashes, so this order mixes the queries of a task
        tasks.setdefault(queries[item].task, []).append(item)
    found = {}
    for items in tasks.values():
        others = derange(torch.tensor([queries[item].content for item in items]))
        found.update({item: items[other] for item, other in zip(items, others.tolist(), strict=True)})
    return {item: other for item, other in found.items() if item != other}


def costs(seen: Seen, memory: Collection[str]) -> Results:
    """Return length and form of the rewrites over distinct items, and milliseconds per embedding."""
    records = [*seen.records["query"].values(), *seen.records["target"].values()]
    asked = [record for record in seen.records["query"].values() if record.task not in memory]
    slots = [record.slots for record in asked if record.slots]
    named = (
        {
            "slot_recall": sum(recall for recall, _ in slots) / len(slots),
            "slot_f1": sum(f1 for _, f1 in slots) / len(slots),
        }
        if slots
        else {}
    )
    return {
        "rewrite": {
            **named,
            "mean_length": sum(record.length for record in records) / len(records),
            "well_formed": sum(record.well_formed for record in records) / len(records),
        },
        "milliseconds": {mode: 1000 * seconds / seen.rows for mode, seconds in sorted(seen.seconds.items())},
    }


def rank_rows(
    table: RankTable,
    everything: RankTable | None,
    crossed: RankTable | None,
    queries: dict[int, Record],
) -> list[dict[str, Any]]:
    """Return one row for each query of ``ranks.json``."""
    rows = []
    for place, item in enumerate(table.item_ids.tolist()):
        record = queries[item]
        row: dict[str, Any] = {"key": record.key, "task": record.task, "rewrite": record.rewrite}
        row["gallery"] = int(table.gallery_sizes[place])
        # 0 is "not measured", in JSON null
        row["ranks"] = {pair: int(ranks[place]) or None for pair, ranks in table.ranks.items()}
        if crossed is not None:  # the same queries in the same order
            row["ranks"] |= {f"crossed/{name}": int(ranks[place]) for name, ranks in crossed.ranks.items()}
        if everything is not None:
            ranks_all = {pair: int(ranks[place]) or None for pair, ranks in everything.ranks.items()}
            row["ranks_all_gallery"] = ranks_all
        rows.append(row)
    return rows
