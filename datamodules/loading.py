"""Turns planned indices into pairs and pairs into batches of tokens, in this process or in workers.

Used by datamodule.py only. Workers return broken samples together with the batch, so that the main process
can count them (broken_samples.py) and decide whether to stop.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, Sampler

from rime_pl.datamodules.batch_plan import BatchPlan
from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.ranks import rank_slice
from rime_pl.datamodules.shards import ShardReader
from rime_pl.datamodules.together import in_step
from rime_pl.errors import DataError, RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, EvalBatch, Pair, Side


class _Batches(Dataset[Fetched]):
    """Reads pairs, and another good pair in place of a broken one.

    Args:
        reader: Reader of the split.
        processor: Processor that makes tokens and patches.
        sides: The sides of a pair that the batches hold.
        cut: Whether a text that is too long is cut; otherwise its sample is broken.
    """

    def __init__(
        self, reader: ShardReader, processor: RimeProcessor, sides: Sequence[Side], cut: bool
    ) -> None:
        self.reader, self.processor, self.sides, self.cut = reader, processor, sides, cut

    def _make(
        self, indices: Sequence[int], collate: Callable[[list[Pair]], Batch | EvalBatch], draw: object = None
    ) -> Fetched:
        fetched = Fetched()
        try:
            fetched.batch = collate([self._read(index, fetched, draw) for index in indices])
        except RimeError as error:
            fetched.error = error
        except MemoryError:
            fetched.error = RimeError(
                "Reading a batch must fit in the memory of this machine, but it is used up. Set "
                "data.num_workers, data.batch_size or model.backbone.prompt.max_pixels lower."
            )
        return fetched

    def _read(self, index: int, fetched: Fetched, draw: object) -> Pair:
        """Return the sample, or the first good one that may stand in for it, independent of the workers."""
        for other in itertools.chain([index], self._instead(index)):  # looked for only if need be
            try:
                pair = self.reader.read(other, self.sides[0] if len(self.sides) == 1 else None, draw)
                pair, cut = self.processor.check(pair, self.sides, self.cut)
            except DataError as error:
                fetched.broken[self.reader.entries[other].name] = str(error)
            else:
                fetched.cut.update(cut)
                return pair
        raise DataError(
            f"Every sample that could stand in for {self.reader.entries[index].name} is broken, too, for "
            f"example: {next(iter(fetched.broken.values()))} Repair the corpus or build it again."
        )

    def _instead(self, index: int) -> Iterable[int]:
        """Yield the following samples of the same task."""
        entries = self.reader.entries
        for step in range(1, len(entries)):
            other = (index + step) % len(entries)
            if entries[other].dataset == entries[index].dataset:
                yield other


class TrainBatches(_Batches):
    """Maps a position in the plan to this process's part of the batch."""

    def __init__(
        self,
        reader: ShardReader,
        processor: RimeProcessor,
        plan: BatchPlan,
        rank: int,
        world_size: int,
        cut: bool = False,
    ) -> None:
        super().__init__(reader, processor, ("query", "target"), cut)
        self.plan, self.rank, self.world_size = plan, rank, world_size

    def _instead(self, index: int) -> Iterator[int]:
        """Yield the following samples of the same task that have, or lack, rewrites alike."""
        yield from map(int, self.plan.following(index))

    def __getitem__(self, position: int) -> Fetched:
        planned = self.plan.batch(position)
        mine = rank_slice(planned.indices, self.rank, self.world_size, self.plan.annotated)
        further = any(self.reader.further or ())

        def collate(pairs: list[Pair]) -> Batch:
            return self.processor.training_batch(pairs, position, further)

        return self._make(mine, collate, position)


class PairBatches(_Batches):
    """Maps the number of a batch to the batch of whole pairs, query and target together."""

    def __init__(
        self,
        reader: ShardReader,
        processor: RimeProcessor,
        batches: Sequence[Sequence[int]],
        cut: bool = False,
    ) -> None:
        super().__init__(reader, processor, ("query", "target"), cut)
        self.batches = batches

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], self.processor.training_batch)


class EvalBatches(_Batches):
    """Maps the number of a batch to the batch of queries or of gallery items.

    A broken item is left out: an item that is evaluated anyway fills its row, and the metric drops repeats.
    Only a duplicate of a gallery item, which has the same content, may take its place.

    Args:
        kinds: Indices of the items of each task (queries) or gallery, on all processes.
        batches: Indices of this process, by batch; a batch holds one kind.
        generative: Whether the batches ask for the generative mode, too.
    """

    def __init__(
        self,
        reader: ShardReader,
        processor: RimeProcessor,
        side: Side,
        kinds: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        cut: bool = False,
        generative: bool = True,
    ) -> None:
        super().__init__(reader, processor, (side,), cut)
        self.side, self.kinds, self.batches, self.generative = side, kinds, batches, generative

    def _instead(self, index: int) -> Iterable[int]:
        entries = self.reader.entries
        if self.side == "target":
            wanted = (entries[index].gallery, entries[index].target_content)
            for other, entry in enumerate(entries):
                if other != index and (entry.gallery, entry.target_content) == wanted:
                    yield other
        for kind in self.kinds:
            if index in kind:
                start = kind.index(index) + 1
                yield from (*kind[start:], *kind[: start - 1])

    def __getitem__(self, number: int) -> Fetched:
        return self._make(self.batches[number], self._collate)

    def _collate(self, pairs: list[Pair]) -> EvalBatch:
        return replace(self.processor.eval_batch(self.side, pairs), generative=self.generative)


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


class _Numbers(Sampler[int]):
    """The numbers of the batches that an epoch has still to give, looked up when it begins."""

    def __init__(self, length: int, position: Position | None) -> None:
        self._length, self._position = length, position

    def __iter__(self) -> Iterator[int]:
        if self._position is None:
            return iter(range(self._length))
        return iter(self._position.rest_of_epoch(self._length))


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
        self._loader: DataLoader[Fetched] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch | EvalBatch]:
        return in_step(self._read(), self._broken, len(self.batches.reader), self._trainer)

    def _read(self) -> Iterator[Fetched]:
        if self._num_workers:  # forked tokenizers would warn and switch this off themselves
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            atexit.unregister(_end_workers)  # registered once
            atexit.register(_end_workers)
        if self._loader is None:
            self._loader = DataLoader(
                self.batches,
                batch_size=None,
                sampler=_Numbers(self._length, self._position),
                num_workers=self._num_workers,
                worker_init_fn=_begin_worker,
                # The workers of training stay for its epochs: what they know of the plan and the tars that
                # they have open would be lost. Those of an evaluation would only take memory in between.
                persistent_workers=self._num_workers > 0 and self._position is not None,
            )
        yield from self._loader

    def close(self) -> None:
        """End the workers that stay between epochs."""
        self._loader = None

    # Lightning resumes in the middle of an epoch only if a loader has these two methods.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._position is None else {"position": self._position.trained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the trainer restores its own counters, and the position is read from them."""


def _begin_worker(worker: int) -> None:
    """Leave signals to the trainer, and what the trainer has in memory where it is.

    Ctrl-C and SIGTERM reach the whole group: the trainer ends the batch, and then its workers. A collection
    of garbage would write to every object that a forked worker shares with the trainer, and so copy them.
    """
    gc.freeze()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.excepthook = _unless_the_trainer_has_gone


def _end_workers() -> None:
    """End the workers that are left when this process ends, before multiprocessing waits for them.

    It sends them SIGTERM, which they ignore, and would wait for good.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _unless_the_trainer_has_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error, but not that a batch could not be handed over: a trainer that was stopped says why."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)
