"""Bootstrap intervals against naive resampling and the normal approximation, and their edge cases."""

import random

import pytest
import torch

from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean, paired_bootstrap


def hits(count: int, share: float) -> torch.Tensor:
    return (torch.arange(count) < round(count * share)).float()


def test_interval_of_one_task_is_close_to_the_normal_approximation() -> None:
    low, high = bootstrap_interval([hits(400, 0.7)], num_resamples=2000)
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert low == pytest.approx(0.7 - half, abs=0.006)
    assert high == pytest.approx(0.7 + half, abs=0.006)


def test_queries_are_resampled_within_their_task_and_tasks_weigh_the_same() -> None:
    groups = [hits(300, 0.9), hits(20, 0.4)]
    assert macro_mean(groups) == pytest.approx(0.65)
    rng = random.Random(0)
    means = sorted(
        sum(sum(rng.choices(group.tolist(), k=len(group))) / len(group) for group in groups) / 2
        for _ in range(4000)
    )
    low, high = bootstrap_interval(groups, num_resamples=4000)
    assert low == pytest.approx(means[100], abs=0.012)
    assert high == pytest.approx(means[3900], abs=0.012)


def test_the_seed_decides_the_interval_and_confidence_widens_it() -> None:
    groups = [hits(50, 0.5)]
    assert bootstrap_interval(groups, seed=3) == bootstrap_interval(groups, seed=3)
    narrow, wide = bootstrap_interval(groups, confidence=0.5), bootstrap_interval(groups, confidence=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_pairing_removes_what_both_runs_share() -> None:
    first = hits(200, 0.5)
    second = first.clone()
    second[150:160] = 1.0  # ten more queries answered, all others the same
    mean, low, high = paired_bootstrap([first], [second])
    assert mean == pytest.approx(0.05)
    assert 0 < low < 0.05 < high < 0.1
    unpaired = bootstrap_interval([second])
    assert high - low < (unpaired[1] - unpaired[0]) / 2


def test_unpaired_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="Both runs must have the same queries"):
        paired_bootstrap([torch.ones(3)], [torch.ones(4)])
