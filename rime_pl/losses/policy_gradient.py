"""The loss of Refine-RL: a clipped policy gradient with a KL penalty, and a penalty on embeddings that move.

Called by modules/refine_rl.py. Every divisor counts the *global* batch and is known before the first forward,
so the loss does not depend on how the batch is divided into chunks and ranks.

Shape legend: B items, G rewrites each, R = B * G rewrites, C completion tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo"]


@dataclass
class PolicyLoss:
    """The loss, and the sums that are logged with it.

    Source: what GRPO implementations log; arXiv 2402.03300.

    Example:
        >>> import torch
        >>> PolicyLoss(*torch.zeros(4)).clipped_sum
        tensor(0.)
    """

    loss: Tensor  # scalar, with gradient
    kl_sum: Tensor  # scalar: sum of k3 over the sampled tokens, in nats, no gradient
    k2_sum: Tensor  # scalar: sum of k2 over the sampled tokens, in nats, no gradient
    clipped_sum: Tensor  # scalar: number of tokens that get no gradient because of the clip


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) per token: never negative, 0 where the two agree.

    ``k3 = exp(ref - policy) - (ref - policy) - 1``

    Args:
        logprobs, ref_logprobs: Of tokens that the policy sampled; any equal shape, in nats.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3.

    Example:
        >>> import torch
        >>> k3_divergence(torch.tensor([-1.0]), torch.tensor([-1.0])).item()
        0.0
    """
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


