"""The nearest items, block by block, against a sort of all scores."""

from __future__ import annotations

import pytest
import torch

from rime_pl.metrics.top_k import top_k


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("k", [1, 4, 60])
def test_blocks_change_nothing_and_the_first_of_equals_wins(size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gallery = torch.randint(-2, 3, (50, 4), generator=generator).double()  # whole numbers: many ties
    queries = torch.randint(-2, 3, (9, 4), generator=generator).double()
    scores, rows = top_k(queries, gallery.split(size), k)
    whole = (queries @ gallery.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, whole.values[:, :k]) and torch.equal(rows, whole.indices[:, :k])


def test_the_blocks_take_the_type_of_the_queries_and_may_be_none() -> None:
    queries = torch.eye(2)
    scores, rows = top_k(queries, [torch.eye(2, dtype=torch.float16)], 1)
    assert scores.dtype == torch.float32 and rows.tolist() == [[0], [1]]
    assert top_k(queries, [], 3)[1].shape == (2, 0)
    with pytest.raises(ValueError, match="k must be 1 or more, but is 0"):
        top_k(queries, [], 0)
