"""All processes read in step: what one of them finds broken counts for all, and all stop together.

Used by loading.py. Otherwise each would have a share of broken samples of its own, and the others would wait
for a process that failed in the next collective, until a time-out.
"""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L

from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.errors import DataError, RimeError, ToldElsewhereError
from rime_pl.types import Batch, EvalBatch


def in_step(
    reading: Iterator[Fetched], samples: BrokenSamples, num_samples: int, trainer: L.Trainer | None
) -> Iterator[Batch | EvalBatch]:
    """Yield the batches that are read, as many on each process; an error of one process ends all.

    Args:
        reading: What this process reads.
        samples: Where the broken samples of all processes are added.
        num_samples: Number of samples in the split.
        trainer: Knows the other processes; None without others.

    Raises:
        RimeError: On the first process: too many broken samples, or the message of the process that failed; a
            DataError if it was one.
        ToldElsewhereError: On the other processes.
    """
    while True:
        fetched, error = None, None
        try:
            fetched = next(reading, None)
        except Exception as failed:
            error = failed
        if fetched is not None:
            samples.cut.update(fetched.cut)
            error = fetched.error
        _agree(fetched.broken if fetched else {}, error, samples, num_samples, trainer)
        if fetched is None:
            return
        assert fetched.batch is not None, "a batch or an error"
        yield fetched.batch


def _agree(
    broken: dict[str, str],
    error: Exception | None,
    samples: BrokenSamples,
    num_samples: int,
    trainer: L.Trainer | None,
) -> None:
    new = {name: wrong for name, wrong in broken.items() if name not in samples.found}
    if trainer is None or trainer.world_size == 1:
        samples.add(new, num_samples)
        if error is not None:
            raise error
        return
    strategy = trainer.strategy
    if not strategy.reduce_boolean_decision(bool(new) or error is not None, all=False):
        return
    mine = (new, "" if error is None else str(error) or type(error).__name__)
    told = [strategy.broadcast(mine, src=rank) for rank in range(trainer.world_size)]
    try:
        samples.add({name: wrong for found, _ in told for name, wrong in found.items()}, num_samples)
    except DataError as too_many:
        raise too_many if trainer.is_global_zero else ToldElsewhereError(str(too_many)) from None
    first = next((rank for rank, (_, words) in enumerate(told) if words), None)
    if first is None:
        return
    message = f"{told[first][1]} (read by process {first} of {trainer.world_size})"
    if trainer.is_global_zero:
        raise (RimeError if isinstance(error, RimeError) and not isinstance(error, DataError) else DataError)(
            message
        ) from error
    raise ToldElsewhereError(message) from error
