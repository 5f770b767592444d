"""An error of one process ends the reading of all, with its message; what one finds broken counts for all.

Two threads stand in for two processes; tests/stages has real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.together import in_step
from rime_pl.errors import DataError, RimeError, ToldElsewhereError

FIRST, SECOND = "the first batch", "the second batch"


def batches(error: Exception | None) -> Iterator[Any]:
    yield Fetched(FIRST)  # type: ignore[arg-type]
    if error:
        raise error
    yield Fetched(SECOND)  # type: ignore[arg-type]


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(world_size=1)])
def test_alone_an_error_stays_what_it_is(trainer: Any) -> None:
    def read(error: Exception | None) -> list[Any]:
        return [*in_step(batches(error), BrokenSamples("train", 0.0), 10, trainer)]

    assert read(None) == [FIRST, SECOND]
    with pytest.raises(OSError, match="the cable"):
        read(OSError("the cable"))


class Meeting:
    """The collectives of two processes: both come, and both get what all gave."""

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


class Process(threading.Thread):
    """One of two processes that read in step."""

    def __init__(self, rank: int, meeting: Meeting, reading: Iterator[Any], max_share: float) -> None:
        super().__init__()
        self.reading, self.samples = reading, BrokenSamples("train", max_share)
        self.trainer: Any = SimpleNamespace(
            world_size=2, strategy=meeting.strategy(rank), is_global_zero=rank == 0
        )
        self.read: list[Any] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.read.extend(in_step(self.reading, self.samples, 100, self.trainer))
        except Exception as error:
            self.error = error


def read_on_two(readings: list[Iterator[Any]], max_share: float = 0.0) -> list[Process]:
    """Return two processes after they have read."""
    meeting = Meeting()
    processes = [Process(rank, meeting, reading, max_share) for rank, reading in enumerate(readings)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return processes


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("error", "kind"),
    [(DataError("picture 7 is cut off"), DataError), (RimeError("picture 7 is cut off"), RimeError)],
)
def test_all_stop_with_the_message_of_the_one_that_failed(
    broken: int, error: RimeError, kind: type[RimeError]
) -> None:
    first, second = read_on_two([batches(error if rank == broken else None) for rank in range(2)])
    assert first.read == second.read == [FIRST]
    message = f"picture 7 is cut off (read by process {broken} of 2)"
    assert str(first.error) == str(second.error) == message
    assert isinstance(first.error, kind if broken == 0 else DataError)
    assert isinstance(second.error, ToldElsewhereError)


def test_without_an_error_all_go_on() -> None:
    assert [(each.read, each.error) for each in read_on_two([batches(None), batches(None)])] == [
        ([FIRST, SECOND], None)
    ] * 2


def test_the_share_of_broken_samples_is_that_of_all_processes() -> None:
    """Each finds two of a hundred, one of them both: three are allowed by 0.03, and not by 0.02."""
    found = [[{"a": "cut off"}, {}, {"b": "cut off"}], [{}, {}, {"b": "cut off", "c": "empty"}]]

    def read(max_share: float) -> list[Process]:
        fetched = [iter([Fetched(FIRST, broken) for broken in each]) for each in found]  # type: ignore[arg-type]
        return read_on_two(fetched, max_share)

    for each in read(0.03):
        assert sorted(each.samples.found) == ["a", "b", "c"] and each.error is None and len(each.read) == 3
    first, second = read(0.02)
    assert isinstance(first.error, DataError) and isinstance(second.error, ToldElsewhereError)
    assert "3 of 100 samples in train are broken:\n  cut off\n  cut off\n  empty" in str(first.error)
