"""The rules of mining against loops over single numbers, and the ranking in blocks against a full sort."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from rime_pl.datamodules.mining.nearest import _keys, nearest
from rime_pl.datamodules.mining.rules import (
    ABSOLUTE,
    CONTENT,
    LEFT,
    MAX_SCORE,
    NOT_LOOKED_AT,
    PICTURES,
    RANK,
    RELATIVE,
    TEXT,
    Rules,
    judge,
    lowest_scores,
)
from rime_pl.errors import RimeError


def judged_by_loops(scores: list[float], identical: list[int], lowest: float, rules: Rules) -> list[int]:
    """One query, one candidate after the other, in plain Python."""
    verdicts, others, left = [], 0, 0
    for score, same in zip(scores, identical, strict=True):
        if others >= rules.last_rank:
            verdicts.append(NOT_LOOKED_AT)
            continue
        if same:
            verdicts.append(same)
            continue
        others += 1
        if rules.absolute_margin is not None and score + rules.absolute_margin > lowest:
            verdicts.append(ABSOLUTE)
        elif rules.relative_margin is not None and score > lowest - abs(lowest) * rules.relative_margin:
            verdicts.append(RELATIVE)
        elif rules.max_score is not None and score > rules.max_score:
            verdicts.append(MAX_SCORE)
        else:
            left += 1
            verdicts.append(RANK if left <= rules.range_min else LEFT)
    return verdicts


def some_rules(rng: random.Random) -> Rules:
    number = rng.randint(1, 4)
    range_min = rng.randint(0, 3)
    return Rules(
        num_negatives=number,
        range_min=range_min,
        range_max=rng.choice([None, range_min + number + rng.randint(0, 6)]),
        absolute_margin=rng.choice([None, 0.0, 0.125, 0.5]),
        relative_margin=rng.choice([None, 0.0, 0.25, 1.0, 1.5]),
        max_score=rng.choice([None, 0.25, -0.25]),
        sampling=rng.choice(["top", "random"]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_verdicts_equal_loops(seed: int) -> None:
    """Scores of both signs, on a grid so that they tie with each other and with the limits."""
    rng = random.Random(seed)
    rules, queries, k = some_rules(rng), rng.randint(1, 6), rng.randint(1, 30)
    scores = [sorted((rng.randint(-16, 16) / 16 for _ in range(k)), reverse=True) for _ in range(queries)]
    identical = [[rng.choice([0, 0, 0, CONTENT, TEXT, PICTURES]) for _ in range(k)] for _ in range(queries)]
    lowest = [rng.randint(-16, 16) / 16 for _ in range(queries)]
    found = judge(
        torch.tensor(scores), torch.tensor(identical, dtype=torch.int8), torch.tensor(lowest), rules
    )
    expected = [judged_by_loops(*row, rules) for row in zip(scores, identical, lowest, strict=True)]
    assert found.tolist() == expected


def judged(scores: list[float], lowest: float, **limits: Any) -> list[int]:
    rules = Rules(**{"num_negatives": 1, "relative_margin": None, "range_max": len(scores), **limits})
    same = torch.zeros(1, len(scores), dtype=torch.int8)
    return judge(torch.tensor([scores]), same, torch.tensor([lowest]), rules)[0].tolist()


def test_the_relative_margin_lowers_the_limit_of_a_negative_score_too() -> None:
    assert judged([0.49, 0.48, 0.47], 0.5, relative_margin=0.05) == [RELATIVE, RELATIVE, LEFT]
    # -0.5 * (1 - 0.05) would be -0.475, and would leave candidates nearer than the right answer itself
    assert judged([-0.48, -0.5, -0.52, -0.53], -0.5, relative_margin=0.05) == [RELATIVE] * 3 + [LEFT]
    assert judged([0.25, 0.0, -0.25], 0.0, relative_margin=0.05) == [RELATIVE, LEFT, LEFT], "no room at 0"


def test_a_score_at_the_limit_is_left_and_infinity_drops_nothing() -> None:
    assert judged([0.5, 0.25], 0.5, absolute_margin=0.25) == [ABSOLUTE, LEFT]
    assert judged([0.5, 0.25], 0.5, max_score=0.25) == [MAX_SCORE, LEFT]
    assert judged([0.5], 0.5, relative_margin=0.0) == [LEFT]


def test_fewer_candidates_than_negatives() -> None:
    assert judged([], 0.5, range_max=5, num_negatives=3) == []
    assert judged([0.5, 0.1], 0.9, range_min=2, range_max=9, num_negatives=3) == [RANK, RANK]


@pytest.mark.parametrize("seed", range(20))
def test_lowest_scores_equal_loops_with_uneven_numbers_of_answers(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [rng.randint(0, 5) for _ in range(rng.randint(1, 7))]
    owner = [query for query, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(owner)
    queries = torch.randint(-4, 5, (len(counts), 3), generator=generator) / 4
    answers = torch.randint(-4, 5, (len(owner), 3), generator=generator) / 4
    found = lowest_scores(queries, answers, torch.tensor(owner, dtype=torch.int64))
    for query in range(len(counts)):
        scores = [
            sum(a * b for a, b in zip(queries[query].tolist(), answers[n].tolist(), strict=True))
            for n, own in enumerate(owner)
            if own == query
        ]
        assert found[query].item() == (min(scores) if scores else math.inf)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("k", [1, 5, 23, 40])
def test_blocks_give_the_order_of_a_full_sort_ties_too(block: int, k: int) -> None:
    """Numbers on a grid: dot products are exact, and most of them tie."""
    generator = torch.Generator().manual_seed(k)
    queries = torch.randint(-2, 3, (6, 2), generator=generator) / 2
    candidates = torch.randint(-2, 3, (23, 2), generator=generator) / 2
    scores, rows = nearest(queries, candidates, k, block=block)
    for query in range(6):
        dots = [float(queries[query].double() @ one.double()) for one in candidates]
        expected = sorted(range(23), key=lambda row: (-dots[row], row))[:k]
        assert rows[query].tolist() == expected
        assert scores[query].tolist() == [dots[row] for row in expected]


def test_both_zeros_are_one_score() -> None:
    keys = _keys(torch.tensor([[-0.0, 0.0, -1e-45]]), 0)[0].tolist()
    assert keys == sorted(keys, reverse=True), "of -0.0 and 0.0 the first one is nearer"


def test_the_scores_are_those_of_the_product_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(5, 8, generator=generator), torch.randn(50, 8, generator=generator)
    scores, rows = nearest(queries, candidates, 50, block=50)
    expected: Tensor = (queries @ candidates.T).sort(dim=1, descending=True)[0]
    assert torch.equal(scores, expected) and rows.sort(dim=1)[0].tolist() == [list(range(50))] * 5


@pytest.mark.parametrize("seed", range(10))
def test_one_right_answer_each_gives_what_sentence_transformers_documents(seed: int) -> None:
    """``mine_hard_negatives`` in closed form: of the nearest ``range_max`` candidates, the right answer not
    counted, those within the margins go, then the first ``range_min``; the next ones are taken."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(12, 40, generator=generator) * 2 - 1
    positive = torch.randint(0, 40, (12,), generator=generator)
    absolute, relative, most = 0.1, 0.2, 0.6
    rules = Rules(3, 2, 15, absolute, relative, most)
    order = scores.argsort(dim=1, descending=True)
    lowest = scores.gather(1, positive.unsqueeze(1)).squeeze(1)
    found = judge(scores.gather(1, order), (order == positive.unsqueeze(1)).to(torch.int8), lowest, rules)
    for query in range(12):
        low = lowest[query].double()
        pool = [row for row in order[query].tolist() if row != positive[query]][:15]
        limit = min(low - absolute, low - low.abs() * relative, torch.tensor(most, dtype=torch.float64))
        kept = [row for row in pool if scores[query, row].double() <= limit][2:][:3]
        mine = order[query][(found[query] == LEFT).nonzero()[:3, 0]].tolist()
        assert mine == kept


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_negatives": 0}, "--rules.num_negatives must be 1 or more, but is 0"),
        ({"range_min": -1}, "--rules.range_min must be 0 or more"),
        ({"absolute_margin": -0.1}, "--rules.absolute_margin must be 0 or more"),
        ({"relative_margin": float("nan")}, "--rules.relative_margin must be 0 or more, but is nan"),
        (
            {"range_min": 3, "range_max": 6},
            "--rules.range_max must be at least range_min plus num_negatives, 7, but is 6",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RimeError, match=says):
        Rules(**settings)


def test_how_many_candidates_are_looked_at() -> None:
    assert Rules(num_negatives=4, range_min=2).last_rank == 42
    assert Rules(num_negatives=4, relative_margin=None).last_rank == 4, "nothing can drop one"
    assert Rules(num_negatives=4, relative_margin=None, sampling="random").last_rank == 40
    assert Rules(num_negatives=4, relative_margin=None, max_score=0.5).last_rank == 40
    assert Rules(range_max=9).last_rank == 9
