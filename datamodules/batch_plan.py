"""Which samples form which global batch: a pure function of (seed, position).

Called by the data module. The plan knows nothing of ranks, workers or epochs of the trainer, so that none of
them can change the data; a resumed run only has to know its position.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rime_pl.datamodules.annotation import is_annotated
from rime_pl.datamodules.shards import Entry
from rime_pl.errors import RimeError

#: Which training pairs a stage takes, by whether their rewrites are shown.
Rewrites = Literal["all", "annotated", "unannotated"]

_LOOK_AHEAD = 8  # batches' worth of samples that are searched for distinct contents


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, all of one task."""

    position: int  # number of the batch since the start of training
    dataset: str
    indices: list[int]  # batch_size samples


class BatchPlan:
    """An endless sequence of global batches, readable at any position.

    One pass holds floor(samples / batch_size) batches of each task in a shuffled order; the next pass
    shuffles anew. Inside a batch no target content occurs twice as long as the task has enough contents.

    Args:
        datasets: The task of each sample.
        contents: The content id of each sample's target.
        batch_size: Pairs of a global batch, over all ranks.
        seed: The only source of chance.
        annotated: Of each sample, whether it has rewrites; None where nobody asks.
        num_annotated: Samples of each batch that are annotated; they come round as often as that takes.
            None draws from all alike.

    Raises:
        RimeError: If a task has fewer samples than a batch, or fewer annotated ones than its part of a batch.

    Example:
        >>> plan = BatchPlan(["a"] * 4 + ["b"] * 2, list("wxyzxy"), batch_size=2, seed=0)
        >>> len(plan), sorted(plan.batch(n).dataset for n in range(3))
        (3, ['a', 'a', 'b'])
    """

    def __init__(
        self,
        datasets: Sequence[str],
        contents: Sequence[str],
        batch_size: int,
        seed: int,
        annotated: Sequence[bool] | None = None,
        num_annotated: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.annotated = annotated
        self.num_annotated = num_annotated
        self.tasks: dict[str, list[int]] = {}
        for index, dataset in enumerate(datasets):
            self.tasks.setdefault(dataset, []).append(index)
        self._contents = contents
        self._passes: dict[int, list[tuple[str, list[int]]]] = {}
        if batch_size < 1:
            raise RimeError(f"data.batch_size: {batch_size} is no number of pairs. Give 1 or more.")
        for dataset, indices in self.tasks.items():
            if len(indices) < batch_size:
                raise RimeError(
                    f"data.batch_size: {batch_size}, but task {dataset!r} has only {len(indices)} training "
                    f"samples. Give {len(indices)} or less, or leave the task out with data.tasks."
                )
            if annotated is None or num_annotated is None:
                continue
            known = sum(annotated[index] for index in indices)
            if known < num_annotated or len(indices) - known < batch_size - num_annotated:
                raise RimeError(
                    f"data.annotated_share: task {dataset!r} has {known} annotated training samples of "
                    f"{len(indices)}, but each batch of {batch_size} takes {num_annotated} that are and "
                    f"{batch_size - num_annotated} that are not. Change the share, or "
                    "set data.annotated_batch_share to null to draw from all alike."
                )

    def __len__(self) -> int:
        """Batches of one pass over the data."""
        return sum(len(indices) // self.batch_size for indices in self.tasks.values())

    def batch(self, position: int) -> PlannedBatch:
        """The global batch at a position, counted from the start of training."""
        number, offset = divmod(position, len(self))
        if number not in self._passes:
            # Two passes are enough: one worker may still be at the end of the last one.
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = self._shuffled(number)
        dataset, indices = self._passes[number][offset]
        return PlannedBatch(position, dataset, indices)

    def _shuffled(self, number: int) -> list[tuple[str, list[int]]]:
        batches = []
        for dataset in sorted(self.tasks):
            batches += [(dataset, batch) for batch in self._distinct(self._pools(number, dataset), dataset)]
        random.Random(f"{self.seed} {number}").shuffle(batches)
        return batches

    def _pools(self, number: int, dataset: str) -> list[tuple[deque[int], int]]:
        """What the batches of one pass are drawn from: samples in order, and how many a batch takes."""
        if self.num_annotated is None or self.annotated is None:
            return [(self._order(f"{self.seed} {number} {dataset}", self.tasks[dataset]), self.batch_size)]
        pools = []
        for kind, count in ((True, self.num_annotated), (False, self.batch_size - self.num_annotated)):
            samples = [index for index in self.tasks[dataset] if self.annotated[index] is kind]
            order: deque[int] = deque()
            while len(order) < count * (len(self.tasks[dataset]) // self.batch_size):
                turn = len(order) // len(samples)
                order += self._order(f"{self.seed} {number} {dataset} {kind} {turn}", samples)
            pools.append((order, count))
        return pools

    @staticmethod
    def _order(seed: str, samples: list[int]) -> deque[int]:
        order = samples.copy()
        random.Random(seed).shuffle(order)
        return deque(order)

    def _distinct(self, pools: list[tuple[deque[int], int]], dataset: str) -> Iterable[list[int]]:
        """Cut into batches; a sample whose content is already in the batch waits for the next one."""
        for _ in range(len(self.tasks[dataset]) // self.batch_size):
            contents: set[str] = set()
            yield [index for waiting, count in pools for index in self._take(waiting, count, contents)]

    def _take(self, waiting: deque[int], count: int, contents: set[str]) -> list[int]:
        taken: list[int] = []
        twins: list[int] = []
        while waiting and len(taken) < count and len(twins) < _LOOK_AHEAD * self.batch_size:
            index = waiting.popleft()
            if self._contents[index] in contents:
                twins.append(index)
            else:
                contents.add(self._contents[index])
                taken.append(index)
        missing = count - len(taken)  # > 0: twins cannot be avoided, the loss masks them
        waiting.extendleft(reversed(twins[missing:]))
        return taken + twins[:missing]


def plan_training(
    entries: Sequence[Entry],
    batch_size: int,
    seed: int,
    annotated_share: float = 1.0,
    annotated_batch_share: float | None = 0.5,
    rewrites: Rewrites = "all",
) -> tuple[list[Entry], BatchPlan]:
    """The training pairs that the settings choose, and their batches.

    Args:
        entries: The training split.
        batch_size, seed, annotated_share, annotated_batch_share, rewrites: As in ``RimeDataModule``.

    Raises:
        RimeError: If no pair is left, and as ``BatchPlan``.
    """
    wanted = {"all": (True, False), "annotated": (True,), "unannotated": (False,)}[rewrites]
    shown = [any(entry.has_rewrite) and is_annotated(entry.name, annotated_share) for entry in entries]
    chosen = [entry for entry, annotated in zip(entries, shown, strict=True) if annotated in wanted]
    flags = [annotated for annotated in shown if annotated in wanted]
    if not chosen:
        raise RimeError(
            f"data.rewrites={rewrites} leaves no training pair with data.annotated_share={annotated_share}. "
            "Change the share, or set data.rewrites to all."
        )
    both_kinds = not all(flags) and (any(flags) or annotated_share < 1)
    share = annotated_batch_share if both_kinds and rewrites == "all" else None
    datasets, contents = [entry.dataset for entry in chosen], [entry.target_content for entry in chosen]
    num_annotated = None if share is None else round(share * batch_size)
    return chosen, BatchPlan(datasets, contents, batch_size, seed, flags, num_annotated)


def rank_slice(indices: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """The contiguous part of a global batch that one rank works on.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> rank_slice([5, 6, 7, 8], rank=1, world_size=2)
        [7, 8]
    """
    if len(indices) % world_size:
        raise RimeError(
            f"data.batch_size: {len(indices)} pairs cannot be divided by {world_size} processes. "
            f"Give a multiple of {world_size}."
        )
    size = len(indices) // world_size
    return indices[rank * size : (rank + 1) * size]


def rank_batches(indices: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Evaluation: every sample once over all ranks, and the same number of batches on each rank.

    Ranks take turns. Where the number of samples does not divide, a rank repeats a sample; the metric drops
    repeats by their item id. Ranks in step are needed because generation under sharding is collective.

    Example:
        >>> rank_batches([0, 1, 2, 3, 4], batch_size=2, rank=1, world_size=2)
        [[1, 3], [0]]
    """
    turns = -(-len(indices) // world_size)
    mine = [indices[(turn * world_size + rank) % len(indices)] for turn in range(turns)]
    return [mine[start : start + batch_size] for start in range(0, turns, batch_size)]
