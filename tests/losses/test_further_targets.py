"""Hard negatives, several right answers, hardness and the margin, against loops from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rime_pl.losses.contrastive import Further, Weighting, info_nce, mean_negatives
from tests.losses.test_contrastive import unit


def naive(
    queries: Tensor, targets: Tensor, tau: float, contents: Tensor, further: Further, weighting: Weighting
) -> float:
    """The loss as loops over queries, right answers and negatives."""
    pairs, count = len(queries), len(further.owner)
    candidates = torch.cat([targets, further.embeddings])
    content = [*contents[:, 1].tolist(), *further.content.tolist()]
    right = [
        [i, *(pairs + k for k in range(count) if further.positive[k] and further.owner[k] == i)]
        for i in range(pairs)
    ]

    def same(i: int, j: int) -> bool:
        return i != j and bool((contents[i] == contents[j]).any())

    def left_out(i: int, column: int) -> bool:
        answers = {content[one] for one in right[i]}
        return (column < pairs and same(i, column)) or content[column] in answers

    def loss(cosines: dict[int, float], mine: list[int], nothing: set[int]) -> float:
        lowest, total = min(cosines[one] for one in mine), 0.0
        negatives = [
            cosine
            for column, cosine in cosines.items()
            if column not in mine
            and column not in nothing
            and (
                weighting.false_negative_margin is None or cosine <= lowest + weighting.false_negative_margin
            )
        ]
        below = sum(math.exp(cosine / tau + weighting.hardness * cosine) for cosine in negatives)
        for one in mine:
            up = math.exp(cosines[one] / tau)
            total -= math.log(up / (up + below))
        return total

    total = 0.0
    for i in range(pairs):
        cosines = {c: float(queries[i] @ candidates[c]) for c in range(pairs + count)}
        nothing = {c for c in cosines if c not in right[i] and left_out(i, c)}
        total += loss(cosines, right[i], nothing) / len(right[i])
        for answer in right[i]:
            cosines = {j: float(candidates[answer] @ queries[j]) for j in range(pairs)}
            nothing = {
                j
                for j in range(pairs)
                if j != i
                and (
                    same(i, j)
                    or content[answer] in {content[one] for one in right[j]}
                    or content[answer] == content[j]
                )
            }
            total += loss(cosines, [i], nothing) / len(right[i])
    return 0.5 * total / pairs


def some(
    pairs: int, count: int, seed: int, positives: bool, contents: int = 50
) -> tuple[Tensor, Tensor, Tensor, Further]:
    generator = torch.Generator().manual_seed(seed)
    queries, targets, more = (
        unit(n, 5, seed=seed + k, dtype=torch.float64) for k, n in enumerate((pairs, pairs, count))
    )
    ids = torch.randint(contents, (pairs, 2), generator=generator)
    ids[:, 0] += 1000  # a query has no content of a target here
    positive = torch.rand(count, generator=generator) < (0.4 if positives else 0.0)
    further = Further(
        more,
        torch.randint(pairs, (count,), generator=generator),
        torch.randint(contents, (count,), generator=generator),
        positive,
    )
    return queries, targets, ids, further


CASES = [
    (5, 7, False, Weighting()),
    (5, 7, True, Weighting()),
    (4, 9, True, Weighting(hardness=2.0)),
    (6, 5, True, Weighting(false_negative_margin=0.1)),
    (6, 8, True, Weighting(hardness=1.0, false_negative_margin=-0.2)),
]


@pytest.mark.parametrize(("pairs", "count", "positives", "weighting"), CASES)
@pytest.mark.parametrize("contents", [50, 4])  # few false negatives, and many
def test_it_equals_the_naive_loop(
    pairs: int, count: int, positives: bool, weighting: Weighting, contents: int
) -> None:
    for seed in range(8):
        queries, targets, ids, further = some(pairs, count, seed, positives, contents)
        expected = naive(queries, targets, 0.3, ids, further, weighting)
        got = info_nce(queries, targets, 0.3, ids, further, weighting)
        assert got.item() == pytest.approx(expected, rel=1e-9, abs=1e-12), seed


def test_without_them_nothing_changes() -> None:
    queries, targets, ids, further = some(5, 0, 0, False)
    assert info_nce(queries, targets, 0.1, ids, further).equal(info_nce(queries, targets, 0.1, ids))


@pytest.mark.parametrize("block_size", [1, 13, 40])
def test_blocks_change_neither_loss_nor_gradients(block_size: int) -> None:
    found = []
    for size in (10_000, block_size):
        queries, targets, ids, further = some(7, 6, 3, True, 6)
        leaves = [part.requires_grad_() for part in (queries, targets, further.embeddings)]
        loss = info_nce(queries, targets, 0.1, ids, further, Weighting(1.0, 0.3), size)
        found.append(torch.cat([part.flatten() for part in (loss, *torch.autograd.grad(loss, leaves))]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_gradients_are_right_in_float64() -> None:
    queries, targets, ids, further = some(4, 5, 1, True, 9)
    leaves = tuple(part.requires_grad_() for part in (queries, targets, further.embeddings))

    def loss(q: Tensor, t: Tensor, f: Tensor) -> Tensor:
        return info_nce(q, t, 0.3, ids, Further(f, further.owner, further.content, further.positive))

    assert torch.autograd.gradcheck(loss, leaves)


def test_hardness_gives_hard_negatives_a_larger_gradient() -> None:
    """The weight itself has no gradient: a finite difference of the loss would see it."""
    queries = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    targets = queries.clone()
    near, far = torch.tensor([0.8, 0.6]), torch.tensor([-1.0, 0.0])
    shares = []
    for hardness in (0.0, 5.0):
        more = torch.stack([near, far]).double().requires_grad_()
        further = Further(
            more, torch.zeros(2, dtype=torch.int64), torch.tensor([5, 6]), torch.zeros(2, dtype=torch.bool)
        )
        loss = info_nce(queries, targets, 1.0, torch.tensor([[1, 2]]), further, Weighting(hardness))
        loss.backward()
        assert more.grad is not None
        shares.append(float(more.grad[0].norm() / more.grad[1].norm()))
    assert shares[1] / shares[0] == pytest.approx(math.exp(5.0 * 1.8), rel=1e-6)


def test_what_is_nearer_than_the_right_answer_by_more_than_the_margin_gets_no_gradient() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    targets = torch.tensor([[0.6, 0.8]])
    more = torch.tensor([[1.0, 0.0], [0.65, 0.7599]], requires_grad=True)
    further = Further(
        more, torch.zeros(2, dtype=torch.int64), torch.tensor([5, 6]), torch.zeros(2, dtype=torch.bool)
    )
    info_nce(queries, targets, 0.1, torch.tensor([[1, 2]]), further, Weighting(0.0, 0.1)).backward()
    assert more.grad is not None and more.grad[0].norm() == 0 and more.grad[1].norm() > 0


@pytest.mark.parametrize("seed", range(5))
def test_mean_negatives_counts_them(seed: int) -> None:
    _, _, ids, further = some(6, 8, seed, True, 5)
    count = 0
    for i, column in itertools.product(range(6), range(14)):
        right = column == i or (
            column >= 6 and bool(further.positive[column - 6]) and further.owner[column - 6] == i
        )
        answers = {
            int(ids[i, 1]),
            *(int(further.content[k]) for k in range(8) if further.positive[k] and further.owner[k] == i),
        }
        content = int(ids[column, 1]) if column < 6 else int(further.content[column - 6])
        same_query = column < 6 and column != i and ids[column, 0] == ids[i, 0]
        count += not right and content not in answers and not same_query
    assert mean_negatives(ids, further) == pytest.approx(count / 6)


def test_they_need_contents() -> None:
    queries, targets, _, further = some(3, 2, 0, False)
    with pytest.raises(ValueError, match="need the content ids"):
        info_nce(queries, targets, 0.1, None, further)
