"""Which samples of a split an evaluation reads: its gallery, and a fair choice of its queries.

Used by datamodule.py beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from rime_pl.datamodules.shards import Entry


def gallery_of(entries: Iterable[Entry]) -> list[int]:
    """Return the index of the first sample of each distinct target in each gallery."""
    distinct: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(entries):
        distinct.setdefault((entry.gallery, entry.target_content), index)
    return list(distinct.values())


def sample_per_task(entries: list[Entry], limit: int | None, seed: int) -> list[int]:
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
