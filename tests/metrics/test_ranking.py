"""Ranks and scores of several graded answers against a naive loop, pytrec_eval, ties, NaN and chance."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import pytrec_eval
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.metrics import ranking
from rime_pl.metrics.ranking import Ranking, graded_scores, rank_graded
from rime_pl.metrics.retrieval import retrieval_ranks

Labels = list[dict[int, float]]


def naive_order(scores: Tensor, labels: Mapping[int, float], pool: Sequence[int]) -> list[int]:
    """The candidates of one query, best first: of equal ones the wrong before the right, low grades first."""
    return sorted(pool, key=lambda place: (-float(scores[place]), labels.get(place, -1.0)))


def naive_scores(order: Sequence[int], labels: Mapping[int, float], k: int) -> dict[str, float]:
    top = order[:k]
    right = [place in labels for place in top]
    precision, recall = sum(right) / k, sum(right) / len(labels)
    found = {
        "hit": float(any(right)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if any(right) else 0.0,
        "mrr": next((1 / rank for rank, is_right in enumerate(right, 1) if is_right), 0.0),
        "map": sum(sum(right[:rank]) / rank for rank, is_right in enumerate(right, 1) if is_right)
        / min(len(labels), k),
    }
    for name, gain in (("linear", lambda grade: grade), ("exponential", lambda grade: 2**grade - 1)):
        gains = [gain(labels[place]) if place in labels else 0.0 for place in top]
        ideal = sorted(map(gain, labels.values()), reverse=True)[:k]
        dcg, best = (sum(g / math.log2(n + 2) for n, g in enumerate(values)) for values in (gains, ideal))
        found[f"ndcg_{name}"] = dcg / best
    return found


def some_labels(count: int, size: int, most: int, seed: int = 0) -> Labels:
    random = np.random.default_rng(seed)
    return [
        {
            int(place): float(random.integers(1, 4))
            for place in random.choice(size, random.integers(1, most + 1), False)
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", ["floats", "whole numbers", "equal"])
@pytest.mark.parametrize("local", [False, True])
def test_order_and_scores_equal_a_naive_loop(kind: str, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_ROWS", 7)
    monkeypatch.setattr(ranking, "_COLUMNS", 11)
    monkeypatch.setattr(ranking, "_GATHERED", 8 * 6 * 60)
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 6, generator=generator) for n in (30, 80))
    if kind != "floats":  # many candidates have equal scores
        queries, gallery = queries.round(), gallery.round()
    if kind == "equal":
        gallery = torch.ones_like(gallery)
    labels = some_labels(30, 80, 6)
    random = np.random.default_rng(1)
    pools = [list({*one, *random.choice(80, random.integers(1, 40), False).tolist()}) for one in labels]
    found = rank_graded(queries, gallery, labels, pools if local else None, keep=80)
    scores = graded_scores(found)
    table = queries.double() @ gallery.double().T
    for n, one in enumerate(labels):
        pool = pools[n] if local else range(80)
        order = naive_order(table[n], one, pool)
        assert found.sizes[n] == len(pool)
        assert [found.first[n].tolist().index(place) + 1 for place in one] == found.ranks[
            n, : len(one)
        ].tolist()
        assert sorted(p for p in found.first[n].tolist() if p >= 0) == sorted(pool)
        ordered = table[n, found.first[n][found.first[n] >= 0]]
        assert bool((ordered[1:] <= ordered[:-1] + 1e-9).all())
        wrong = [float(table[n, place]) for place in pool if place not in one]
        assert found.ties[n] == sum(
            abs(value - float(table[n, place])) < 1e-9 for value in wrong for place in one
        )
        for k in (1, 5, 10):
            for name, value in naive_scores(order, one, k).items():
                assert float(scores[f"{name}@{k}"][n]) == pytest.approx(value, abs=1e-12), (name, k)


def test_names_stand_in_the_order_of_the_official_files() -> None:
    names = list(graded_scores(rank_graded(torch.ones(1, 2), torch.ones(2, 2), [{0: 1.0}])))
    assert names[:6] == ["hit@1", "hit@5", "hit@10", "ndcg_linear@1", "ndcg_linear@5", "ndcg_linear@10"]
    rest = ["ndcg_exponential", "precision", "recall", "f1", "map", "mrr"]
    assert names[6:] == [f"{name}@{k}" for name in rest for k in (1, 5, 10)]


def test_ranks_and_ndcg_equal_pytrec_eval() -> None:
    generator = torch.Generator().manual_seed(3)
    queries, gallery = (F.normalize(torch.randn(1000, 64, generator=generator), dim=-1) for _ in range(2))
    labels = some_labels(1000, 1000, 4)
    found = rank_graded(queries, gallery, labels)
    scores = graded_scores(found)
    table = (queries.double() @ gallery.double().T).tolist()
    asked = {str(n): {f"{place}": int(grade) for place, grade in one.items()} for n, one in enumerate(labels)}
    run = {str(n): {f"{place}": score for place, score in enumerate(row)} for n, row in enumerate(table)}
    measured = pytrec_eval.RelevanceEvaluator(
        asked, {"recip_rank", "ndcg_cut_10", "map", "recall_10"}
    ).evaluate(run)
    best = found.ranks.masked_fill(found.ranks == 0, 10**6).min(1).values
    for n in range(1000):
        theirs = measured[str(n)]
        assert best[n] == round(1 / theirs["recip_rank"])
        assert float(scores["ndcg_linear@10"][n]) == pytest.approx(theirs["ndcg_cut_10"], abs=1e-7)
        assert float(scores["recall@10"][n]) == pytest.approx(theirs["recall_10"], abs=1e-7)
        ranks = sorted(rank for rank in found.ranks[n].tolist() if rank)
        assert sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks) == pytest.approx(theirs["map"])


def test_one_right_answer_has_the_rank_of_the_other_function() -> None:
    generator = torch.Generator().manual_seed(4)
    queries, gallery = (
        torch.randn(20, 4, generator=generator).round(),
        torch.randn(50, 4, generator=generator).round(),
    )
    right = torch.arange(20)
    ours = rank_graded(queries, gallery, [{n: 1.0} for n in range(20)])
    assert ours.ranks[:, 0].equal(retrieval_ranks(queries, gallery, torch.arange(50), right))


def test_collapsed_embeddings_find_nothing() -> None:
    """The official files put the right answer first, so a stable sort would make them perfect."""
    vectors = F.normalize(torch.ones(40, 8), dim=-1)
    for pools in (None, [list(range(10))] * 40):
        found = rank_graded(vectors, vectors, [{0: 1.0}] * 40, pools)
        assert float(graded_scores(found)["hit@1"].mean()) == 0.0
        assert set(found.ranks[:, 0].tolist()) == {40 if pools is None else 10}
        assert set(found.ties.tolist()) == {39 if pools is None else 9}


def test_random_embeddings_score_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    queries, gallery = (F.normalize(torch.randn(n, 32, generator=generator), dim=-1) for n in (4000, 400))
    random = np.random.default_rng(0)
    pools = [random.choice(400, 4, False).tolist() for _ in range(4000)]
    found = rank_graded(queries, gallery, [{pool[0]: 1.0} for pool in pools], pools)
    assert abs(float(graded_scores(found)["hit@1"].mean()) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 4000)


def test_nan_is_the_worst_that_can_be() -> None:
    gallery = torch.eye(4)
    nan = torch.full((1, 4), torch.nan)
    for queries, candidates in ((nan, gallery), (torch.ones(1, 4), torch.cat([nan, gallery[1:]]))):
        assert rank_graded(queries, candidates, [{0: 1.0}]).ranks.tolist() == [[4]]
        assert rank_graded(queries, candidates, [{0: 1.0}], [[0, 2]]).ranks.tolist() == [[2]]
    two = rank_graded(torch.ones(1, 4), torch.cat([nan, gallery[1:]]), [{0: 1.0, 1: 2.0}], keep=4)
    assert two.ranks.tolist() == [[4, 3]] and two.first[0, 2:].tolist() == [1, 0]
    wrong = rank_graded(torch.eye(4)[:1], torch.cat([gallery, nan]), [{0: 1.0}], keep=5)
    assert wrong.ranks.tolist() == [[2]] and wrong.first[0, :2].tolist() == [4, 0]


def test_a_candidate_that_a_list_names_twice_stays_twice() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    found = rank_graded(torch.tensor([[1.0, 0.0]]), gallery, [{2: 1.0}], [[2, 0, 0, 1]], keep=4)
    assert found.ranks.tolist() == [[4]] and found.first.tolist() == [[0, 0, 1, 2]]
    right = rank_graded(torch.tensor([[1.0, 0.0]]), gallery, [{0: 1.0, 1: 1.0}], [[2, 0, 0, 1]], keep=4)
    assert right.ranks.tolist() == [[1, 3]] and right.first.tolist() == [[0, 0, 1, 2]]
    assert right.ties.tolist() == [0]


def test_what_cannot_be_ranked_is_refused() -> None:
    vectors = torch.eye(3)
    for labels, pools in (
        ([{}, {0: 1.0}, {0: 1.0}], None),
        ([{0: 0.0}, {0: 1.0}, {0: 1.0}], None),
        ([{3: 1.0}, {0: 1.0}, {0: 1.0}], None),
        ([{0: 1.0}] * 3, [[0, 1], [1, 2], [0, 2]]),
        ([{0: 1.0}] * 2, None),
    ):
        with pytest.raises(ValueError, match=r"must (have|be)"):
            rank_graded(vectors, vectors, labels, pools)
    empty = rank_graded(torch.zeros(0, 3), vectors, [])
    assert isinstance(empty, Ranking) and empty.ranks.shape == (0, 1)
