"""Advantages: equal to the code of TRL and to a plain loop, and 0 for groups without signal."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from rime_pl.losses.advantages import group_advantages


def trl_advantages(rewards: torch.Tensor, scale_rewards: str) -> torch.Tensor:
    """Run the lines of TRL's source that turn rewards into advantages."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index("mean_grouped_rewards = torch.nanmean(")
    end = source.index('elif self.multi_objective_aggregation == "normalize_then_sum"')
    lines = source[start:end].rstrip()
    body = textwrap.dedent(" " * 12 + lines)

    class Stub:
        pass

    stub = Stub()
    stub.scale_rewards = scale_rewards  # type: ignore[attr-defined]
    scope = {
        **vars(grpo_trainer),
        "self": stub,
        "rewards": rewards.flatten(),
        "num_generations": rewards.shape[1],
    }
    exec(body, scope)
    return scope["advantages"].view_as(rewards)


@pytest.mark.parametrize(("scaling", "theirs"), [("fixed", "none"), ("std", "group")])
def test_equals_trl(scaling: str, theirs: str) -> None:
    for seed in range(5):
        rewards = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        got = group_advantages(rewards, scaling)  # type: ignore[arg-type]
        torch.testing.assert_close(got.values, trl_advantages(rewards, theirs), atol=1e-6, rtol=0)
        assert got.has_signal.all()


def test_equals_the_naive_loop() -> None:
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for scaling in ("fixed", "std"):
        got = group_advantages(rewards, scaling, scale=0.7).values  # type: ignore[arg-type]
        for group, values in zip(rewards.tolist(), got.tolist(), strict=True):
            mean = sum(group) / 5
            spread = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5
            divisor = 0.7 if scaling == "fixed" else spread + 1e-4
            assert values == pytest.approx([(r - mean) / divisor for r in group], abs=1e-6)


@pytest.mark.parametrize("scaling", ["fixed", "std"])
def test_groups_without_signal_have_advantage_zero(scaling: str) -> None:
    """Equal rewards, and a spread below ``min_spread``; a division by std would enlarge both."""
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 1.01, 1.0], [0.0, 1.0, 2.0]])
    got = group_advantages(rewards, scaling, scale=1.0, min_spread=0.05)  # type: ignore[arg-type]
    assert got.has_signal.tolist() == [False, False, True]
    assert got.values[:2].abs().max() == 0 and got.values[2].abs().max() > 0.5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"scale must be greater than 0 .* but is 0"):
        group_advantages(torch.zeros(1, 2), scale=0)
    with pytest.raises(ValueError, match="2 or more rewrites to compare, but holds 1"):
        group_advantages(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="scaling must be 'fixed' or 'std', but is 'max'"):
        group_advantages(torch.zeros(1, 2), "max")  # type: ignore[arg-type]
