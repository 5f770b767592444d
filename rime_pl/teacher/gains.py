"""The measured gain: does a rewrite raise the similarity of its pair? Needs a model, as a function.

The command gives that function, because this package knows no model. writing.py takes the pairs from here.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rime_pl.errors import DataError
from rime_pl.media import open_picture
from rime_pl.teacher.jobs import Jobs, sides_of, with_rewrite
from rime_pl.teacher.request import file_of
from rime_pl.types import Item, Pair, Side, frames_of, with_frames

#: Queries with their targets, pictures decoded -> the cosine of each; NaN where it cannot be measured. An
#: item with a rewrite is embedded with it, and one without (None) as it is.
Similarity = Callable[[Sequence[tuple[Item, Item]]], Sequence[float]]
_CHUNK = 32  # pairs that are measured together


@dataclass
class Gains:
    """The last filter, and the pairs as they are written.

    Args:
        jobs: After all was asked.
        similarity: Of pairs under a checkpoint; None measures nothing.
        min_gain: Smallest gain of a rewrite, in cosine.
        drop: Whether rewrites with a smaller one are dropped; otherwise they are only counted.
    """

    jobs: Jobs
    similarity: Similarity | None = None
    min_gain: float = 0.0
    drop: bool = True
    found: dict[tuple[int, Side], float] = field(default_factory=dict)  # side -> its gain, or NaN

    def pairs(self, numbers: Iterable[int]) -> Iterator[Pair | None]:
        """Yield the pairs with their new rewrites, in order; None for one that cannot be read."""
        every = iter(numbers)
        while chunk := list(itertools.islice(every, _CHUNK)):
            pairs = {n: self.jobs.source.read(n) for n in chunk if n not in self.jobs.broken}
            if self.similarity is not None:
                self._measure(pairs, self.similarity)
            for number in chunk:
                yield self._finished(number, pairs[number]) if number in pairs else None

    def outcome(self, number: int, side: Side) -> tuple[str, str]:
        """Return what has become of a side, the gain included; see ``Jobs.outcome``."""
        if self._is_dropped(number, side):
            says = f"gain {self.found[number, side]:+.4f}, at least {self.min_gain:g} (--gain.min_gain)"
            return "dropped: gain", f"{says}: {self.jobs.rewrite(number, side)!r:.90}"
        return self.jobs.outcome(number, side)

    def counts(self) -> dict[Side, Counter[str]]:
        """Return how many sides have come to which end."""
        counts: dict[Side, Counter[str]] = {side: Counter() for side in self.jobs.order.sides}
        for number, side in (*self.jobs.left, *self.jobs.keys):
            counts[side][self.outcome(number, side)[0]] += 1
        return counts

    def _finished(self, number: int, pair: Pair) -> Pair:
        new = {side: self._written(number, side, item) for side, item in sides_of(pair)}
        return replace(pair, query=new.get("query"), target=new["target"])

    def _written(self, number: int, side: Side, item: Item) -> Item:
        rewrite = self.jobs.rewrite(number, side)
        if rewrite is None or self._is_dropped(number, side):
            # with --again the old rewrite goes, too: it would pass for one that was judged
            return replace(item, rewrite=None) if (number, side) in self.jobs.keys else item
        return with_rewrite(item, rewrite)

    def _is_dropped(self, number: int, side: Side) -> bool:
        return self.drop and self.found.get((number, side), math.inf) < self.min_gain  # NaN is never smaller

    def _measure(self, pairs: dict[int, Pair], similarity: Similarity) -> None:
        asked: list[tuple[Item, Item]] = []
        places: list[tuple[int, Side, int]] = []  # where in ``asked`` the pair without a rewrite is
        for number, pair in pairs.items():
            new = {side: text for side, _ in sides_of(pair) if (text := self.jobs.rewrite(number, side))}
            if pair.query is None or not new:
                continue
            try:
                query, target = decoded(pair.query), decoded(pair.target)
            except DataError:
                self.found.update({(number, side): math.nan for side in new})
                continue
            plain = len(asked)
            asked.append((query, target))
            for side, text in new.items():
                changed = {"query": query, "target": target}
                changed[side] = replace(changed[side], rewrite=text)
                places.append((number, side, plain))
                asked.append((changed["query"], changed["target"]))
        if not asked:
            return
        cosines = similarity(asked)
        place_of = (n for n, (query, target) in enumerate(asked) if query.rewrite or target.rewrite)
        for (number, side, plain), with_one in zip(places, place_of, strict=True):
            self.found[number, side] = cosines[with_one] - cosines[plain]


def decoded(item: Item) -> Item:
    """Return an item without a rewrite and with decoded pictures; the stored ones stay undecoded."""
    media = tuple(
        with_frames(medium, [open_picture(file_of(frame), "a picture") for frame in frames_of(medium)])
        for medium in item.media
    )
    return replace(item, media=media, rewrite=None)
