"""Exact ranking of queries with several right, graded answers, and the scores of public benchmarks.

Called by rime_pl/evaluation. A query is ranked against all candidates or against a list of its own. Scores
are computed in blocks of float64, so that a tie is a tie in every block; of a block only the counts are kept.
metrics/retrieval.py is the case of one right answer that arrives in batches and on several processes.

Shape legend: Q queries, N candidates, D embedding width, M right answers of the query with most, C queries
of a chunk, B candidates of a block, K places that are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rime_pl.metrics.retrieval import TIE

#: The k of the official result files.
KS = (1, 5, 10)
#: The scores of the official result files, in their order.
SCORES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
#: The rule for candidates with equal scores, as result files name it.
TIE_RULE = "pessimistic: a right candidate stands behind wrong ones of equal score, and high grades last"
#: Queries of a chunk and candidates of a block: 32 MiB of scores.
_ROWS, _COLUMNS = 1024, 4096
#: Bytes of the candidates of a chunk with lists of its own, as float64.
_GATHERED = 64 * 2**20


@dataclass(frozen=True)
class Ranking:
    """Where the right answers of Q queries stand.

    Source: ours.

    Example:
        >>> found = rank_graded(torch.eye(2), torch.eye(2), [{0: 1.0}, {1: 1.0}])
        >>> found.ranks.tolist(), found.sizes.tolist()
        ([[1], [1]], [2, 2])
    """

    ranks: Tensor  # (Q, M) int64, from 1; 0 behind the last right answer of a query
    grades: Tensor  # (Q, M) float64, greater than 0; 0 there
    places: Tensor  # (Q, M) int64, rows of the candidates; -1 there
    ties: Tensor  # (Q,) int64, pairs of a right and a wrong candidate with equal scores, or with NaN
    sizes: Tensor  # (Q,) int64, candidates that the query is ranked against
    first: Tensor  # (Q, K) int64, rows of the best K candidates in their order; -1 behind the last one


def rank_graded(
    queries: Tensor,
    gallery: Tensor,
    labels: Sequence[Mapping[int, float]],
    pools: Sequence[Sequence[int]] | None = None,
    keep: int = 0,
) -> Ranking:
    """Return the rank of each right answer of each query, by dot product.

    In plain terms: 1 plus the number of wrong candidates that score at least as high, plus the number of
    right ones before it. Right ones of equal score stand in the order of rising grades, which is the worst
    for nDCG.

    ``rank(p) = 1 + #{wrong i : s_i >= s_p - TIE} + #{right l before p}``

    A score that is NaN is the worst one for a right candidate, and the best one for a wrong one. A list may
    name a candidate twice: both stand in the ranking, and of a right one the first counts.

    Args:
        queries: (Q, D) float, normalised if the scores shall be cosines.
        gallery: (N, D) float.
        labels: Q mappings, row of a right candidate -> its grade, each with at least one.
        pools: Q lists of rows that a query is ranked against; None: all N.
        keep: Number K of places whose candidates are listed.

    Raises:
        ValueError: If a query has no right answer, a grade is not greater than 0, or a right answer is not
            in its list.

    Source: ours; what others do with ties is in docs/decisions/0017-the-model-in-use.md.

    Example:
        >>> names = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> found = rank_graded(torch.tensor([[1.0, 0.0]]), names, [{0: 1.0, 2: 2.0}], keep=3)
        >>> found.ranks.tolist(), found.first.tolist()
        ([[1, 3]], [[0, 1, 2]])
        >>> rank_graded(torch.ones(1, 2), torch.ones(4, 2), [{0: 1.0}]).ranks.item()
        4
    """
    places, grades = _padded(labels, len(gallery))
    if not len(queries) == len(labels) == (len(labels) if pools is None else len(pools)):
        raise ValueError(f"{len(queries)} queries must have as many labels and pools, but do not.")
    return _ranked(queries, gallery, places, grades, pools, keep)


def _ranked(
    queries: Tensor,
    gallery: Tensor,
    places: Tensor,
    grades: Tensor,
    pools: Sequence[Sequence[int]] | None,
    keep: int,
) -> Ranking:
    """Return the ranking, chunk by chunk; ``places`` and ``grades`` (Q, M) are those of the right answers."""
    if keep:
        keep = min(keep, len(gallery) if pools is None else max(map(len, pools), default=0))
    counts = (places >= 0).sum(1)
    order = counts.argsort(descending=True, stable=True)  # the rows with a j-th answer come first
    found = Ranking(
        torch.zeros_like(places),
        grades,
        places,
        torch.zeros_like(counts),
        torch.full_like(counts, len(gallery)),
        torch.full((len(places), keep), -1, dtype=torch.int64),
    )
    lists = None if pools is None else [torch.as_tensor(pool, dtype=torch.int64) for pool in pools]
    for rows in _chunks(order, lists, gallery.shape[-1]):
        if lists is not None:
            found.sizes[rows] = torch.tensor([len(lists[row]) for row in rows.tolist()])
        wide, sizes = queries[rows].double(), found.sizes[rows]
        chunk = _Chunk(wide, gallery, places[rows], grades[rows], sizes, keep, whole=lists is None)
        for scores, columns in _blocks(wide, gallery, rows, lists):
            chunk.add(scores, columns)
        found.ranks[rows], found.ties[rows], found.first[rows] = chunk.finish()
    return found


def _padded(labels: Sequence[Mapping[int, float]], size: int) -> tuple[Tensor, Tensor]:
    """Return rows (Q, M) and grades (Q, M) of the right answers."""
    for number, one in enumerate(labels):
        if not one or not all(grade > 0 for grade in one.values()):
            raise ValueError(f"Query {number} must have right answers with grades above 0: {dict(one)!r:.90}")
        if not all(0 <= place < size for place in one):
            raise ValueError(f"Query {number}: right answers must be below {size}: {dict(one)!r:.90}")
    most = max(map(len, labels), default=1)
    places = [[*one, *[-1] * (most - len(one))] for one in labels]
    grades = [[*one.values(), *[0.0] * (most - len(one))] for one in labels]
    shape = (len(labels), most)
    return torch.tensor(places, dtype=torch.int64).view(shape), torch.tensor(
        grades, dtype=torch.float64
    ).view(shape)


def _chunks(order: Tensor, lists: Sequence[Tensor] | None, width: int) -> Iterator[Tensor]:
    """Yield rows (C,) of queries: with lists of their own, as many as share few candidates."""
    if lists is None:
        yield from order.split(_ROWS)
        return
    limit = _GATHERED // (8 * max(1, width))
    rows: list[int] = []
    known: set[int] = set()
    for row in order.tolist():
        more = known.union(lists[row].tolist())
        if rows and (len(rows) == _ROWS or len(more) > limit):
            yield torch.tensor(rows)
            rows, more = [], set(lists[row].tolist())
        rows.append(row)
        known = more
    if rows:
        yield torch.tensor(rows)


def _blocks(
    queries: Tensor, gallery: Tensor, rows: Tensor, lists: Sequence[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores (C, B) float64 and rows of candidates (C, B); -inf and -1 where a list has ended."""
    if lists is None:
        for start in range(0, len(gallery), _COLUMNS):
            block = gallery[start : start + _COLUMNS]
            columns = torch.arange(start, start + len(block)).expand(len(queries), -1)
            yield queries @ block.double().T, columns
        return
    own = [lists[row] for row in rows.tolist()]
    columns = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
    union, index = columns.unique(return_inverse=True)
    scores = (queries @ gallery[union.clamp(min=0)].double().T).gather(1, index)
    yield scores.masked_fill(columns < 0, -torch.inf), columns


