"""Planned indices -> decoded pairs -> token batches, in this process or in workers.

Used by datamodules/datamodule.py only. Workers hand broken samples back together with the batch, so that
the main process can count them and decide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.datamodules.batch_plan import BatchPlan, rank_slice
from rime_pl.datamodules.shards import ShardReader
from rime_pl.errors import DataError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, EvalBatch, Pair, Side


@dataclass
class Fetched:
    """A batch on its way from a worker; errors travel as values, to be told without a worker's traceback."""

    batch: Batch | EvalBatch | None = None
    broken: dict[str, str] = field(default_factory=dict)  # sample -> what is wrong
    error: DataError | None = None


class _Batches(Dataset[Fetched]):
    """Reads pairs; a broken one is replaced by the next good one of the same task.

    Args:
        reader: Of the split.
        processor: Makes tokens and patches.
        annotated: Of each sample, whether its rewrites are shown; None shows all there are.
    """

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, annotated: Sequence[bool] | None = None
    ) -> None:
        self.reader = reader
        self.processor = processor
        self.annotated = annotated
        self.bare = ShardReader(reader.entries)  # nothing is asked of samples that nobody annotated

    def _make(self, indices: Sequence[int], collate: Callable[[list[Pair]], Batch | EvalBatch]) -> Fetched:
        fetched = Fetched()
        try:
            pairs = [self._read(index, fetched.broken) for index in indices]
            fetched.batch = collate(pairs)
        except DataError as error:
            fetched.error = error
        return fetched

    def _read(self, index: int, broken: dict[str, str]) -> Pair:
        """The sample, or the next good one of its task, which does not depend on ranks or workers."""
        entries = self.reader.entries
        for step in range(len(entries)):
            other = (index + step) % len(entries)
            if entries[other].dataset != entries[index].dataset:
                continue
            if self.annotated and self.annotated[other] != self.annotated[index]:
                continue
            try:
                if self.annotated and not self.annotated[other]:
                    return without_rewrites(self.bare.read(other))
                return self.reader.read(other)
            except DataError as error:
                broken[entries[other].name] = str(error)
        raise DataError(
            f"Every sample of task {entries[index].dataset!r} is broken, e.g. {next(iter(broken.values()))}"
        )


class TrainBatches(_Batches):
    """Position in the plan -> this rank's part of the batch."""

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, plan: BatchPlan, rank: int, world_size: int
    ) -> None:
        super().__init__(reader, processor, plan.annotated)
        self.plan, self.rank, self.world_size = plan, rank, world_size

    def __getitem__(self, position: int) -> Fetched:
        planned = self.plan.batch(position)
        mine = rank_slice(planned.indices, self.rank, self.world_size)
        return self._make(mine, lambda pairs: self.processor.training_batch(pairs, position))


class PairBatches(_Batches):
    """Number of a batch of whole pairs, both sides beside each other -> the batch."""

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, batches: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(reader, processor)
        self.batches = batches

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], self.processor.training_batch)


class EvalBatches(_Batches):
    """Number of a batch of queries or of gallery items -> the batch."""

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, side: Side, batches: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(reader, processor)
        self.side, self.batches = side, batches

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], lambda pairs: self.processor.eval_batch(self.side, pairs))


class BatchLoader:
    """An iterable with a length that starts where training stands.

    It is no ``DataLoader`` itself, so that Lightning injects no sampler of its own.

    Args:
        batches: Where batches come from.
        length: Batches of an epoch.
        numbers: Asked when the first batch of an epoch is needed, because a resumed trainer knows only then
            how far it had come: the numbers of the batches still to give.
        num_workers: Worker processes; 0 reads in this one.
        on_broken: Told of broken samples; raises when they are too many.
        position: Batches trained on so far.
    """

    def __init__(
        self,
        batches: TrainBatches | PairBatches | EvalBatches,
        length: int,
        numbers: Callable[[], range],
        num_workers: int,
        on_broken: Callable[[dict[str, str]], None],
        position: Callable[[], int],
    ) -> None:
        self.batches = batches
        self._length = length
        self._numbers = numbers
        self._num_workers = num_workers
        self._on_broken = on_broken
        self._position = position

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch | EvalBatch]:
        if self._num_workers:  # forked tokenizers would warn and switch this off themselves
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=self._numbers(),
            num_workers=self._num_workers,
        )
        for fetched in loader:
            if fetched.broken:
                self._on_broken(fetched.broken)
            if fetched.error is not None:
                raise fetched.error
            yield fetched.batch

    # Lightning asks for these two before it believes that a loader can resume in the middle of an epoch.
    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: the position is asked from the trainer, which restores its own counters."""
