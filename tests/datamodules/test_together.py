"""An error of one process ends the reading of all, with its message; tests/stages has real processes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.datamodules.together import in_step
from rime_pl.errors import DataError, ToldElsewhereError


def batches(error: Exception | None) -> Iterator[int]:
    yield 1
    if error:
        raise error
    yield 2


def process(rank: int, said: list[str]) -> Any:
    """One of several processes, each of which says what ``said`` holds for it ("" for nothing)."""
    answers = iter([False, any(said), False])  # the first batch is good everywhere
    strategy = SimpleNamespace(
        reduce_boolean_decision=lambda decision, all: next(answers), broadcast=lambda mine, src: said[src]
    )
    return SimpleNamespace(world_size=2, strategy=strategy, is_global_zero=rank == 0)


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(world_size=1)])
def test_alone_an_error_stays_what_it_is(trainer: Any) -> None:
    assert list(in_step(batches(None), trainer)) == [1, 2]
    with pytest.raises(OSError, match="the cable"):
        list(in_step(batches(OSError("the cable")), trainer))


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_with_the_message_of_the_one_that_failed(rank: int, broken: int) -> None:
    said = ["", ""]
    said[broken] = "picture 7 is cut off"
    trainer = process(rank, said)
    error = DataError(said[broken]) if rank == broken else None
    reading = in_step(batches(error), trainer)
    assert next(reading) == 1
    kind = ToldElsewhereError if rank else DataError
    with pytest.raises(kind, match=rf"picture 7 is cut off \(read by process {broken} of 2\)"):
        next(reading)


def test_without_an_error_all_go_on() -> None:
    assert list(in_step(batches(None), process(1, ["", ""]))) == [1, 2]
