"""All processes of a distributed run stop together when one of them cannot read its part of a batch.

Used by loading.py. Otherwise the others would wait for that process in the next collective, until a time-out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import lightning as L

from rime_pl.errors import DataError, RimeError, ToldElsewhereError

T = TypeVar("T")


def in_step(batches: Iterator[T], trainer: L.Trainer | None) -> Iterator[T]:
    """Yield what ``batches`` yields, as many on each process; an error of one process ends all.

    Raises:
        RimeError: On the first process, with the message of the one that failed; a DataError if it was one.
        ToldElsewhereError: On the other processes.
    """
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except Exception as failed:
            error = failed
        _agree(error, trainer)
        if batch is None:
            return
        yield batch


def _agree(error: Exception | None, trainer: L.Trainer | None) -> None:
    if trainer is None or trainer.world_size == 1:
        if error is not None:
            raise error
        return
    strategy = trainer.strategy
    if not strategy.reduce_boolean_decision(error is not None, all=False):
        return
    said = "" if error is None else str(error) or type(error).__name__
    told = [strategy.broadcast(said, src=rank) for rank in range(trainer.world_size)]
    first = next(rank for rank, words in enumerate(told) if words)
    message = f"{told[first]} (read by process {first} of {trainer.world_size})"
    if trainer.is_global_zero:
        raise (RimeError if isinstance(error, RimeError) and not isinstance(error, DataError) else DataError)(
            message
        ) from error
    raise ToldElsewhereError(message) from error
