"""Rewards of a group of rewrites -> how much better each is than its group.

Called by modules/refine_rl.py. A group is the G rewrites of one item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["fixed", "std"]


@dataclass
class Advantages:
    """What the policy loss weighs each rewrite with."""

    values: Tensor  # (N, G) float32
    has_signal: Tensor  # (N,) bool: False where the group's rewards are nearly equal, and values are 0


def group_advantages(
    rewards: Tensor, scaling: Scaling = "fixed", scale: float = 1.0, min_spread: float = 0.0
) -> Advantages:
    """Reward minus the mean of its group, over a scale.

    ``A_i = (R_i - mean R) / s``; fixed: ``s = scale``; std: ``s = std R + 1e-4`` (unbiased, n - 1).
    Groups with ``std R < min_spread * scale``, and groups of equal rewards, give none.

    A fixed scale keeps what the size of a difference says. Divided by its own spread, a group that differs
    by noise alone pulls as hard as one that differs by right and wrong.

    Args:
        rewards: (N, G) float32, finite.
        scaling: Which divisor.
        scale: The fixed divisor, > 0, in units of the reward.
        min_spread: Share of ``scale`` below which a group's spread counts as noise.

    Raises:
        ValueError: If the scaling is unknown, ``scale`` is not positive, or a group has fewer than 2.

    Source: GRPO, arXiv 2402.03300; without std: Dr. GRPO, arXiv 2503.20783.
    Paper: the fixed scale and the least spread are ours.

    Example:
        >>> a = group_advantages(torch.tensor([[1.0, 3.0], [2.0, 2.01]]), scale=2.0, min_spread=0.1)
        >>> a.values.tolist(), a.has_signal.tolist()
        ([[-0.5, 0.5], [0.0, 0.0]], [True, False])
    """
    if scale <= 0:
        raise ValueError(f"scale={scale} must be > 0; it divides the rewards.")
    if rewards.shape[1] < 2:
        raise ValueError(f"groups of {rewards.shape[1]} have nothing to compare; 2 rewrites at least.")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = rewards.std(dim=1, keepdim=True)
    if scaling == "fixed":
        values = centred / scale
    elif scaling == "std":
        values = centred / (spread + 1e-4)
    else:
        raise ValueError(f"scaling={scaling!r} is none of fixed, std.")
    # equal rewards leave rounding errors behind, which std would blow up
    has_signal = (spread >= min_spread * scale) & (
        rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    )
    return Advantages(torch.where(has_signal, values, 0.0), has_signal.squeeze(1))