class _Chunk:
    """Counts, block by block, who stands before the right answers of C queries.

    The queries are sorted by their number of right answers, the largest first.
    """

    def __init__(
        self,
        queries: Tensor,
        gallery: Tensor,
        places: Tensor,
        grades: Tensor,
        sizes: Tensor,
        keep: int,
        whole: bool,
    ) -> None:
        self.places, self.grades, self.sizes = places, grades, sizes
        self.valid = places >= 0
        self.rows = [int(n) for n in self.valid.sum(0) if n]  # queries that have a j-th right answer
        self.scores = torch.full(places.shape, torch.nan, dtype=torch.float64)
        for j, n in enumerate(self.rows):
            self.scores[:n, j] = (queries[:n] * gallery[places[:n, j]].double()).sum(-1)
        self.ahead, self.tied = torch.zeros_like(places), torch.zeros_like(places)
        self.whole = whole
        self.times = self.valid.long() * int(whole)  # how often a list names each
        self.best = torch.full((len(places), keep), -torch.inf, dtype=torch.float64)
        self.best_columns = torch.full((len(places), keep), -1, dtype=torch.int64)

    def add(self, scores: Tensor, columns: Tensor) -> None:
        """Count a block; ``scores`` is overwritten."""
        for j, n in enumerate(self.rows):
            right = self.scores[:n, j : j + 1]
            # "not below" and not ">=", so that NaN counts as ahead
            ahead = torch.count_nonzero(~(scores[:n] < right - TIE), dim=-1)
            self.ahead[:n, j] += ahead
            self.tied[:n, j] += ahead - torch.count_nonzero(scores[:n] > right + TIE, dim=-1)
        keep = self.best.shape[1]
        if self.whole and not keep:
            return
        for j, n in enumerate(self.rows):
            same = columns[:n] == self.places[:n, j : j + 1]
            if not self.whole:
                self.times[:n, j] += same.sum(-1)
            scores[:n].masked_fill_(same, -torch.inf)
        if keep:  # the best wrong ones; topk takes NaN for the largest
            values, at = torch.cat([self.best, scores], 1).topk(keep)
            self.best, self.best_columns = values, torch.cat([self.best_columns, columns], 1).gather(1, at)
            self.best_columns.masked_fill_(values == -torch.inf, -1)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ranks (C, M), ties (C,) and the first candidates (C, K)."""
        if bool((self.valid & (self.times == 0)).any()):
            raise ValueError("A right answer must be in the list of its query, but one is not.")
        ranks, ties = torch.zeros_like(self.places), torch.zeros_like(self.sizes)
        number = torch.arange(self.places.shape[1])
        for j, n in enumerate(self.rows):
            right, others, valid = self.scores[:n, j : j + 1], self.scores[:n], self.valid[:n]
            times, nan = self.times[:n] * valid, right.isnan()
            ahead = torch.where(nan[:, 0], self.sizes[:n], self.ahead[:n, j])
            at_least, above = ~(others < right - TIE), others > right + TIE
            same = at_least & ~above & ~(nan ^ others.isnan())
            grade, grades = self.grades[:n, j : j + 1], self.grades[:n]
            before = above | (nan & ~others.isnan())
            before |= same & ((grades < grade) | ((grades == grade) & (number < j)))
            wrong = ahead - (times * at_least).sum(-1)
            ranks[:n, j] = 1 + wrong + (times * before).sum(-1)
            tied = torch.where(nan[:, 0], self.sizes[:n], self.tied[:n, j])
            ties[:n] += tied - (times * (at_least & ~above)).sum(-1)
        return ranks, ties, self._first(ranks)

    def _first(self, ranks: Tensor) -> Tensor:
        """Return the first candidates (C, K): the right ones at their ranks, the wrong ones around them."""
        keep = self.best.shape[1]
        first = torch.full((len(ranks), keep + 1), -1, dtype=torch.int64)  # the last column is for the rest
        for j, n in enumerate(self.rows):
            for copy in range(int(self.times[:n, j].max())):
                at = torch.where(self.times[:n, j] > copy, ranks[:n, j] - 1 + copy, keep).clamp(max=keep)
                first[:n].scatter_(1, at[:, None], self.places[:n, j : j + 1])
        first = first[:, :keep]
        free = first < 0
        if keep:
            wrong = self.best_columns.gather(1, (free.cumsum(1) - 1).clamp(min=0))
            first = torch.where(free, wrong, first)
        return first


def graded_scores(found: Ranking, ks: Sequence[int] = KS) -> dict[str, Tensor]:
    """Return the scores of the official result files for each query.

    With r the ranks of the L right answers of a query, and a sum over those with ``r <= k``:

    - ``hit = [min r <= k]``, ``mrr = [min r <= k] / min r``
    - ``precision = #{r <= k} / k``, ``recall = #{r <= k} / L``, ``f1 = 2 p r / (p + r)``
    - ``map = sum #{r' <= r} / r / min(L, k)``
    - ``ndcg = sum gain / log2(r + 1) / ideal``; gain: the grade (linear), ``2^grade - 1`` (exponential).
      The ideal is that of the right answers in the order of falling grades.

    Args:
        found: From :func:`rank_graded`.
        ks: The k.

    Returns:
        ``<score>@<k>`` -> (Q,) float64 from 0 to 1, in the order of ``SCORES``.

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002), with the
    discount log2(rank + 1), as in trec_eval; the names are those of MMEB-V2's result files.

    Example:
        >>> names = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> found = rank_graded(torch.tensor([[1.0, 0.0]]), names, [{1: 1.0}])
        >>> scores = graded_scores(found)
        >>> [round(float(scores[name]), 3) for name in ("hit@1", "precision@5", "mrr@5", "ndcg_linear@5")]
        [0.0, 0.2, 0.5, 0.631]
    """
    right = found.ranks > 0
    number = right.sum(1)
    ranks = found.ranks.double().masked_fill(~right, torch.inf)  # (Q, M); whole numbers would give float32
    rising = ranks.sort(1).values
    nth = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64)
    gains = {"ndcg_linear": found.grades, "ndcg_exponential": torch.exp2(found.grades) - 1}
    scores: dict[tuple[str, int], Tensor] = {}
    for k in ks:
        among = ranks <= k
        hits = among.sum(1).double()
        precision, recall = hits / k, hits / number
        scores["hit", k] = (hits > 0).double()
        scores["precision", k], scores["recall", k] = precision, recall
        scores["f1", k] = 2 * precision * recall / (precision + recall).clamp(min=1e-300)
        scores["map", k] = (nth / rising * (rising <= k)).sum(1) / number.clamp(max=k)
        scores["mrr", k] = (rising[:, 0] <= k) / rising[:, 0]
        for name, gain in gains.items():
            ideal = (gain.sort(1, descending=True).values / torch.log2(nth + 1.0))[:, :k].sum(1)
            reached = (gain * among / torch.log2(ranks + 1.0)).sum(1)
            scores[name, k] = reached / ideal
    return {f"{name}@{k}": scores[name, k] for name in SCORES for k in ks}
