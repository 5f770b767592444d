"""Rewards: closed forms, naive loops, and that a rewrite nearer to its positive earns more."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.losses.rewards import Anchors, anchored_reward, rank_margin_reward, total_reward


def example(seed: int, positives: int = 1) -> tuple[Tensor, Anchors]:
    """5 rewrites, 12 anchors; some anchors are neither positive nor negative."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, anchors = (
        F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1) for n in (5, 12)
    )
    order = torch.rand(5, 12, generator=generator).argsort(dim=1)
    positive = order < positives
    return embeddings, Anchors(anchors, positive, (order >= positives) & (order < 10))


def listed(embeddings: Tensor, anchors: Anchors, row: int) -> tuple[list[float], list[float]]:
    scores = (anchors.embeddings @ embeddings[row]).tolist()
    return (
        [s for s, p in zip(scores, anchors.positives[row].tolist(), strict=True) if p],
        [s for s, n in zip(scores, anchors.negatives[row].tolist(), strict=True) if n],
    )


@pytest.mark.parametrize("positives", [1, 3])
def test_equal_the_naive_loops(positives: int) -> None:
    for seed in range(5):
        embeddings, anchors = example(seed, positives)
        anchored = anchored_reward(embeddings, anchors, 0.05)
        ranked = rank_margin_reward(embeddings, anchors)
        for row in range(5):
            good, bad = listed(embeddings, anchors, row)
            hit = sum(math.exp(s / 0.05) for s in good)
            everything = hit + sum(math.exp(s / 0.05) for s in bad)
            chance = math.log(len(good) / (len(good) + len(bad)))
            assert anchored[row].item() == pytest.approx(math.log(hit / everything) - chance, abs=1e-9)
            first = sorted([*good, *bad], reverse=True)[: len(good)]
            share = sum(s in first for s in good) / len(good)
            gap = sum(good) / len(good) - sum(bad) / len(bad)
            assert ranked[row].item() == pytest.approx(share * gap, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_the_reward_rises_with_the_similarity_to_the_positive(temperature: float) -> None:
    """The similarity to the positive rises step by step, those to the negatives stay the same."""
    for seed in range(20):
        negatives = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 3
        values = []
        for similarity in torch.linspace(-1, 1, 21, dtype=torch.float64).tolist():
            # a one-dimensional item of length 1: the score of an anchor is the anchor itself
            anchors = torch.cat([torch.tensor([similarity], dtype=torch.float64), negatives])[:, None]
            positive = torch.arange(8) == 0
            given = Anchors(anchors, positive[None], ~positive[None])
            values.append(anchored_reward(torch.ones(1, 1, dtype=torch.float64), given, temperature).item())
        assert values == sorted(values)
        assert values[0] < values[10] or temperature == 0.01  # at 0.01 the ends are saturated
        assert values[0] < values[-1]


def test_a_duplicate_of_the_positive_changes_nothing() -> None:
    embeddings, anchors = example(0)
    before = anchored_reward(embeddings, anchors, 0.05)
    left_out = ~(anchors.positives | anchors.negatives)
    assert left_out.any()
    moved = anchors.embeddings.clone()
    row = 2
    moved[left_out[row]] = embeddings[row]  # as near as possible, but not a negative of this row
    after = anchored_reward(embeddings, Anchors(moved, anchors.positives, anchors.negatives), 0.05)
    assert after[row].item() == pytest.approx(before[row].item())


def test_chance_is_zero() -> None:
    one = Anchors(
        torch.zeros(4, 3), torch.tensor([[True, False, False, False]]), torch.tensor([[False] + [True] * 3])
    )
    assert anchored_reward(torch.ones(1, 3), one, 0.05).item() == pytest.approx(0.0, abs=1e-6)


def test_parts_of_the_reward() -> None:
    got = total_reward(
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([True, False, True]),
        torch.tensor([10, 10, 30]),
        weight_format=0.5,
        weight_embedding=2.0,
        weight_length=0.1,
        free_length=20,
    )
    torch.testing.assert_close(got, torch.tensor([2.5, 0.0, 2.45]))


def test_a_missing_positive_or_negative_is_an_error_and_not_nan() -> None:
    """With one item and no table of anchors, UME-R1's reward would take the mean of an empty set."""
    only_positive = Anchors(torch.ones(1, 1), torch.tensor([[True]]), torch.tensor([[False]]))
    with pytest.raises(ValueError, match="must have a negative"):
        rank_margin_reward(torch.ones(1, 1), only_positive)
    no_positive = Anchors(torch.ones(1, 1), torch.tensor([[False]]), torch.tensor([[True]]))
    with pytest.raises(ValueError, match="must have a positive"):
        anchored_reward(torch.ones(1, 1), no_positive, 0.1)
    with pytest.raises(ValueError, match=r"temperature must be greater than 0 .* but is 0"):
        anchored_reward(torch.ones(1, 1), only_positive, 0)
