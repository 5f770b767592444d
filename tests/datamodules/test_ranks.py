"""Every process gets its part of a batch, and all parts together are the batch."""

from __future__ import annotations

from collections import Counter

import pytest

from rime_pl.datamodules.ranks import local_batch_size, rank_batches, rank_slice
from rime_pl.errors import RimeError


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
