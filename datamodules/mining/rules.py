"""The rules that tell a hard negative from a right answer that is not annotated, as pure functions.

Called by choosing.py with the nearest candidates of some queries. Every rule is a comparison of numbers, so a
test can write it again as a loop.

Shape legend: Q queries, K candidates of a query, A right answers of all queries, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rime_pl.errors import RimeError

#: The rules in the order in which they look at a candidate; the first one that drops it counts it.
RULES = (
    *("same content", "same text", "same pictures", "already a negative"),
    *("absolute margin", "relative margin", "max score", "rank"),
)
LEFT, NOT_LOOKED_AT = 0, -1
CONTENT, TEXT, PICTURES, ALREADY, ABSOLUTE, RELATIVE, MAX_SCORE, RANK = range(1, len(RULES) + 1)

Sampling = Literal["top", "random"]


@dataclass(frozen=True)
class Rules:
    """Which candidates become hard negatives.

    Args:
        num_negatives: Largest number of new negatives of a pair.
        range_min: Number of nearest candidates that are skipped, of those that margins and limit leave.
        range_max: Number of nearest candidates that are looked at, right answers not counted (default:
            range_min plus 10 for each negative, or 1 for each without margin, limit and random sampling).
        absolute_margin: How far below the lowest right answer a negative must stay, in cosine of the same
            mode pair; null for no margin.
        relative_margin: The same as a share of that answer's absolute score; null for no margin.
        max_score: Largest cosine of a negative; null for no limit.
        sampling: top takes the nearest candidates that are left, random draws among them.
        seed: Seed of random sampling, and of the examples in the report.

    Raises:
        RimeError: If a number cannot be, or if the ranks hold fewer candidates than negatives are wanted.
    """

    num_negatives: int = 4
    range_min: int = 0
    range_max: int | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    max_score: float | None = None
    sampling: Sampling = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"num_negatives": 1, "range_min": 0, "absolute_margin": 0, "relative_margin": 0, "seed": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # also refuses NaN
                raise RimeError(f"--rules.{name} must be {least} or more, but is {value}.")
        if self.last_rank - self.range_min < self.num_negatives:
            raise RimeError(
                "--rules.range_max must be at least range_min plus num_negatives, "
                f"{self.range_min + self.num_negatives}, but is {self.last_rank}. Otherwise fewer candidates "
                "are left than negatives are wanted."
            )

    @property
    def last_rank(self) -> int:
        """The number of candidates of a query that are looked at, right answers not counted."""
        if self.range_max is not None:
            return self.range_max
        limits = (self.absolute_margin, self.relative_margin, self.max_score)
        choice = self.sampling == "random" or any(limit is not None for limit in limits)
        return self.range_min + (10 if choice else 1) * self.num_negatives


def lowest_scores(queries: Tensor, answers: Tensor, owner: Tensor) -> Tensor:
    """Return the score of the lowest right answer of each query.

    ``lowest_q = min over the answers a of q of (q . a)``

    Queries may have different numbers of right answers. One without any has infinity.

    Args:
        queries: (Q, D) float.
        answers: (A, D) float, the right answers of all queries.
        owner: (A,) int64, the query of each.

    Returns:
        (Q,) float.

    Example:
        >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> answers = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.25]])
        >>> lowest_scores(queries, answers, torch.tensor([0, 0, 1]))
        tensor([-0.5000,  0.2500])
    """
    scores = (queries[owner] * answers).sum(-1)  # (A,)
    lowest = torch.full((len(queries),), torch.inf, dtype=scores.dtype, device=scores.device)
    return lowest.scatter_reduce(0, owner, scores, "amin")


def judge(scores: Tensor, identical: Tensor, lowest: Tensor, rules: Rules) -> Tensor:
    """Return for each candidate which rule drops it, ``LEFT`` or ``NOT_LOOKED_AT``.

    In plain terms: what is a right answer goes first; then what is too near to be wrong; then the first few.

    1. ``identical``: the candidate equals a right answer, or is a negative of the pair already.
    2. Only the nearest ``last_rank`` of the others are looked at, with what is identical between them.
    3. absolute margin: ``s + absolute_margin > lowest``
    4. relative margin: ``s > lowest - |lowest| * relative_margin``. ``lowest * (1 - relative_margin)`` would
       raise the limit where the score is negative.
    5. max score: ``s > max_score``
    6. rank: the first ``range_min`` of those that are left.

    Args:
        scores: (Q, K) float, each row from the nearest candidate on.
        identical: (Q, K) int8: 0, or the rule of identity (``CONTENT`` to ``ALREADY``) that holds.
        lowest: (Q,) float, from :func:`lowest_scores`.
        rules: The limits.

    Returns:
        (Q, K) int8: number in ``RULES`` from 1, ``LEFT`` or ``NOT_LOOKED_AT``.

    Source:
        Margins as in ``mine_hard_negatives`` of sentence-transformers.

    Differences:
        There the pool has room for the largest number of right answers, so a query with fewer of them sees
        more candidates. Here every query sees ``last_rank``.

    Example:
        >>> scores = torch.tensor([[0.9, 0.8, 0.79, 0.5, 0.4]])
        >>> same = torch.tensor([[1, 0, 0, 0, 0]], dtype=torch.int8)
        >>> found = judge(scores, same, torch.tensor([0.83]), Rules(num_negatives=1, range_max=3))
        >>> [RULES[n - 1] if n > 0 else n for n in found[0].tolist()]
        ['same content', 'relative margin', 'relative margin', 0, -1]
    """
    near, low = scores.double(), lowest.double().unsqueeze(1)
    verdict = identical.to(torch.int8)
    others = verdict == LEFT
    looked_at = others.cumsum(1) - others.long() < rules.last_rank  # fewer than so many others before it
    for rule, limit, too_near in (
        (ABSOLUTE, rules.absolute_margin, lambda margin: near + margin > low),
        (RELATIVE, rules.relative_margin, lambda margin: near > low - low.abs() * margin),
        (MAX_SCORE, rules.max_score, lambda score: near > score),
    ):
        if limit is not None:
            verdict = verdict.masked_fill((verdict == LEFT) & too_near(limit), rule)
    left = (verdict == LEFT) & looked_at
    verdict = verdict.masked_fill(left & (left.cumsum(1) <= rules.range_min), RANK)
    return verdict.masked_fill(~looked_at, NOT_LOOKED_AT)
