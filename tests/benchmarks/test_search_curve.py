"""The curve of an adaptive search over several runs: each query is the mean of its runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.search import mean_curve
from rime_pl.inference.adaptive import Asked, curve

#: Two runs that ask the same six queries of two tasks. In the first, the two least sure ones need a rewrite.
TASKS = ["a", "a", "a", "a", "b", "b"]
FIRST = Asked(
    torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]),
    torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    TASKS,
)
SECOND = Asked(torch.arange(6, 0, -1) / 10, torch.zeros(6), torch.ones(6), TASKS)


def test_the_curve_of_one_run_is_its_own() -> None:
    points = {round(point.share, 2): point for point in curve(FIRST)}
    found = {round(point.share, 2): point for point in mean_curve([FIRST])}
    assert found[0.0].recall == pytest.approx(0.75) and found[1.0].recall == pytest.approx(0.5)
    for share in (0.0, 0.5, 1.0):
        assert found[share][1:] == (points[share].recall, points[share].low, points[share].high)


def test_runs_are_averaged_over_equal_queries() -> None:
    """Each run rewrites its own least sure third: the first run gains two of task a, the second both of b."""
    (third,) = [point for point in mean_curve([FIRST, SECOND]) if point.share == 0.35]
    assert third.recall == pytest.approx(((1 + 1) / 2 + (0 + 1) / 2) / 2)
    both = mean_curve([FIRST, FIRST])
    assert both == mean_curve([FIRST]), "the same run twice says no more than once"
