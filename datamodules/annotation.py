"""Decides which training pairs count as annotated, and what the model learns to write for them.

In practice few pairs have a rewrite. A corpus that has them all can hide most of them, so that a demo shows
that case too. Called by training_pairs.py (the share) and shards.py (the pairs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rime_pl.errors import DataError
from rime_pl.types import Item, Pair, content_hash

#: What the model learns to write before the generative embedding: the rewrite; the chain of thought (CoT) and
#: then the rewrite; or filler tokens, one full stop for each word of the rewrite. The filler is a control: it
#: gives the model the same time to compute, but says nothing.
CompletionKind = Literal["rewrite", "cot", "filler"]
#: Distance of the numbers that two seeds add, from SplitMix64.
_STEP = np.uint64(0x9E3779B97F4A7C15)


def is_annotated(name: str, share: float, seed: int | None = None) -> bool:
    """Return whether a pair keeps its rewrites; stages and processes give the same answer.

    With one seed, every pair that is annotated at a smaller share is also annotated at a larger one.

    Args:
        name: Unique name of the pair in its corpus.
        share: Share of all pairs that keep their rewrites, 0 to 1.
        seed: Each seed chooses other pairs; None and 0 are one choice.

    Example:
        >>> sum(is_annotated(f"pair {n}", 0.1) for n in range(1000))
        93
        >>> is_annotated("any", 1.0), is_annotated("any", 0.0)
        (True, False)
    """
    draws = np.array([content_hash(f"annotated {name}")], np.int64)
    return bool(are_annotated(draws, share, seed)[0])


def are_annotated(draws: NDArray[np.int64], share: float, seed: int | None = None) -> NDArray[np.bool_]:
    """Return ``is_annotated`` of pairs from the column "draw" of their index."""
    if seed:
        draws = _mixed(draws.astype(np.uint64) + np.uint64(seed % 2**64) * _STEP).view(np.int64)
    return draws / 2**64 + 0.5 < share


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers that look random, each from its own: the choices of two seeds are independent.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def without_rewrites(pair: Pair) -> Pair:
    """Return the pair as it was before annotation: without rewrites and chains of thought."""
    query = None if pair.query is None else replace(pair.query, rewrite=None, cot=None)
    return replace(pair, query=query, target=replace(pair.target, rewrite=None, cot=None))


def with_completion(pair: Pair, kind: CompletionKind) -> Pair:
    """Return the pair with its rewrites replaced by ``kind``; a target without a CoT keeps its rewrite.

    Raises:
        DataError: If ``kind`` is ``cot`` and the query has a rewrite but no chain of thought.

    Example:
        >>> item = Item("?", (), "x", rewrite="A red ring.", cot="Near the star: a red ring. A red ring.")
        >>> with_completion(Pair("k", "task", "all", item, item), "filler").query.rewrite
        '. . .'
        >>> with_completion(Pair("k", "task", "all", item, item), "cot").target.rewrite
        'Near the star: a red ring. A red ring.'
    """
    if kind == "rewrite":
        return pair
    if kind == "cot" and pair.query and pair.query.rewrite and not (pair.query.cot or "").strip():
        raise DataError(
            f"{pair.key}: field 'query.cot' is missing or empty, but data.completion is cot. "
            "Add a chain of thought to the sample, or set data.completion to rewrite."
        )
    query = None if pair.query is None else _with_completion(pair.query, kind)
    return replace(pair, query=query, target=_with_completion(pair.target, kind))


def _with_completion(item: Item, kind: CompletionKind) -> Item:
    if item.rewrite is None:
        return item
    if kind == "filler":
        return replace(item, rewrite=" ".join("." * len(item.rewrite.split())))
    return replace(item, rewrite=item.cot) if (item.cot or "").strip() else item