def k2_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k2 estimate of KL(policy || reference) per token, which a single token cannot dominate.

    A token that is more likely under the reference by g nats adds g^2 / 2 here, but exp(g) to k3.

    ``k2 = (ref - policy)^2 / 2``

    Args:
        logprobs, ref_logprobs: Of tokens that the policy sampled; any equal shape, in nats.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k2.

    Example:
        >>> import torch
        >>> k2_divergence(torch.tensor([-3.0]), torch.tensor([-1.0])).item()
        2.0
    """
    return (ref_logprobs - logprobs).square() / 2


@dataclass(frozen=True)
class Divisors:
    """Counts of the *global* batch, over all chunks and ranks.

    Source: ours.

    Example:
        >>> Divisors(num_rows=2, num_tokens=6, max_tokens=3).num_tokens
        6
    """

    num_rows: int  # rewrites
    num_tokens: int  # sampled tokens
    max_tokens: int  # maximum number of tokens that are sampled for a rewrite


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
    """Return the policy gradient loss with an asymmetric clip and a k3 penalty; see :func:`aggregate`.

    In plain terms: tokens of better rewrites become more likely, but not far from the reference.

    ``rho = exp(logp - old)``; ``l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef k3``

    Args:
        logprobs: (R, C) float32, of the sampled tokens under the policy, in nats, with gradient.
        old_logprobs, ref_logprobs: (R, C) under the policy that sampled the tokens, and under the reference.
        advantages: (R,) float32.
        mask: (R, C), non-zero at sampled tokens.
        divisors: Of the global batch, so that the sum over chunks and ranks is the loss of the whole.
        loss_type, clip_low, clip_high, kl_coef: See the formula and :func:`aggregate`.

    Raises:
        ValueError: If ``loss_type`` is unknown.

    Source: GRPO arXiv 2402.03300, DAPO arXiv 2503.14476 (clip-higher, token sum), Dr. GRPO arXiv 2503.20783.
    Paper: RIME (arXiv 2604.22280) has RL after alignment; the form of the loss is our choice.

    Example:
        >>> import torch
        >>> logp = torch.zeros(2, 3, requires_grad=True)
        >>> old, advantages = logp.detach(), torch.tensor([1.0, -1.0])
        >>> out = policy_loss(logp, old, advantages, torch.ones(2, 3), old, Divisors(2, 6, 3))
        >>> out.loss.backward()
        >>> (logp.grad * 6).tolist()  # more likely in the good rewrite, less likely in the bad one
        [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    mask = mask.to(logprobs.dtype)
    weight = advantages.unsqueeze(1)  # (R, 1)
    ratio = (logprobs - old_logprobs).exp()  # (R, C)
    surrogate = (ratio * weight).minimum(ratio.clamp(1 - clip_low, 1 + clip_high) * weight)  # (R, C)
    divergence = k3_divergence(logprobs, ref_logprobs)  # (R, C)
    loss = aggregate(kl_coef * divergence - surrogate, mask, divisors, loss_type)
    clipped = ((ratio < 1 - clip_low) & (weight < 0)) | ((ratio > 1 + clip_high) & (weight > 0))  # (R, C)
    logged = (divergence, k2_divergence(logprobs, ref_logprobs), clipped)
    return PolicyLoss(loss, *((values * mask).sum().detach() for values in logged))


def embedding_drift(
    disc: Tensor, gen: Tensor, ref_disc: Tensor, ref_gen: Tensor, divisors: Divisors
) -> Tensor:
    """Return how far the policy's embeddings of the same texts are from the reference's.

    In plain terms: rewrites should change, but what a text means should not. Without this penalty, steps that
    are large enough to change the words also spoil the discriminative embedding, which shares the adapter.

    ``D = mean_items (1 - d . d_ref) + mean_rewrites (1 - e . e_ref)``

    Args:
        disc, ref_disc: (B, D) float32, normalised: discriminative embeddings of B items.
        gen, ref_gen: (R, D) float32, normalised: generative embeddings of their R = B * G rewrites.
        divisors: Of the global batch, so that the sum over chunks and ranks is the drift of the whole.

    Returns:
        Scalar from 0 (nothing moved) to 4, with the gradient of ``disc`` and ``gen``.

    Source: ours. Paper: RIME (arXiv 2604.22280) has stable anchors; this penalty is no part of it.

    Example:
        >>> import torch
        >>> d, moved, e = torch.eye(2)[:1], torch.eye(2)[1:], torch.eye(2)
        >>> embedding_drift(d, e, d, e, Divisors(2, 6, 3)).item()
        0.0
        >>> embedding_drift(moved, e, d, e, Divisors(2, 6, 3)).item()
        1.0
    """
    of_items = (1 - (disc * ref_disc).sum(dim=1)).sum() * (len(gen) // len(disc))
    of_rewrites = (1 - (gen * ref_gen).sum(dim=1)).sum()
    return (of_items + of_rewrites) / divisors.num_rows


def aggregate(per_token: Tensor, mask: Tensor, divisors: Divisors, loss_type: LossType) -> Tensor:
    """Return one loss from the terms of all tokens.

    - grpo: mean over rewrites of the mean over the tokens of each
    - dapo: sum over all tokens / number of tokens, so that a longer rewrite weighs more
    - dr_grpo: sum over all tokens / (rewrites * max_tokens), so that no divisor depends on a length

    Args:
        per_token: (R, C) terms.
        mask: (R, C) float, 1 at sampled tokens.
        divisors: Of the global batch.
        loss_type: One of the three.

    Returns:
        Scalar, with the gradient of ``per_token``.

    Raises:
        ValueError: If ``loss_type`` is unknown.

    Source: GRPO arXiv 2402.03300, DAPO arXiv 2503.14476, Dr. GRPO arXiv 2503.20783.

    Example:
        >>> import torch
        >>> terms, mask = torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> [aggregate(terms, mask, Divisors(2, 3, 2), t).item() for t in ("grpo", "dapo", "dr_grpo")]
        [2.5, 2.0, 1.5]
    """
    summed = (per_token * mask).sum(dim=1)  # (R,)
    if loss_type == "grpo":
        return (summed / mask.sum(dim=1).clamp(min=1)).sum() / divisors.num_rows
    if loss_type == "dapo":
        return summed.sum() / max(1, divisors.num_tokens)
    if loss_type == "dr_grpo":
        return summed.sum() / (divisors.num_rows * divisors.max_tokens)
    raise ValueError(f"loss_type must be 'grpo', 'dr_grpo' or 'dapo', but is {loss_type!r}.")
