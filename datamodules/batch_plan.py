"""Decides which samples form which global batch, from the seed and the position of the batch only.

Called by the data module. The plan does not know processes, workers or epochs of the trainer, so none of them
can change the data, and a resumed run only has to know its position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rime_pl.bounds import at_least
from rime_pl.datamodules.shuffling import Pool, arranged, random_keys
from rime_pl.errors import RimeError

#: What happens to a task that fills no batch.
SmallTasks = Literal["refuse", "repeat", "leave_out"]


@dataclass(frozen=True)
class OrderSettings:
    """How often the training pairs come, and how they are mixed.

    Args:
        weights: How often the pairs of a task come in a pass, by task. Tasks that are not named have the
            weight 1: each pair comes once.
        caps: Largest number of pairs of a task in a pass before its weight, by task; the next pass goes on
            with others.
        block_size: Number of pairs of one task that stand together in a batch, which then mixes tasks
            (VLM2Vec's interleaved blocks); null for one task a batch.
        small_tasks: What happens to a task with fewer pairs than a batch (or block): refuse, repeat (its
            pairs fill one batch a pass) or leave_out.
        window: Number of pairs of a task that are shuffled together, after the shards were shuffled.
    """

    weights: dict[str, float] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)
    block_size: int | None = None
    small_tasks: SmallTasks = "refuse"
    window: int = 16_384

    def check(self, batch_size: int) -> None:
        """Raise a RimeError if a setting is out of bounds."""
        at_least(1, "data.order", self, "block_size", "window")
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise RimeError(
                    f"data.order.weights must be greater than 0, but that of {name!r} is {weight}. To leave "
                    "a task out, name the others in data.tasks."
                )
        for name, cap in self.caps.items():
            if cap < 1:
                raise RimeError(f"data.order.caps must be 1 or more, but that of {name!r} is {cap}.")
        if self.block_size is not None and batch_size % self.block_size:
            raise RimeError(
                f"data.batch_size must be a multiple of data.order.block_size, but {batch_size} is none of "
                f"{self.block_size}."
            )


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: of one task, or of blocks of one task each."""

    position: int  # number of the batch since the start of training
    datasets: list[str]  # the task of each block
    indices: list[int]  # batch_size samples

    @property
    def dataset(self) -> str:
        """The task of the first block."""
        return self.datasets[0]


@dataclass(frozen=True)
class Source:
    """The samples of one task of one corpus, and how often they come."""

    name: str  # the task
    pools: list[Pool]  # all samples, or the annotated ones and the others
    takes: list[int]  # samples that a block takes of each pool
    blocks: int  # in a pass
    waiting: int  # pairs that do not come in a pass

    def __len__(self) -> int:
        return sum(map(len, self.pools))


class BatchPlan:
    """An endless sequence of global batches that can be read at any position.

    One pass holds floor(weight * pairs / block) blocks of each task, in shuffled order; without blocks, a
    block is a batch. The order of a task is its tars, shuffled, and then its pairs, shuffled in windows. A
    block holds no target content twice, as long as the window has enough contents.

    Args:
        names: Name of each source (a task of a corpus).
        codes: (N,) source of each sample, a number in ``names``.
        contents: Function from sample numbers (n,) to the hashes of their target contents (n,).
        batch_size: Number of pairs in a global batch, over all processes.
        seed: Seed of the order; nothing else is random.
        annotated: (N,) whether each sample has both rewrites; None if it does not matter.
        annotated_share: Share of annotated samples in each block; they repeat as often as needed.
            None samples from all pairs alike.
        shards: (N,) number of the tar of each sample, ascending; None for one tar.
        order: Weights, caps and blocks.
        weights: Weight of each source besides that of its task; None for 1.

    Raises:
        RimeError: If a task fills no batch, has too few annotated or unannotated samples, or is not known.

    Example:
        >>> codes, contents = np.array([0, 0, 0, 0, 1, 1]), np.array([7, 8, 9, 10, 8, 9])
        >>> plan = BatchPlan(["a", "b"], codes, contents.__getitem__, batch_size=2, seed=0)
        >>> len(plan), sorted(plan.batch(n).dataset for n in range(3))
        (3, ['a', 'a', 'b'])
    """

    def __init__(
        self,
        names: Sequence[str],
        codes: NDArray[np.integer],
        contents: Callable[[NDArray[np.uint32]], NDArray[np.int64]],
        batch_size: int,
        seed: int,
        annotated: NDArray[np.bool_] | None = None,
        annotated_share: float | None = None,
        shards: NDArray[np.uint32] | None = None,
        order: OrderSettings | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        order = order or OrderSettings()
        if batch_size < 1:
            raise RimeError(f"data.batch_size must be at least 1, but is {batch_size}.")
        order.check(batch_size)
        self.batch_size, self.seed, self.order, self.annotated = batch_size, seed, order, annotated
        self.block = order.block_size or batch_size
        self._contents = contents
        by_source = np.argsort(codes, kind="stable").astype(np.uint32)
        edges = np.searchsorted(codes, np.arange(len(names) + 1), sorter=by_source)
        known = {name for name, size in zip(names, np.diff(edges), strict=True) if size}
        for setting in ("weights", "caps"):
            if unknown := sorted(set(getattr(order, setting)) - known):
                raise RimeError(
                    f"data.order.{setting} must name tasks of the training data, but {unknown} are not "
                    f"there. It has {sorted(known)}."
                )
        self.sources: list[Source] = []
        for number, name in enumerate(names):
            rows = by_source[edges[number] : edges[number + 1]]
            weight = order.weights.get(name, 1.0) * (1.0 if weights is None else weights[number])
            if len(rows):
                self.sources.append(self._source(name, rows, shards, weight, annotated_share))
        self.left_out = Counter[str]()
        for source in self.sources:
            self.left_out[source.name] += 0 if source.blocks else len(source)
        self.sources = [source for source in self.sources if source.blocks]
        if not len(self):
            raise RimeError(
                f"A pass must fill a batch of {batch_size} (data.batch_size), but the data fills none. "
                "Use a smaller batch, or set data.order.small_tasks to repeat."
            )
        self._labels: dict[int, tuple[NDArray[np.uint16], NDArray[np.uint32]]] = {}
        self._windows: dict[tuple[int, int, int], NDArray[np.uint32]] = {}

    def _source(
        self,
        name: str,
        rows: NDArray[np.uint32],
        shards: NDArray[np.uint32] | None,
        weight: float,
        annotated_share: float | None,
    ) -> Source:
        capped = min(len(rows), self.order.caps.get(name, len(rows)))
        blocks = int(weight * capped + 1e-6) // self.block
        if not blocks and self.order.small_tasks == "refuse":
            raise RimeError(self._too_small(name, len(rows), weight * capped))
        if not blocks and self.order.small_tasks == "repeat":
            blocks = 1
        of_pool, takes = [rows], [self.block]
        if self.annotated is not None and annotated_share is not None:
            known = self.annotated[rows]
            first = round(annotated_share * self.block)
            of_pool, takes = [rows[known], rows[~known]], [first, self.block - first]
            few = self.order.small_tasks == "repeat" and min(map(len, of_pool)) > 0 and first >= 2
            if blocks and not few:
                _refuse_small_pools(name, len(of_pool[0]), len(of_pool[1]), self.block, first)
        tars = np.zeros(1, np.uint32) if shards is None else shards
        pools = [Pool(part, tars[part if shards is not None else np.zeros_like(part)]) for part in of_pool]
        return Source(name, pools, takes, blocks, max(0, capped - blocks * self.block))

    def _too_small(self, name: str, size: int, coming: float) -> str:
        setting = "data.batch_size" if self.order.block_size is None else "data.order.block_size"
        what = "a batch" if self.order.block_size is None else "a block"
        has = f"only {size} training samples"
        if int(coming) < size:
            has = f"with its weight and cap only {int(coming)} of {size} training samples in a pass"
        return (
            f"{setting} must be at most {int(coming)}, but is {self.block}: {what} holds one task, and task "
            f"{name!r} has {has}. Use a smaller batch, list the other tasks in data.tasks, or set "
            "data.order.small_tasks to repeat or leave_out."
        )

    def __len__(self) -> int:
        """Return the number of batches in one pass over the data."""
        return sum(source.blocks for source in self.sources) * self.block // self.batch_size

    def batch(self, position: int) -> PlannedBatch:
        """Return the global batch at ``position``, counted from the start of training."""
        number, offset = divmod(position, len(self))
        labels, turns = self._pass(number)
        blocks = self.batch_size // self.block
        names, indices = [], []
        for place in range(offset * blocks, (offset + 1) * blocks):
            source = int(labels[place])
            names.append(self.sources[source].name)
            indices += self._block(number, source, int(turns[place])).tolist()
        return PlannedBatch(position, names, indices)

    def _pass(self, number: int) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
        """Return the source of each block of a pass, and how many blocks of this source come before it."""
        if number not in self._labels:
            # Two passes are kept, because another worker may still read the end of the previous one.
            self._labels = {k: v for k, v in self._labels.items() if k == number - 1}
            counts = [source.blocks for source in self.sources]
            labels = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
            labels = labels[np.argsort(random_keys(len(labels), self.seed, number, "blocks"), kind="stable")]
            turns = np.empty(len(labels), np.uint32)
            turns[np.argsort(labels, kind="stable")] = np.concatenate([np.arange(n) for n in counts])
            self._labels[number] = labels, turns
        return self._labels[number]

    def _block(self, number: int, source: int, turn: int) -> NDArray[np.uint32]:
        per_window = max(1, self.order.window // self.block)
        window, place = divmod(turn, per_window)
        key = (number, source, window)
        if key not in self._windows:
            while len(self._windows) > 2 * len(self.sources):  # the one made first goes first
                del self._windows[next(iter(self._windows))]
            last = min((window + 1) * per_window, self.sources[source].blocks)
            self._windows[key] = self._window(number, self.sources[source], window * per_window, last)
        return self._windows[key][place]

    def _window(self, number: int, source: Source, first: int, last: int) -> NDArray[np.uint32]:
        """Return blocks ``first`` to ``last`` of a source in a pass."""
        rows = []
        for pool, take in zip(source.pools, source.takes, strict=True):
            size = take * source.blocks  # in a pass
            if not size:
                rows.append(pool.rows[:0])
                continue
            # few pairs a pass: the next passes go on in the same shuffled order until it ends
            cycle, turn = divmod(number, max(1, len(pool) // size))
            begin = turn * size + take * first
            rows.append(pool.drawn(begin, begin + take * (last - first), self.seed, cycle))
        contents = [self._contents(part) for part in rows]
        return arranged(rows, contents, last - first, self.seed, number, source.name, first)

    def following(self, index: int) -> NDArray[np.uint32]:
        """Return the samples of the same source that have, or lack, rewrites alike; the next ones first."""
        for source in self.sources:
            for pool in source.pools:
                if (others := pool.following(index)) is not None:
                    return others
        raise ValueError(index)

    def passed(self, source: Source, most: int) -> list[int]:
        """Return about ``most`` samples of a source, from the start of the first pass."""
        blocks = min(source.blocks, max(-(-most // self.block), self.order.window // self.block, 1))
        return [int(row) for row in self._window(0, source, 0, blocks).ravel()]

    def report(self) -> str:
        """Return which pairs do not come in a pass, "" if all do.

        Example:
            >>> codes = np.array([0] * 5 + [1] * 2)
            >>> BatchPlan(["a", "b"], codes, lambda rows: rows, batch_size=2, seed=0).report()
            '3 batches a pass; 1 pair waits for another pass (a: 1)'
        """
        words = f"{len(self)} batches a pass"
        waiting = Counter[str]()  # two corpora may have a task of one name
        for source in self.sources:
            waiting[source.name] += source.waiting
        if total := waiting.total():
            which = ", ".join(f"{name}: {count}" for name, count in sorted(waiting.items()) if count)
            words += f"; {total} {'pair waits' if total == 1 else 'pairs wait'} for another pass ({which})"
        if rest := sum(source.blocks for source in self.sources) % (self.batch_size // self.block):
            words += f"; {rest} blocks of {self.block} pairs fill no batch in a pass"
        if self.left_out.total():
            which = ", ".join(f"{name}: {count}" for name, count in sorted(self.left_out.items()) if count)
            words += f"; tasks smaller than a batch are left out ({which})"
        return words


def _refuse_small_pools(dataset: str, known: int, others: int, batch_size: int, num_annotated: int) -> None:
    """Raise a RimeError if a task cannot fill batches with ``num_annotated`` annotated pairs and others."""
    fewest, most = max(2, batch_size - others), min(batch_size, known)
    if fewest <= num_annotated <= most:
        return
    remedies = ["Use a smaller data.batch_size"]
    if fewest <= most:
        fitting = min(max(num_annotated, fewest), most) / batch_size
        remedies.append(f"set data.annotated_batch_share to {fitting:.4g}")
    remedies.append("set data.annotated_batch_share to null to sample from all pairs alike")
    if known < fewest:
        remedies.append(f"add rewrites to {dataset!r} (if data.annotated_share is below 1, raise it)")
    raise RimeError(
        f"Each batch of {batch_size} must hold {num_annotated} annotated pairs, at least 2, and "
        f"{batch_size - num_annotated} others (data.annotated_batch_share), but task {dataset!r} has {known} "
        f"annotated pairs and {others} others. {', or '.join(remedies)}."
    )
