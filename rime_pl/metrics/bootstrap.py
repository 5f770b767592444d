"""How sure a recall is: bootstrap intervals over queries, also for the difference of two runs.

Called by ``callbacks/retrieval_recall.py`` for the interval of each mode pair, and by whoever compares two
runs on the same queries. Seeded, on the CPU, so that all processes and machines draw the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Resamples are drawn in blocks, so that memory stays small with many queries.
_BLOCK = 100


def macro_mean(groups: Sequence[Tensor]) -> float:
    """Mean over tasks of the mean over their queries: a large task weighs as much as a small one.

    Args:
        groups: one (Q_g,) tensor per task, each with at least one value.

    >>> macro_mean([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0])])
    0.5
    """
    return float(torch.stack([group.double().mean() for group in groups]).mean())


def bootstrap_interval(
    groups: Sequence[Tensor], num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``macro_mean``: queries are resampled within their task.

    interval = quantiles (1-c)/2 and (1+c)/2 of macro_mean over resamples with replacement

    Args:
        groups: one (Q_g,) tensor per task: 1.0 where the query was answered, or any score per query.
        num_resamples: resamples with replacement.
        confidence: share of the resamples inside the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        Lower and upper bound. With one query per task both equal the mean: the interval says nothing then.

    >>> bootstrap_interval([torch.ones(50)])
    (1.0, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(num_resamples, dtype=torch.float64)
    for group in groups:
        values = group.detach().cpu().double()
        for start in range(0, num_resamples, _BLOCK):
            size = (min(_BLOCK, num_resamples - start), len(values))
            drawn = torch.randint(len(values), size, generator=generator)
            totals[start : start + size[0]] += values[drawn].mean(-1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(totals / len(groups), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference ``second - first`` with its bootstrap interval, over the *same* queries in both.

    Pairing takes out what makes a query hard for both runs, so that the interval is narrower than that of two
    independent means.

    Args:
        first, second: one (Q_g,) tensor per task, with the same queries in the same order.
        num_resamples, confidence, seed: as in ``bootstrap_interval``.

    Returns:
        Mean difference, lower and upper bound.

    Raises:
        ValueError: the two do not hold the same number of queries in each task.

    >>> paired_bootstrap([torch.zeros(9)], [torch.ones(9)])
    (1.0, 1.0, 1.0)
    """
    sizes = [len(group) for group in first], [len(group) for group in second]
    if sizes[0] != sizes[1]:
        raise ValueError(f"paired_bootstrap: queries per task differ, {sizes[0]} against {sizes[1]}")
    differences = [
        b.detach().cpu().double() - a.detach().cpu().double() for a, b in zip(first, second, strict=True)
    ]
    low, high = bootstrap_interval(differences, num_resamples, confidence, seed)
    return macro_mean(differences), low, high
