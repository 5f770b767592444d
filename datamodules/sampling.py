"""Some pairs of each task, as training draws them, and the longest ones: how long are the pairs of a corpus?

Called by `rime plan`, which cannot read a whole corpus.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rime_pl.datamodules.broken_samples import BrokenSamples
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.loading import BatchLoader, PairBatches, TrainBatches
from rime_pl.datamodules.samples import Samples
from rime_pl.types import Batch


@dataclass(frozen=True)
class TaskSample:
    """Pairs of one task."""

    batch: Batch  # the drawn pairs, then other pairs with many pictures or much text
    num_drawn: int
    num_pairs: int  # of the task in one pass over the training data; some may stand in it several times


def sample_tasks(data: RimeDataModule, size: int) -> Iterator[TaskSample]:
    """Yield ``size`` random pairs of each task and the ``size`` largest ones.

    The index estimates the tokens of a pair from the size of its pictures and the bytes of its texts. So the
    longest of all these pairs is among the longest of the task, and need not be the longest.

    Args:
        data: With a processor and the plan of its training, from ``plan_training``.
        size: Number of pairs of either kind; fewer if the task is smaller.

    Raises:
        DataError: If more samples are broken than ``data.max_broken_share`` allows.
    """
    train = data.train_dataloader().batches
    assert isinstance(train, TrainBatches)
    plan = train.plan
    entries = train.reader.entries
    assert isinstance(entries, Samples)
    sizes = entries.column("visual_tokens").astype(np.int64) + entries.column("text_tokens")
    groups, drawn = [], []
    for source in plan.sources:
        passed = plan.passed(source, size)
        some = random.Random(0).sample(passed, min(size, len(passed)))
        numbers = np.sort(np.concatenate([pool.rows for pool in source.pools]))
        largest = numbers[np.argsort(sizes[numbers], kind="stable")[-size:]].tolist()
        groups.append([*some, *(number for number in largest if number not in some)])
        drawn.append((len(some), source.blocks * plan.block))
    pairs = PairBatches(train.reader, train.processor, groups, train.cut)
    broken = BrokenSamples(data.path, data.max_broken_share)
    for (num_drawn, num_pairs), batch in zip(drawn, BatchLoader(pairs, len(groups), broken), strict=True):
        assert isinstance(batch, Batch)
        yield TaskSample(batch, num_drawn, num_pairs)
