"""An error of one process ends the reading of all, with its message; what one finds broken counts for all.

tests/stages has real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.together import in_step
from rime_pl.errors import DataError, ToldElsewhereError

FIRST, SECOND = "the first batch", "the second batch"


def batches(error: Exception | None) -> Iterator[Any]:
    yield Fetched(FIRST)  # type: ignore[arg-type]
    if error:
        raise error
    yield Fetched(SECOND)  # type: ignore[arg-type]


def read(error: Exception | None, trainer: Any) -> Iterator[Any]:
    return in_step(batches(error), BrokenSamples("train", 0.0), 10, trainer)


def process(rank: int, said: list[str]) -> Any:
    """One of several processes, each of which says what ``said`` holds for it ("" for nothing)."""
    answers = iter([False, any(said), False])  # the first batch is good everywhere
    strategy = SimpleNamespace(
        reduce_boolean_decision=lambda decision, all: next(answers),
        broadcast=lambda mine, src: ({}, said[src]),
    )
    return SimpleNamespace(world_size=2, strategy=strategy, is_global_zero=rank == 0)


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(world_size=1)])
def test_alone_an_error_stays_what_it_is(trainer: Any) -> None:
    assert list(read(None, trainer)) == [FIRST, SECOND]
    with pytest.raises(OSError, match="the cable"):
        list(read(OSError("the cable"), trainer))


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_with_the_message_of_the_one_that_failed(rank: int, broken: int) -> None:
    said = ["", ""]
    said[broken] = "picture 7 is cut off"
    trainer = process(rank, said)
    error = DataError(said[broken]) if rank == broken else None
    reading = read(error, trainer)
    assert next(reading) == FIRST
    kind = ToldElsewhereError if rank else DataError
    with pytest.raises(kind, match=rf"picture 7 is cut off \(read by process {broken} of 2\)"):
        next(reading)


def test_without_an_error_all_go_on() -> None:
    assert list(read(None, process(1, ["", ""]))) == [FIRST, SECOND]


class Meeting:
    """The collectives of two processes, as two threads: both come, and both get what all gave."""

    def __init__(self) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=20), [None, None]

    def strategy(self, rank: int) -> Any:
        def meet(mine: Any) -> list[Any]:
            self.given[rank] = mine
            self.barrier.wait()
            given = list(self.given)
            self.barrier.wait()
            return given

        return SimpleNamespace(
            reduce_boolean_decision=lambda decision, all: any(meet(decision)),
            broadcast=lambda mine, src: meet(mine)[src],
        )


def read_on_two(
    found: list[list[dict[str, str]]], max_share: float
) -> tuple[list[list[str]], list[Exception | None]]:
    """Read batches with these broken samples on two processes; return the names known then, and errors."""
    meeting, known, errors = Meeting(), [[], []], [None, None]

    def process(rank: int) -> None:
        samples = BrokenSamples("train", max_share)
        trainer = SimpleNamespace(world_size=2, strategy=meeting.strategy(rank), is_global_zero=rank == 0)
        fetched = (Fetched(FIRST, broken) for broken in found[rank])  # type: ignore[arg-type]
        try:
            assert len(list(in_step(fetched, samples, 100, trainer))) == len(found[rank])  # type: ignore[arg-type]
        except Exception as error:
            errors[rank] = error
        known[rank] = sorted(samples.found)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return known, errors


def test_the_share_of_broken_samples_is_that_of_all_processes() -> None:
    """Each finds two of a hundred, one of them both: three are allowed by 0.03, and not by 0.02."""
    found = [[{"a": "cut off"}, {}, {"b": "cut off"}], [{}, {}, {"b": "cut off", "c": "empty"}]]
    known, errors = read_on_two(found, max_share=0.03)
    assert known == [["a", "b", "c"]] * 2 and errors == [None, None]
    known, errors = read_on_two(found, max_share=0.02)
    first, second = errors
    assert isinstance(first, DataError) and isinstance(second, ToldElsewhereError)
    assert "3 of 100 samples in train are broken:\n  cut off\n  cut off\n  empty" in str(first)
