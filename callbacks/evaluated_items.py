"""What is kept of each evaluated item next to its embeddings, and what is counted over all of them.

Used by retrieval_recall.py beside it, which ranks the embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from rime_pl.metrics.derangement import derange
from rime_pl.metrics.modes import Results
from rime_pl.metrics.retrieval import RankTable
from rime_pl.metrics.words import slot_scores
from rime_pl.types import EvalBatch, Evaluation, Item, Side, Written


@dataclass
class Rewrite:
    """The rewrite that the model wrote for one item."""

    text: str
    length: int  # generated tokens
    well_formed: bool
    slots: tuple[float, float] | None  # recall and F1 of words against the reference rewrite, if there is one
    tokens: list[int]  # with <gen_emb> and end of turn; only for queries


@dataclass
class Record:
    """The facts about one evaluated item that are kept next to its embeddings."""

    key: str
    task: str
    distractor: bool
    content: int  # of the right target
    kinds: str  # what the item consists of
    gallery: str  # of a query: where it searches; of a target: where it is found
    rewrite: Rewrite | None  # None: not evaluated in the generative mode


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


def evaluation_of(trainer: pl.Trainer, split: str) -> Evaluation:
    """Return how a split is evaluated: as the data module says, in both modes without one."""
    data: Any = getattr(trainer, "datamodule", None)  # None: loaders were handed over instead
    evaluation: Evaluation = Evaluation() if data is None else data.evaluation(split)
    return evaluation


def annotated(item: Item) -> bool:
    """Return whether an item has a reference rewrite."""
    return bool((item.rewrite or "").strip())


def rewrites_of(batch: EvalBatch, written: Written) -> list[Rewrite]:
    """Return what the model wrote for each item of a batch."""
    rows = zip(written.completions.ids, written.completions.mask, strict=True)
    tokens = [ids[mask.bool()].tolist() if batch.side == "query" else [] for ids, mask in rows]
    slots = [
        slot_scores(rewrite, item.rewrite or "") if annotated(item) else None
        for rewrite, item in zip(written.rewrites, batch.items, strict=True)
    ]
    columns = (written.rewrites, written.lengths.tolist(), written.well_formed.tolist(), slots, tokens)
    return [Rewrite(*row) for row in zip(*columns, strict=True)]


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


def modality(task: str, records: Mapping[Side, Mapping[int, Record]]) -> dict[Side, str]:
    """Return what the queries of a task and their right targets consist of, such as "clip + text"."""
    queries = [record for record in records["query"].values() if record.task == task]
    wanted = {(record.content, record.gallery) for record in queries}
    targets = [one for one in records["target"].values() if (one.content, one.gallery) in wanted]
    named = {"query": queries, "target": targets}
    return {side: " or ".join(sorted({one.kinds for one in named[side]})) for side in records}


def costs(seen: Seen, memory: Collection[str]) -> Results:
    """Return length and form of the rewrites over distinct items, and milliseconds per embedding."""
    milliseconds = {mode: 1000 * seconds / seen.rows for mode, seconds in sorted(seen.seconds.items())}
    records = [*seen.records["query"].values(), *seen.records["target"].values()]
    rewrites = [record.rewrite for record in records if record.rewrite]
    if not rewrites:
        return {"milliseconds": milliseconds}
    asked = [record for record in seen.records["query"].values() if record.task not in memory]
    slots = [record.rewrite.slots for record in asked if record.rewrite and record.rewrite.slots]
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
            "mean_length": sum(rewrite.length for rewrite in rewrites) / len(rewrites),
            "well_formed": sum(rewrite.well_formed for rewrite in rewrites) / len(rewrites),
        },
        "milliseconds": milliseconds,
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
        row: dict[str, Any] = {"key": record.key, "task": record.task, "target": record.content}
        if record.rewrite:
            row["rewrite"] = record.rewrite.text
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
