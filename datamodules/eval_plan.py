"""What an evaluation measures, and which samples it reads: its gallery, and a fair choice of its queries.

Used by datamodule.py beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.ranks import rank_batches
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import DISTRACTORS
from rime_pl.datamodules.split_index import HAS_QUERY, Entry
from rime_pl.errors import RimeError
from rime_pl.types import Side, content_hash


def check_modes(name: str, modes: Sequence[str] | None) -> None:
    """Raise a RimeError unless ``data.<name>`` is null or holds the discriminative mode."""
    if modes is not None and "discriminative" not in modes:
        raise RimeError(
            f"data.{name} must be null, for both modes, or hold discriminative, which costs nothing next to "
            f"the generative mode, but is {list(modes)}."
        )


@dataclass(frozen=True)
class EvalPlan:
    """The samples that one evaluation reads."""

    entries: Samples
    queries: list[int]  # numbers of entries
    gallery: list[int]
    left_out: int = 0  # gallery items that a limit leaves out

    def kinds(self, side: Side) -> list[list[int]]:
        """Return the numbers of each task (queries) or gallery, by name."""
        kinds: dict[str, list[int]] = {}
        for number in self.queries if side == "query" else self.gallery:
            entry = self.entries[number]
            kinds.setdefault(entry.dataset if side == "query" else entry.gallery, []).append(number)
        return [kinds[name] for name in sorted(kinds)]

    def batches(self, side: Side, size: int, rank: int, world_size: int) -> list[list[int]]:
        """Return the batches of one process: each of one kind, so only pictures or only texts."""
        return [one for kind in self.kinds(side) for one in rank_batches(kind, size, rank, world_size)]


def val_plan(
    corpora: Corpora,
    tasks: Sequence[str] | None,
    limit_queries: int | None,
    limit_gallery: int | None,
    seed: int,
) -> EvalPlan:
    """Plan a validation; the arguments are those of the data module."""
    entries = corpora.split("val", tasks)
    queries = sample_per_task(entries, limit_queries, seed)
    whole = gallery_of(entries)
    gallery = whole if limit_gallery is None else limited_gallery(entries, queries, whole, limit_gallery)
    return EvalPlan(entries, queries, gallery, len(whole) - len(gallery))


def limited_gallery(
    entries: Sequence[Entry], queries: Sequence[int], whole: Sequence[int], limit: int
) -> list[int]:
    """Return the right answers of the queries and, in each gallery, up to ``limit`` other items.

    The others are those with the lowest hashes of their content ids: a fair choice, which depends on neither
    the seed nor the order of the shards.
    """
    right = {(entries[number].gallery, entries[number].target_content) for number in queries}
    others: dict[str, list[int]] = {}
    for number in whole:
        if (entries[number].gallery, entries[number].target_content) not in right:
            others.setdefault(entries[number].gallery, []).append(number)
    dropped: set[int] = set()
    for numbers in others.values():
        dropped.update(sorted(numbers, key=lambda n: content_hash(entries[n].target_content))[limit:])
    return [number for number in whole if number not in dropped]


def test_plan(
    corpora: Corpora, tasks: Sequence[str] | None, memory_splits: Sequence[str], distractors: bool
) -> EvalPlan:
    """Plan a test: of all queries of the test split and of the memory splits."""
    entries = corpora.split("test", tasks)
    for split in memory_splits:
        entries = entries + corpora.split(split)
    queries = np.flatnonzero(entries.column("flags") & HAS_QUERY).tolist()
    if distractors and DISTRACTORS in corpora.splits:
        galleries = {entry.gallery for entry in entries}
        others = corpora.split(DISTRACTORS)
        wanted = [entry.gallery in galleries for entry in others]
        entries = entries + others.select(np.flatnonzero(wanted))
    return EvalPlan(entries, queries, gallery_of(entries))


def query_tasks(corpora: Corpora, split: str, tasks: Sequence[str] | None, limit: int | None) -> set[str]:
    """Return the tasks that a split has queries of; none if the corpus lacks the split.

    Raises:
        RimeError: If a limit of the queries leaves none of a task.
    """
    if split not in corpora.splits:
        return set()
    entries = corpora.split(split, tasks)
    asked = np.unique(entries.task_codes()[(entries.column("flags") & HAS_QUERY) > 0])
    if (limit or len(asked)) < len(asked):
        raise RimeError(
            f"data.limit_val_queries must be at least {len(asked)}, a query of each task, because "
            f"recall.headline_tasks names tasks, but is {limit}."
        )
    return {entries.tasks[code] for code in asked.tolist()}


def gallery_of(entries: Iterable[Entry]) -> list[int]:
    """Return the index of the first sample of each distinct target in each gallery."""
    distinct: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(entries):
        distinct.setdefault((entry.gallery, entry.target_content), index)
    return list(distinct.values())


def sample_per_task(entries: Sequence[Entry], limit: int | None, seed: int) -> list[int]:
    """Return the indices of ``limit`` queries, as evenly from the tasks as their sizes allow."""
    everything = range(len(entries))
    if limit is None or limit >= len(entries):
        return list(everything)
    waiting: dict[str, list[int]] = {}
    for index in random.Random(f"val {seed}").sample(everything, len(entries)):
        waiting.setdefault(entries[index].dataset, []).append(index)
    chosen: list[int] = []
    while len(chosen) < limit:
        for task in sorted(waiting):
            if waiting[task] and len(chosen) < limit:
                chosen.append(waiting[task].pop())
    return sorted(chosen)
