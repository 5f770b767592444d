"""Turns planned indices into pairs and pairs into batches of tokens, in this process or in workers.

Used by datamodule.py only. Workers return broken samples together with the batch, so that the main process
can count them and decide whether to stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.datamodules.batch_plan import BatchPlan, rank_slice
from rime_pl.datamodules.shards import ShardReader
from rime_pl.datamodules.together import in_step
from rime_pl.errors import DataError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, EvalBatch, Pair, Side


@dataclass
class Fetched:
    """A batch from a worker. Errors are values here, so that the user sees no traceback of a worker."""

    batch: Batch | EvalBatch | None = None
    broken: dict[str, str] = field(default_factory=dict)  # sample -> what is wrong
    error: DataError | None = None


class _Batches(Dataset[Fetched]):
    """Reads pairs and replaces a broken one by the next good one of the same task.

    Args:
        reader: Reader of the split.
        processor: Processor that makes tokens and patches.
        annotated: Whether each sample keeps its rewrites; None keeps all rewrites.
    """

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, annotated: Sequence[bool] | None = None
    ) -> None:
        self.reader = reader
        self.processor = processor
        self.annotated = annotated
        self.bare = ShardReader(reader.entries)  # requires no rewrites: for samples without annotation
        self.decoded: Side | None = None  # the side whose images are needed; None for both

    def _make(self, indices: Sequence[int], collate: Callable[[list[Pair]], Batch | EvalBatch]) -> Fetched:
        fetched = Fetched()
        try:
            pairs = [self._read(index, fetched.broken) for index in indices]
            fetched.batch = collate(pairs)
        except DataError as error:
            fetched.error = error
        return fetched

    def _read(self, index: int, broken: dict[str, str]) -> Pair:
        """Return the sample, or the next good one of its task, independent of ranks and workers."""
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
                return self.reader.read(other, self.decoded)
            except DataError as error:
                broken[entries[other].name] = str(error)
        raise DataError(
            f"Every sample of task {entries[index].dataset!r} is broken, for example: "
            f"{next(iter(broken.values()))} Build the corpus again, or leave the task out with data.tasks."
        )


class TrainBatches(_Batches):
    """Maps a position in the plan to this process's part of the batch."""

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
    """Maps the number of a batch to the batch of whole pairs, query and target together."""

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, batches: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(reader, processor)
        self.batches = batches

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], self.processor.training_batch)


class EvalBatches(_Batches):
    """Maps the number of a batch to the batch of queries or of gallery items."""

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, side: Side, batches: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(reader, processor)
        self.side, self.decoded, self.batches = side, side, batches

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], lambda pairs: self.processor.eval_batch(self.side, pairs))


class BrokenSamples:
    """Collects the broken samples of this process and stops the run when there are too many.

    Args:
        path: Corpus folder, for the message.
        max_share: Largest share of broken samples that the run accepts.
    """

    def __init__(self, path: str, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self.found: dict[str, str] = {}  # sample -> what is wrong

    def add(self, broken: dict[str, str], num_samples: int) -> None:
        """Add the broken samples of one batch, read from a split of ``num_samples``.

        Raises:
            DataError: If more than ``max_share`` of the samples are broken; it lists them.
        """
        self.found.update(broken)
        if len(self.found) > self.max_share * num_samples:
            listed = "\n".join(f"  {message}" for _, message in sorted(self.found.items()))
            raise DataError(
                f"At most {self.max_share} of the samples may be broken (data.max_broken_share), but "
                f"{len(self.found)} of {num_samples} samples in {self.path} are broken:\n{listed}\n"
                "Repair the corpus or build it again, or raise data.max_broken_share to skip broken samples."
            )


class Position:
    """Counts the global batches that were trained on; batches that were only prefetched do not count.

    The trainer keeps the count while it trains; a checkpoint restores it.
    """

    def __init__(self) -> None:
        self.trainer: L.Trainer | None = None
        self._trained = 0

    @property
    def trained(self) -> int:
        """The number of global batches since the start of training."""
        if (progress := self._progress()) is not None:
            self._trained = progress.total.processed
        return self._trained

    def restore(self, trained: int) -> None:
        """Set the position to the one of a checkpoint."""
        self._trained = trained

    def rest_of_epoch(self, length: int) -> range:
        """Return the numbers of the batches that an epoch of ``length`` batches has not given yet."""
        progress = self._progress()
        done = self.trained % length if progress is None else progress.current.ready
        return range(self.trained, self.trained + length - done)

    def _progress(self) -> Any:
        """The trainer's own count of batches; None if it is not training."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress


class BatchLoader:
    """An iterable with a length that starts where training stands.

    It is not a ``DataLoader``, because Lightning would replace the sampler of a ``DataLoader``.

    Args:
        batches: Source of the batches, by number.
        length: Number of batches in an epoch.
        broken: Collection that broken samples are added to.
        num_workers: Number of worker processes; 0 reads in this process.
        position: Position of training, read when the first batch of an epoch is needed, because a resumed
            trainer knows it only then. None starts every epoch at batch 0.
        trainer: Knows the other processes, which stop together; None without others.
    """

    def __init__(
        self,
        batches: TrainBatches | PairBatches | EvalBatches,
        length: int,
        broken: BrokenSamples,
        num_workers: int = 0,
        position: Position | None = None,
        trainer: L.Trainer | None = None,
    ) -> None:
        self.batches = batches
        self._length = length
        self._broken = broken
        self._num_workers = num_workers
        self._position = position
        self._trainer = trainer

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch | EvalBatch]:
        return in_step(self._read(), self._trainer)

    def _read(self) -> Iterator[Batch | EvalBatch]:
        if self._num_workers:  # forked tokenizers would warn and switch this off themselves
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        whole = range(self._length)
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=whole if self._position is None else self._position.rest_of_epoch(self._length),
            num_workers=self._num_workers,
        )
        for fetched in loader:
            if fetched.broken:
                self._broken.add(fetched.broken, len(self.batches.reader))
            if fetched.error is not None:
                raise fetched.error
            assert fetched.batch is not None, "a batch or an error"
            yield fetched.batch

    # Lightning resumes in the middle of an epoch only if a loader has these two methods.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._position is None else {"position": self._position.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the trainer restores its own counters, and the position is read from them."""
