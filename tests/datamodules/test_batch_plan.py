"""The order of the data depends on seed and position, and on nothing else."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rime_pl.datamodules.batch_plan import BatchPlan, local_batch_size, rank_batches, rank_slice
from rime_pl.errors import RimeError

DATASETS = ["a"] * 103 + ["b"] * 41 + ["c"] * 16
CONTENTS = [f"content {n % 30}" for n in range(len(DATASETS))]


def plan(seed: int = 0, batch_size: int = 8) -> BatchPlan:
    return BatchPlan(DATASETS, CONTENTS, batch_size, seed)


def test_a_pass_holds_every_full_batch_of_every_task_once() -> None:
    batches = [plan().batch(position) for position in range(len(plan()))]
    assert Counter(batch.dataset for batch in batches) == {"a": 103 // 8, "b": 41 // 8, "c": 16 // 8}
    used = [index for batch in batches for index in batch.indices]
    assert len(used) == len(set(used))
    for batch in batches:
        assert len(batch.indices) == 8
        assert {DATASETS[index] for index in batch.indices} == {batch.dataset}


def test_any_position_can_be_read_first() -> None:
    whole = [plan().batch(position) for position in range(3 * len(plan()))]
    order = list(range(len(whole)))
    random.Random(0).shuffle(order)
    other = plan()
    assert {position: other.batch(position) for position in order} == dict(enumerate(whole))


def test_passes_and_seeds_differ() -> None:
    length = len(plan())
    first = [plan().batch(n).indices for n in range(length)]
    assert first != [plan().batch(n).indices for n in range(length, 2 * length)]
    assert first != [plan(seed=1).batch(n).indices for n in range(length)]


def test_what_one_pass_drops_comes_in_another() -> None:
    seen = {index for n in range(5 * len(plan())) for index in plan().batch(n).indices}
    assert seen == set(range(len(DATASETS)))


def test_no_content_twice_in_a_batch_as_long_as_there_are_enough() -> None:
    shared = BatchPlan(DATASETS, CONTENTS, 8, seed=0)
    for position in range(4 * len(shared)):
        contents = [CONTENTS[index] for index in shared.batch(position).indices]
        assert len(set(contents)) == 8, position


def test_duplicates_fill_a_batch_when_they_cannot_be_avoided() -> None:
    few = BatchPlan(["a"] * 40, [f"content {n % 3}" for n in range(40)], 8, seed=0)
    for position in range(len(few)):
        indices = few.batch(position).indices
        assert len(set(indices)) == 8
        assert len({n % 3 for n in indices}) == 3


def test_many_samples_of_one_content_are_planned_fast() -> None:
    few = BatchPlan(["a"] * 20000, ["the same"] * 20000, 64, seed=0)
    assert len(few.batch(0).indices) == 64


def test_task_smaller_than_a_batch_is_named() -> None:
    with pytest.raises(RimeError, match=r"batch_size must be at most 16, but is 17: .* task 'c' has only 16"):
        plan(batch_size=17)
    with pytest.raises(RimeError, match=r"data.batch_size must be at least 1, but is 0"):
        plan(batch_size=0)


@pytest.mark.parametrize(("batch_size", "processes", "multiple"), [(7, 2, 8), (1, 4, 4), (0, 3, 3)])
def test_a_batch_that_processes_cannot_share_is_refused(
    batch_size: int, processes: int, multiple: int
) -> None:
    with pytest.raises(RimeError, match=rf"is {batch_size} with {processes} processes. .* to {multiple},"):
        local_batch_size(batch_size, processes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_cut_a_batch_into_contiguous_parts(world_size: int) -> None:
    parts = [rank_slice(range(8), rank, world_size) for rank in range(world_size)]
    assert [index for part in parts for index in part] == list(range(8))
    assert {len(part) for part in parts} == {8 // world_size}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7, 12])
def test_evaluation_ranks_share_samples_and_stay_in_step(world_size: int, count: int) -> None:
    ranks = [rank_batches(range(100, 100 + count), 2, rank, world_size) for rank in range(world_size)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    seen = Counter(index for batches in ranks for batch in batches for index in batch)
    assert set(seen) == set(range(100, 100 + count))
    assert seen.total() - count < world_size
