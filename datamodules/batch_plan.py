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
from rime_pl.datamodules.split_index import Entry
from rime_pl.errors import RimeError

#: The training pairs that a stage uses: all, those with both rewrites, or the others. With "none" it uses all
#: pairs and reads no rewrite.
Rewrites = Literal["all", "annotated", "unannotated", "none"]

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
        annotated: Whether each sample has both rewrites; None if it does not matter.
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
            _refuse_small_pools(dataset, known, len(indices) - known, batch_size, num_annotated)

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


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs of the training split that a run uses."""

    entries: list[Entry]
    annotated: list[bool]  # both sides have a rewrite, and the settings let it be read: the losses' own rule
    hidden: list[bool]  # the settings hide the rewrites
    counts: dict[str, tuple[int, int]]  # task -> annotated pairs and all pairs of the split, used or not

    def report(self, annotated_share: float, rewrites: Rewrites) -> str:
        """Return what is printed at the start of training.

        Example:
            >>> TrainingPairs([], [], [], {"a": (20, 25), "b": (11, 20)}).report(1.0, "all")
            '31 of 45 pairs annotated (a: 20 of 25, b: 11 of 20)'
        """
        if rewrites == "none":
            return f"{len(self.entries)} pairs; no rewrite is read (data.rewrites none)"
        known, total = (sum(column) for column in zip(*self.counts.values(), strict=True))
        tasks = ", ".join(f"{task}: {few} of {all_}" for task, (few, all_) in sorted(self.counts.items()))
        words = f"{known} of {total} pairs annotated" + (f" ({tasks})" if len(self.counts) > 1 else "")
        if annotated_share < 1:
            words += f", other rewrites are hidden (data.annotated_share {annotated_share})"
        return words + ("" if rewrites == "all" else f", {len(self.entries)} used (data.rewrites {rewrites})")


def choose_pairs(entries: Sequence[Entry], annotated_share: float, rewrites: Rewrites) -> TrainingPairs:
    """Return the training pairs that the settings choose.

    Raises:
        RimeError: If no pair is left, or if none is annotated, unless ``rewrites`` asks for that by name.
    """
    wanted = {"annotated": (True,), "unannotated": (False,)}.get(rewrites, (True, False))
    shown = [rewrites != "none" and is_annotated(entry.name, annotated_share) for entry in entries]
    annotated = [readable and all(entry.has_rewrite) for entry, readable in zip(entries, shown, strict=True)]
    places = [place for place, known in enumerate(annotated) if known in wanted]
    if rewrites in ("all", "annotated") and not any(annotated):
        raise RimeError(
            f"At least one training pair must have a rewrite on both sides, but of {len(entries)} none has "
            f"with data.annotated_share={annotated_share}. The generative mode would learn nothing. Add "
            "rewrites to queries and targets. To train the discriminative mode only, or for Refine-RL, which "
            "reads no rewrites, set data.rewrites to none."
        )
    if not places:
        raise RimeError(
            f"data.rewrites={rewrites} and data.annotated_share={annotated_share} leave no training pair. "
            "Change data.annotated_share, or set data.rewrites to all."
        )
    tasks: dict[str, list[bool]] = {}
    for entry, known in zip(entries, annotated, strict=True):
        tasks.setdefault(entry.dataset, []).append(known)
    return TrainingPairs(
        entries=[entries[place] for place in places],
        annotated=[annotated[place] for place in places],
        hidden=[rewrites == "unannotated" or not shown[place] for place in places],
        counts={task: (sum(flags), len(flags)) for task, flags in tasks.items()},
    )


def plan_training(
    entries: Sequence[Entry],
    batch_size: int,
    seed: int,
    annotated_share: float = 1.0,
    annotated_batch_share: float | None = 0.5,
    rewrites: Rewrites = "all",
) -> tuple[TrainingPairs, BatchPlan]:
    """Return the training pairs that the settings choose, and the plan of their batches.

    Args:
        entries: Index of the training split.
        batch_size, seed, annotated_share, annotated_batch_share, rewrites: As in ``RimeDataModule``.

    Raises:
        RimeError: If ``choose_pairs`` finds no pairs, or ``BatchPlan`` cannot fill a batch.
    """
    pairs = choose_pairs(entries, annotated_share, rewrites)
    flags = pairs.annotated
    share = annotated_batch_share if rewrites == "all" and not all(flags) else None
    datasets = [entry.dataset for entry in pairs.entries]
    contents = [entry.target_content for entry in pairs.entries]
    num_annotated = None if share is None else round(share * batch_size)
    return pairs, BatchPlan(datasets, contents, batch_size, seed, flags, num_annotated)


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


def rank_slice(
    indices: Sequence[int], rank: int, world_size: int, annotated: Sequence[bool] | None = None
) -> Sequence[int]:
    """Return the part of a global batch that one process works on.

    All processes get the same number of samples. The annotated ones stand first in a batch, so they are
    spread evenly: otherwise the first process would get them all.

    Args:
        indices: The samples of the global batch.
        rank, world_size: This process, and how many there are.
        annotated: Whether each sample of the split is annotated; None if it does not matter.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> rank_slice([5, 6, 7, 8], rank=1, world_size=2)
        [7, 8]
        >>> rank_slice([0, 1, 2, 3], rank=1, world_size=2, annotated=[True, True, False, False])
        [1, 3]
    """
    size = local_batch_size(len(indices), world_size)
    if annotated is None or world_size == 1:
        return indices[rank * size : (rank + 1) * size]
    known = [index for index in indices if annotated[index]]
    others = [index for index in indices if not annotated[index]]
    first, last = (len(known) * turn // world_size for turn in (rank, rank + 1))
    return known[first:last] + others[rank * size - first : (rank + 1) * size - last]


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
