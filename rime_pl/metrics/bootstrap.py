"""How certain a recall is: bootstrap intervals over queries, also for the difference of two runs.

Called by callbacks/retrieval_recall.py for the interval of each mode pair, and by the comparison of two runs.
Seeded and on the CPU, so that all processes and machines use the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Number of resamples made at a time, so that memory stays small with many queries.
_BLOCK = 100


def macro_mean(groups: Sequence[Tensor]) -> float:
    """Return the mean over tasks of the mean over their queries; all tasks weigh the same.

    Args:
        groups: One (Q_g,) tensor per task, each with at least one value.

    Source: the macro average of information retrieval.

    Example:
        >>> macro_mean([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0])])
        0.5
    """
    return float(torch.stack([group.double().mean() for group in groups]).mean())


def bootstrap_interval(
    groups: Sequence[Tensor], num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``macro_mean``.

    In plain terms: the range in which the mean would lie with other queries of the same kind.

    ``interval = quantiles (1 - c) / 2 and (1 + c) / 2 of macro_mean over resamples with replacement``

    Args:
        groups: One (Q_g,) tensor per task: 1.0 where the query found its target, or any score of the query.
            Queries are resampled within their task.
        num_resamples: Number of resamples.
        confidence: Share c of the resamples inside the interval, greater than 0 and less than 1.
        seed: Seed of the resampling.

    Returns:
        Lower and upper bound. With one query per task both equal the mean, and the interval says nothing.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile interval.

    Example:
        >>> bootstrap_interval([torch.ones(50)])
        (1.0, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(num_resamples, dtype=torch.float64)
    for group in groups:
        values = group.detach().cpu().double()
        for start in range(0, num_resamples, _BLOCK):
            size = (min(_BLOCK, num_resamples - start), len(values))
            chosen = torch.randint(len(values), size, generator=generator)  # (resamples of the block, Q_g)
            totals[start : start + size[0]] += values[chosen].mean(-1)
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
    """Return the mean difference ``second - first`` and its bootstrap interval, over the *same* queries.

    In plain terms: a query that is hard for both runs does not widen the interval.

    Args:
        first, second: One (Q_g,) tensor per task, with the same queries in the same order.
        num_resamples, confidence, seed: See :func:`bootstrap_interval`.

    Returns:
        Mean difference, lower and upper bound.

    Raises:
        ValueError: If the two do not hold the same number of queries in each task.

    Source: Efron and Tibshirani (1993), on the differences of pairs.

    Example:
        >>> paired_bootstrap([torch.zeros(9)], [torch.ones(9)])
        (1.0, 1.0, 1.0)
    """
    sizes = [len(group) for group in first], [len(group) for group in second]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"Both runs must have the same queries, but per task have {sizes[0]} and {sizes[1]}."
        )
    differences = [
        b.detach().cpu().double() - a.detach().cpu().double() for a, b in zip(first, second, strict=True)
    ]
    low, high = bootstrap_interval(differences, num_resamples, confidence, seed)
    return macro_mean(differences), low, high
