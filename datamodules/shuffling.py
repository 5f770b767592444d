"""Shuffles samples without a list of them: shards first, then samples in a window.

batch_plan.py uses it. Every order follows from numbers alone: random keys of a bit generator, whose stream
NumPy never changes, are sorted. So any part of an order can be computed without the parts before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rime_pl.datamodules.samples import Samples
from rime_pl.types import content_hash

_SWAPS = 8  # how many other batches are tried for a sample whose content is in its batch already


def random_keys(count: int | np.integer, *words: int | str) -> NDArray[np.uint64]:
    """Return random 64-bit numbers that depend on the words only."""
    numbers = [content_hash(word) % 2**64 if isinstance(word, str) else word % 2**64 for word in words]
    return np.random.PCG64(np.random.SeedSequence(numbers)).random_raw(int(count))


def anchors(entries: Samples, most: int, seed: int) -> list[list[int]]:
    """Return up to ``most`` random samples of each task, by name, with distinct target contents."""
    codes = entries.task_codes()
    chosen = []
    for code in np.unique(codes).tolist():
        rows = np.flatnonzero(codes == code)
        rows = rows[np.argsort(random_keys(len(rows), "anchors", seed, code), kind="stable")]
        distinct = np.sort(np.unique(entries.column("target_content", rows), return_index=True)[1])
        chosen.append(rows[distinct[:most]].tolist())
    return chosen


class Pool:
    """Samples that are drawn from together, in endless turns: each turn holds every sample once.

    Args:
        rows: Numbers of the samples, in ascending order, so that those of a tar lie together.
        shards: Number of the tar of each of these samples.
    """

    def __init__(self, rows: NDArray[np.uint32], shards: NDArray[np.uint32]) -> None:
        self.rows = rows
        edges = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        self._starts = np.concatenate([[0], edges]) if len(rows) else np.empty(0, np.int64)
        self._sizes = np.diff(np.append(self._starts, len(rows)))
        self._shards = shards[self._starts]
        self._turns: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def drawn(self, begin: int, end: int, *seed: int) -> NDArray[np.uint32]:
        """Return samples ``begin`` to ``end`` of the endless order, tar by tar; ``arranged`` shuffles."""
        parts = []
        while begin < end:
            turn, start = divmod(begin, len(self))
            stop = min(len(self), start + end - begin)
            parts.append(self._part(start, stop, (*seed, turn)))
            begin += stop - start
        return np.concatenate(parts) if parts else self.rows[:0]

    def _part(self, start: int, stop: int, seed: tuple[int, ...]) -> NDArray[np.uint32]:
        order, ends = self._turn(seed)
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left")
        parts = []
        for place in range(first, last + 1):
            segment, before = order[place], ends[place] - self._sizes[order[place]]
            begin, size = self._starts[segment], self._sizes[segment]
            low, high = max(start - before, 0), min(stop - before, size)
            rows = self.rows[begin : begin + size]
            # shuffled in the tar, too, or what does not come in a pass would always be the end of a tar
            keys = random_keys(size, *seed, int(self._shards[segment]), "in the tar")
            parts.append(rows[np.argsort(keys, kind="stable")[low:high]])
        return np.concatenate(parts)

    def _turn(self, seed: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the order of the tars of a turn, and how many samples have come at the end of each."""
        if seed not in self._turns:
            if len(self._turns) > 1:  # a batch may need the end of one turn and the start of the next
                del self._turns[next(iter(self._turns))]
            # one key for each tar of the split: pools that share tars come to them at the same time
            keys = random_keys(int(self._shards.max()) + 1, *seed)[self._shards]
            order = np.argsort(keys, kind="stable")
            self._turns[seed] = order, np.cumsum(self._sizes[order])
        return self._turns[seed]

    def following(self, row: int) -> NDArray[np.uint32] | None:
        """Return the other samples from the one after ``row`` on; None if ``row`` is not of this pool."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self) or self.rows[place] != row:
            return None
        return np.concatenate([self.rows[place + 1 :], self.rows[:place]])


def arranged(
    pools: Sequence[NDArray[np.uint32]],
    contents: Sequence[NDArray[np.int64]],
    num_batches: int,
    *seed: int | str,
) -> NDArray[np.uint32]:
    """Return the samples of a window in random batches: each batch takes equally many of each pool.

    A batch holds no content twice, as long as the window has enough contents: the samples of one content are
    dealt to one batch after the other. The batches are shuffled then, or neighbours would share most of their
    contents.

    Args:
        pools: Samples of the window, from each pool; their numbers are multiples of ``num_batches``.
        contents: Content of each of these samples.
        num_batches: Number of batches.
        seed: What the order depends on.

    Returns:
        (num_batches, samples of a batch), the samples of the first pool first.
    """
    batches, known = [], []
    for number, (rows, content) in enumerate(zip(pools, contents, strict=True)):
        groups, of_group = np.unique(content, return_inverse=True)
        keys = random_keys(len(groups) + len(rows), *seed, number)
        order = np.lexsort((keys[len(groups) :], keys[: len(groups)][of_group]))
        batches.append(rows[order].reshape(-1, num_batches).T)
        known.append(content[order].reshape(-1, num_batches).T)
    if len(pools) == 2:
        _separate(known[0], known[1], batches[1])
    shuffled = np.argsort(random_keys(num_batches, *seed, "batches"), kind="stable")
    return np.concatenate(batches, axis=1)[shuffled]


def _separate(fixed: NDArray[np.int64], contents: NDArray[np.int64], rows: NDArray[np.uint32]) -> None:
    """Swap samples of the second pool between batches whose contents the first pool has in the same batch."""
    num_batches = len(rows)
    for batch in range(num_batches):
        for place in np.flatnonzero(np.isin(contents[batch], fixed[batch])).tolist():
            _swap(fixed, contents, rows, batch, place)


def _swap(
    fixed: NDArray[np.int64], contents: NDArray[np.int64], rows: NDArray[np.uint32], batch: int, place: int
) -> None:
    mine = np.concatenate([fixed[batch], contents[batch]])
    for step in range(1, min(_SWAPS + 1, len(rows))):
        other = (batch + step) % len(rows)
        if contents[batch, place] in fixed[other] or contents[batch, place] in contents[other]:
            continue
        fitting = np.flatnonzero(~np.isin(contents[other], mine))
        if len(fitting):
            here, there = (batch, place), (other, int(fitting[0]))
            for values in (contents, rows):
                values[here], values[there] = values[there], values[here].copy()
            return
