"""Global batches of the steps on two processes, and the part of each rank.

Used by steps.py, rl_steps.py and tower_steps.py beside it, and by their tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rime_pl.datamodules.ranks import rank_slice
from rime_pl.modules.base import RimeModule
from rime_pl.scaling.gather import rank, world_size
from rime_pl.types import Batch, Pair
from tests.micro import mixed, read_pairs


def global_batch(corpus: Path) -> list[Pair]:
    """8 pairs: texts and pictures, duplicates on different ranks, rewrites missing on one rank only."""
    pairs = mixed(read_pairs(corpus, "train"), 8)
    pairs[6] = replace(pairs[6], target=replace(pairs[6].target, content_id=pairs[1].target.content_id))
    for row in (4, 5, 7):
        pairs[row] = replace(pairs[row], target=replace(pairs[row].target, rewrite=None))
    return pairs


def apart(pairs: list[Pair]) -> list[Pair]:
    """The same pairs, ordered so that one rank has queries with only text and the other with pictures."""
    return [*pairs[::2], *pairs[1::2]]


def local_batch(module: RimeModule, pairs: list[Pair], further: bool = False) -> Batch:
    """The part of this rank, selected and tokenised like in the data module."""
    mine = rank_slice(range(len(pairs)), rank(), world_size())
    return module.model.processor.training_batch([pairs[n] for n in mine], further=further)


def with_further(pairs: list[Pair], rows: Sequence[int]) -> list[Pair]:
    """The pairs at some rows with hard negatives and further positives: an uneven number on each rank."""
    found = list(pairs)
    for number, row in enumerate(rows):
        others = [
            replace(pairs[(row + 1 + n) % len(pairs)].target, content_id=f"further {n}") for n in range(3)
        ]
        negatives = (others[0], replace(others[1], rewrite=None), pairs[row].target)[: 1 + number]
        found[row] = replace(pairs[row], hard_negatives=negatives, positives=(others[2],) * (number % 2))
    return found


def of_one_task(corpus: Path) -> list[Pair]:
    return [replace(pair, dataset="one") for pair in global_batch(corpus)]
