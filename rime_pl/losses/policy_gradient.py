"""The policy loss of Refine-RL: clipped policy gradient with a KL penalty, over the tokens that were drawn.

Called by modules/refine_rl.py. Every divisor is one of the *global* batch, known before the first pass, so
that chunks and ranks change nothing.

Shape legend: R rows (rewrites), C completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo"]


@dataclass
class PolicyLoss:
    """The loss and what a person watches beside it."""

    loss: Tensor  # scalar with gradient
    kl_sum: Tensor  # scalar: sum of k3 over the counted tokens, no gradient
    k2_sum: Tensor  # scalar: sum of k2 over them, no gradient
    clipped_sum: Tensor  # scalar: counted tokens whose gradient the clip has cut off


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from tokens of the policy: never negative, 0 where they agree.

    ``k3 = exp(ref - policy) - (ref - policy) - 1``

    Args:
        logprobs, ref_logprobs: Any equal shape, in nats.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3.

    Example:
        >>> import torch
        >>> k3_divergence(torch.tensor([-1.0]), torch.tensor([-1.0])).item()
        0.0
    """
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


def k2_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The same, half the squared gap: what to watch, since one token that the reference finds likelier by g
    nats weighs g^2 / 2 here and exp(g) in k3.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k2.
    """
    return (ref_logprobs - logprobs).square() / 2


@dataclass(frozen=True)
class Divisors:
    """Counts of the *global* batch, over all chunks and ranks."""

    num_rows: int
    num_tokens: int  # drawn tokens
    max_tokens: int  # most tokens that a row may draw


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor,
    divisors: Divisors,
    loss_type: LossType = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coef: float = 0.04,
) -> PolicyLoss:
    """Clipped policy gradient with asymmetric clip and k3 penalty; aggregation see :func:`aggregate`.

    ``rho = exp(logp - old)``; ``l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef k3``

    Args:
        logprobs: (R, C) float32 of the drawn tokens under the policy, with gradient.
        old_logprobs, ref_logprobs: (R, C) under the policy that drew them, and under the reference.
        advantages: (R,) float32.
        mask: (R, C), non-zero at drawn tokens.
        divisors: Of the global batch: summed over chunks and ranks the loss is that of the whole.

    Raises:
        ValueError: If ``loss_type`` is unknown.

    Source: GRPO arXiv 2402.03300, DAPO arXiv 2503.14476 (clip-higher, token sum), Dr. GRPO arXiv 2503.20783.
    Paper: RIME says RL after alignment (arXiv 2604.22280); which loss is not public, the form is ours.

    Example:
        >>> import torch
        >>> logp = torch.zeros(2, 3, requires_grad=True)
        >>> old, advantages = logp.detach(), torch.tensor([1.0, -1.0])
        >>> out = policy_loss(logp, old, advantages, torch.ones(2, 3), old, Divisors(2, 6, 3))
        >>> out.loss.backward()
        >>> (logp.grad * 6).tolist()  # upwards for the good row, downwards for the bad one
        [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    mask = mask.to(logprobs.dtype)
    weight = advantages.unsqueeze(1)
    ratio = (logprobs - old_logprobs).exp()
    surrogate = (ratio * weight).minimum(ratio.clamp(1 - clip_low, 1 + clip_high) * weight)
    divergence = k3_divergence(logprobs, ref_logprobs)
    loss = aggregate(kl_coef * divergence - surrogate, mask, divisors, loss_type)
    clipped = ((ratio < 1 - clip_low) & (weight < 0)) | ((ratio > 1 + clip_high) & (weight > 0))
    watched = (divergence, k2_divergence(logprobs, ref_logprobs), clipped)
    return PolicyLoss(loss, *((values * mask).sum().detach() for values in watched))


def aggregate(per_token: Tensor, mask: Tensor, divisors: Divisors, loss_type: LossType) -> Tensor:
    """One number from the terms of all tokens.

    ==========  =========================================================================
    grpo        mean over rows of the mean over each row's tokens
    dapo        sum over all tokens / number of tokens: a row weighs by its length
    dr_grpo     sum over all tokens / (rows * max_tokens): no divisor depends on a length
    ==========  =========================================================================

    Args:
        per_token: (R, C) terms.
        mask: (R, C) float, 1 at drawn tokens.
    """
    summed = (per_token * mask).sum(dim=1)
    if loss_type == "grpo":
        return (summed / mask.sum(dim=1).clamp(min=1)).sum() / divisors.num_rows
    if loss_type == "dapo":
        return summed.sum() / max(1, divisors.num_tokens)
    if loss_type == "dr_grpo":
        return summed.sum() / (divisors.num_rows * divisors.max_tokens)
    raise ValueError(f"loss_type={loss_type!r} is none of grpo, dr_grpo, dapo.")
