"""Which pairs count as annotated, and what is written for them.

In practice few pairs have a rewrite; a demo with rewrites everywhere can hide most of them, so that the
stages learn from few and reinforcement learning has something to win. Used by rime.py, loading.py, shards.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rime_pl.errors import DataError
from rime_pl.types import Item, Pair, content_hash

#: What the model learns to write before it embeds: the rewrite, the steps and then the rewrite, or as many
#: full stops as the rewrite has words (a control: time to compute, and nothing said).
Written = Literal["rewrite", "cot", "pause"]


def is_annotated(name: str, share: float) -> bool:
    """Whether a pair keeps its rewrites: a function of its name alone, equal for every seed and process.

    A smaller share is part of a larger one.

    Args:
        name: Unique name of the pair in its corpus.
        share: Of all pairs, 0 to 1.

    Example:
        >>> sum(is_annotated(f"pair {n}", 0.1) for n in range(1000))
        93
        >>> is_annotated("any", 1.0), is_annotated("any", 0.0)
        (True, False)
    """
    return content_hash(f"annotated {name}") / 2**64 + 0.5 < share


def without_rewrites(pair: Pair) -> Pair:
    """The pair as it is before anybody annotated it."""
    query = None if pair.query is None else replace(pair.query, rewrite=None, cot=None)
    return replace(pair, query=query, target=replace(pair.target, rewrite=None, cot=None))


def with_written(pair: Pair, written: Written) -> Pair:
    """The pair with that in the place of its rewrites; a target without steps keeps its rewrite.

    Raises:
        DataError: If a query has a rewrite but no ``cot``, and that is asked for.

    Example:
        >>> item = Item("?", (), "x", rewrite="A red ring.", cot="Near the star: a red ring. A red ring.")
        >>> with_written(Pair("k", "task", "all", item, item), "pause").query.rewrite
        '. . .'
        >>> with_written(Pair("k", "task", "all", item, item), "cot").target.rewrite
        'Near the star: a red ring. A red ring.'
    """
    if written == "rewrite":
        return pair
    if written == "cot" and pair.query and pair.query.rewrite and not (pair.query.cot or "").strip():
        raise DataError(f"{pair.key}: field 'query.cot' is missing or empty, but data.written is cot.")
    query = None if pair.query is None else _with_written(pair.query, written)
    return replace(pair, query=query, target=_with_written(pair.target, written))


def _with_written(item: Item, written: Written) -> Item:
    if item.rewrite is None:
        return item
    if written == "pause":
        return replace(item, rewrite=" ".join("." * len(item.rewrite.split())))
    return replace(item, rewrite=item.cot) if (item.cot or "").strip() else item
