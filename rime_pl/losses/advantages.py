"""Advantages: how much better each rewrite is than the other rewrites of its item.

Called by modules/refine_rl.py, between the rewards and the policy loss.

Shape legend: N items, G rewrites of each item (a group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["fixed", "std"]


@dataclass
class Advantages:
    """The weight of each rewrite in the policy loss.

    Source: GRPO, arXiv 2402.03300; ``has_signal`` is ours.

    Example:
        >>> Advantages(torch.zeros(1, 2), torch.tensor([False])).has_signal.tolist()
        [False]
    """

    values: Tensor  # (N, G) float32
    has_signal: Tensor  # (N,) bool: False where all rewards of the group are nearly equal; values are then 0


def group_advantages(
    rewards: Tensor, scaling: Scaling = "fixed", scale: float = 1.0, min_spread: float = 0.0
) -> Advantages:
    """Return the rewards minus the mean of their group, divided by a scale.

    In plain terms: a rewrite that is better than the others of its item gets a positive weight.

    ``A_i = (R_i - mean R) / s``; fixed: ``s = scale``; std: ``s = std R + 1e-4`` (unbiased, n - 1).
    A is 0 in groups with ``std R < min_spread * scale`` and in groups of equal rewards.

    A fixed scale keeps the size of a difference. With std, a group whose rewards differ only by noise weighs
    as much as a group with right and wrong rewrites.

    Args:
        rewards: (N, G) float32, finite.
        scaling: Kind of divisor.
        scale: The fixed divisor, > 0, in units of the reward.
        min_spread: Share of ``scale``; a group with a smaller standard deviation counts as noise.

    Raises:
        ValueError: If the scaling is unknown, ``scale`` is not positive, or a group is smaller than 2.

    Source: GRPO, arXiv 2402.03300; without std: Dr. GRPO, arXiv 2503.20783.
    Paper: the fixed scale and the minimum spread are ours.

    Example:
        >>> a = group_advantages(torch.tensor([[1.0, 3.0], [2.0, 2.01]]), scale=2.0, min_spread=0.1)
        >>> a.values.tolist(), a.has_signal.tolist()
        ([[-0.5, 0.5], [0.0, 0.0]], [True, False])
    """
    if scale <= 0:
        raise ValueError(f"scale must be greater than 0 because it divides the rewards, but is {scale}.")
    if rewards.shape[1] < 2:
        raise ValueError(f"A group must hold 2 or more rewrites to compare, but holds {rewards.shape[1]}.")
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (N, G)
    spread = rewards.std(dim=1, keepdim=True)  # (N, 1)
    if scaling == "fixed":
        values = centred / scale
    elif scaling == "std":
        values = centred / (spread + 1e-4)
    else:
        raise ValueError(f"scaling must be 'fixed' or 'std', but is {scaling!r}.")
    # equal rewards leave rounding errors, which a division by std would enlarge
    has_signal = (spread >= min_spread * scale) & (
        rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    )  # (N, 1)
    return Advantages(torch.where(has_signal, values, 0.0), has_signal.squeeze(1))
