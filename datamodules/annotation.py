"""Which pairs count as annotated. In practice few pairs have a rewrite; a demo with rewrites everywhere can
hide most of them, so that the stages learn from few and reinforcement learning has something to win.

Used by datamodules/rime.py and loading.py.
"""

from __future__ import annotations

from dataclasses import replace

from rime_pl.types import Pair, content_hash


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
