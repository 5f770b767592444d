"""Micro-batches: each row once, limits kept, similar lengths together; and rows selected from a batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from rime_pl.backbone.mllm import Backbone
from rime_pl.scaling.micro_batches import micro_batches, split_to
from rime_pl.types import Batch, Rows


def random_lengths(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 60, (rows,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_tokens", [1, 80, 400, 10_000])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_a_token_budget_is_kept_and_no_row_is_lost(rows: int, num_tokens: int) -> None:
    lengths = random_lengths(rows, seed=rows)
    groups = micro_batches(lengths, None, num_tokens)
    assert sorted(torch.cat(groups).tolist()) == list(range(rows))
    for group in groups:
        assert lengths[group].sum() <= num_tokens or len(group) == 1
    assert lengths[torch.cat(groups)].equal(lengths.sort(descending=True).values)
    for group, later in itertools.pairwise(groups):  # no group could take the next row, too
        assert lengths[group].sum() + lengths[later[0]] > num_tokens


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (8, 4), (9, 4), (5, 1), (5, 99)])
def test_a_number_of_rows(rows: int, size: int) -> None:
    groups = micro_batches(random_lengths(rows, seed=0), size, None)
    assert [len(group) for group in groups[:-1]] == [size] * ((rows - 1) // size)
    assert sum(map(len, groups)) == rows


@pytest.mark.parametrize("count", range(3, 12))
def test_groups_are_split_until_there_are_enough(count: int) -> None:
    groups = micro_batches(random_lengths(11, seed=3), 4, None)
    more = split_to(groups, count)
    assert len(more) == count and min(map(len, more)) >= 1
    assert torch.cat(more).tolist() == torch.cat(groups).tolist()


def test_fewer_rows_than_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows cannot be in 3 groups"):
        split_to([torch.tensor([1, 0])], 3)


def test_selected_rows_lose_the_padding_that_none_of_them_needs(batch: Batch) -> None:
    lengths = batch.query.lengths()
    assert lengths.unique(dim=0).shape[0] > 1
    for rows in (torch.tensor([0]), torch.tensor([1, 0]), torch.tensor([4, 2, 5])):
        part = batch.query.select(rows)
        widths = [part.prompts.input_ids.shape[1], part.completions.ids.shape[1]]
        assert widths == lengths[rows].max(0).values.tolist() and part.lengths().equal(lengths[rows])
        for number, row in enumerate(rows.tolist()):
            assert tokens(part, number) == tokens(batch.query, row)


def tokens(rows: Rows, row: int) -> list[int]:
    """Prompt and completion of a row without padding."""
    prompt = rows.prompts.input_ids[row][rows.prompts.attention_mask[row].bool()]
    return [*prompt.tolist(), *rows.completions.ids[row][rows.completions.mask[row].bool()].tolist()]


@torch.no_grad()
def test_selected_rows_are_encoded_as_in_the_batch(shared_backbone: Backbone, batch: Batch) -> None:
    whole = shared_backbone(batch.query.prompts, batch.query.completions)
    for rows in (torch.tensor([0, 2]), torch.tensor([5, 0, 3])):  # only texts; pictures and a text
        part = batch.query.select(rows)
        out = shared_backbone(part.prompts, part.completions)
        torch.testing.assert_close(out.disc, whole.disc[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.gen, whole.gen[rows], atol=1e-5, rtol=0)
