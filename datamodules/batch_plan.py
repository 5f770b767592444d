"""Decides which samples form which global batch, from the seed and the position of the batch only.

Called by the data module. The plan does not know processes, workers or epochs of the trainer, so none of them
can change the data, and a resumed run only has to know its position.
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

#: The training pairs that a stage uses: all, those with rewrites, or those without.
Rewrites = Literal["all", "annotated", "unannotated"]

_LOOK_AHEAD = 8  # how many batches of samples are searched for distinct contents


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, all of one task."""

    position: int  # number of the batch since the start of training
    dataset: str
    indices: list[int]  # batch_size samples


class BatchPlan:
    """An endless sequence of global batches that can be read at any position.

    One pass holds floor(samples / batch_size) batches of each task, in shuffled order. Each pass is shuffled
    anew. A batch holds no target content twice, as long as the task has enough contents.

    Args:
        datasets: Task of each sample.
        contents: Content id of each sample's target.
        batch_size: Number of pairs in a global batch, over all processes.
        seed: Seed of the order; nothing else is random.
        annotated: Whether each sample has rewrites; None if it does not matter.
        num_annotated: Number of annotated samples in each batch; they repeat as often as needed.
            None samples from all pairs alike.

    Raises:
        RimeError: If a task has fewer samples than a batch, or too few annotated or unannotated samples.

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
            raise RimeError(f"data.batch_size must be at least 1, but is {batch_size}.")
        for dataset, indices in self.tasks.items():
            if len(indices) < batch_size:
                raise RimeError(
                    f"data.batch_size must be at most {len(indices)}, but is {batch_size}: a batch holds one "
                    f"task, and task {dataset!r} has only {len(indices)} training samples. Use a smaller "
                    "batch, or list the other tasks in data.tasks."
                )
            if annotated is None or num_annotated is None:
                continue
            known = sum(annotated[index] for index in indices)
            if known < num_annotated or len(indices) - known < batch_size - num_annotated:
                raise RimeError(
                    f"Each batch of {batch_size} must hold {num_annotated} annotated pairs and "
                    f"{batch_size - num_annotated} others, but task {dataset!r} has {known} annotated pairs "
                    f"and {len(indices) - known} others. Change data.annotated_share, or set "
                    "data.annotated_batch_share to null to sample from all pairs alike."
                )

    def __len__(self) -> int:
        """Return the number of batches in one pass over the data."""
        return sum(len(indices) // self.batch_size for indices in self.tasks.values())

    def batch(self, position: int) -> PlannedBatch:
        """Return the global batch at ``position``, counted from the start of training."""
        number, offset = divmod(position, len(self))
        if number not in self._passes:
            # Two passes are kept, because another worker may still read the end of the previous one.
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
        """Return the samples of one pass in order, and how many of them each batch takes."""
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
        """Yield batches; a sample whose content is already in the batch waits for the next batch."""
        for _ in range(len(self.tasks[dataset]) // self.batch_size):
            contents: set[str] = set()
            yield [index for waiting, count in pools for index in self._take(waiting, count, contents)]

    def _take(self, waiting: deque[int], count: int, contents: set[str]) -> list[int]:
        taken: list[int] = []
        duplicates: list[int] = []
        while waiting and len(taken) < count and len(duplicates) < _LOOK_AHEAD * self.batch_size:
            index = waiting.popleft()
            if self._contents[index] in contents:
                duplicates.append(index)
            else:
                contents.add(self._contents[index])
                taken.append(index)
        missing = count - len(taken)  # > 0: duplicates cannot be avoided; the loss masks false negatives
        waiting.extendleft(reversed(duplicates[missing:]))
        return taken + duplicates[:missing]


def plan_training(
    entries: Sequence[Entry],
    batch_size: int,
    seed: int,
    annotated_share: float = 1.0,
    annotated_batch_share: float | None = 0.5,
    rewrites: Rewrites = "all",
) -> tuple[list[Entry], BatchPlan]:
    """Return the training pairs that the settings choose, and the plan of their batches.

    Args:
        entries: Index of the training split.
        batch_size, seed, annotated_share, annotated_batch_share, rewrites: As in ``RimeDataModule``.

    Raises:
        RimeError: If no pair is left, or if ``BatchPlan`` cannot fill a batch.
    """
    wanted = {"all": (True, False), "annotated": (True,), "unannotated": (False,)}[rewrites]
    shown = [any(entry.has_rewrite) and is_annotated(entry.name, annotated_share) for entry in entries]
    chosen = [entry for entry, annotated in zip(entries, shown, strict=True) if annotated in wanted]
    flags = [annotated for annotated in shown if annotated in wanted]
    if not chosen:
        raise RimeError(
            f"data.rewrites={rewrites} and data.annotated_share={annotated_share} leave no training pair. "
            "Change data.annotated_share, or set data.rewrites to all."
        )
    both_kinds = not all(flags) and (any(flags) or annotated_share < 1)
    share = annotated_batch_share if both_kinds and rewrites == "all" else None
    datasets, contents = [entry.dataset for entry in chosen], [entry.target_content for entry in chosen]
    num_annotated = None if share is None else round(share * batch_size)
    return chosen, BatchPlan(datasets, contents, batch_size, seed, flags, num_annotated)


def local_batch_size(batch_size: int, processes: int) -> int:
    """Return the number of pairs of a global batch that each process works on.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> local_batch_size(64, processes=4)
        16
    """
    if batch_size < 1 or batch_size % processes:
        multiple = max(1, -(-batch_size // processes)) * processes
        raise RimeError(
            f"data.batch_size must be a multiple of the number of processes, but is {batch_size} with "
            f"{processes} processes. Set data.batch_size to {multiple}, for example."
        )
    return batch_size // processes


def rank_slice(indices: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """Return the contiguous part of a global batch that one process works on.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> rank_slice([5, 6, 7, 8], rank=1, world_size=2)
        [7, 8]
    """
    size = local_batch_size(len(indices), world_size)
    return indices[rank * size : (rank + 1) * size]


def rank_batches(indices: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return the evaluation batches of one process; together the processes see every sample.

    All processes get the same number of batches, because generation under sharding needs all of them at
    once. If the samples do not divide evenly, some processes repeat a sample. The metric drops repeats by
    their item id.

    Example:
        >>> rank_batches([0, 1, 2, 3, 4], batch_size=2, rank=1, world_size=2)
        [[1, 3], [0]]
    """
    turns = -(-len(indices) // world_size)
    mine = [indices[(turn * world_size + rank) % len(indices)] for turn in range(turns)]
    return [mine[start : start + batch_size] for start in range(0, turns, batch_size)]
