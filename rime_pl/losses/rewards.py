"""What a rewrite is worth: how well its embedding finds the item's positive among the anchors.

Called by modules/yardstick.py with embeddings that carry no gradient. Anchors are embeddings of the *other*
side: discriminative ones of the frozen reference (they stand still), or generative ones of the rollouts.

Shape legend: N rewrites, A anchors, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Anchors:
    """What N rewrites are compared with. An anchor that is neither positive nor negative is left out:
    a twin of the positive is no negative."""

    embeddings: Tensor  # (A, D) float32, normalised
    positives: Tensor  # (N, A) bool, at least one in each row
    negatives: Tensor  # (N, A) bool, disjoint from the positives


def anchored_reward(embeddings: Tensor, anchors: Anchors, temperature: float) -> Tensor:
    """How much likelier than chance the positive is among all anchors; rises with its similarity.

    ``R = logsumexp_{a in P}(e.a / tau) - logsumexp_{a in P or N}(e.a / tau) + log(|P or N| / |P|)``

    Args:
        embeddings: (N, D) float32, normalised.
        anchors: One positive each, or several (rollouts of the other side).
        temperature: Divisor tau, > 0.

    Returns:
        (N,) float32 in nats; 0 where all anchors are equally near.

    Raises:
        ValueError: If the temperature is not positive, or a rewrite has no positive.

    Paper: discriminative embeddings as stable anchors are RIME's (arXiv 2604.22280); the form is ours. It
    counts from chance, a constant for each item: a malformed rewrite, worth 0, beats a well-formed one only
    where that one's positive is less likely than exp(-w_f / w_e) of chance.

    Example:
        >>> import torch
        >>> anchors = Anchors(torch.eye(2), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> round(anchored_reward(torch.tensor([[1.0, 0.0]]), anchors, temperature=1.0).item(), 4)
        0.3799
    """
    _check(anchors, temperature)
    scores = embeddings @ anchors.embeddings.T / temperature
    hit = scores.masked_fill(~anchors.positives, float("-inf")).logsumexp(dim=1)
    everything = scores.masked_fill(~(anchors.positives | anchors.negatives), float("-inf"))
    num_anchors = (anchors.positives | anchors.negatives).sum(dim=1).to(scores.dtype)
    chance = anchors.positives.sum(dim=1) / num_anchors
    return hit - everything.logsumexp(dim=1) - chance.log()


def rank_margin_reward(embeddings: Tensor, anchors: Anchors) -> Tensor:
    """The ancestor's reward: share of positives among the nearest, times the gap of the mean similarities.

    ``R = (positives among the |P| nearest / |P|) * (mean_{p} e.p - mean_{n} e.n)``

    Not monotone: when the gap is negative, a better rank lowers it.

    Args:
        embeddings: (N, D) float32, normalised.
        anchors: In the ancestor, the rollouts of the other side: G positives, the other items' as negatives.

    Returns:
        (N,) float32. An anchor that ties with a positive ranks before it.

    Raises:
        ValueError: If a rewrite has no positive or no negative: the mean over none is no number.

    Source: arXiv 2511.00405 (the ancestor), reward of its RL stage: ranking and similarity gap.

    Example:
        >>> import torch
        >>> anchors = Anchors(torch.eye(2), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> rank_margin_reward(torch.tensor([[0.8, 0.6]]), anchors)
        tensor([0.2000])
    """
    _check(anchors, 1.0)
    _need_negatives(anchors)
    scores = embeddings @ anchors.embeddings.T
    count = anchors.positives.sum(dim=1)
    negatives = scores.masked_fill(~anchors.negatives, float("-inf")).unsqueeze(1)
    ahead = (negatives >= scores.unsqueeze(2)).sum(dim=2)  # (N, A): negatives before each anchor
    others = scores.masked_fill(~anchors.positives, float("-inf"))
    place = ahead + (others.unsqueeze(1) > scores.unsqueeze(2)).sum(dim=2)
    among = ((place < count.unsqueeze(1)) & anchors.positives).sum(dim=1).to(scores.dtype) / count
    return among * (_mean(scores, anchors.positives) - _mean(scores, anchors.negatives))


def total_reward(
    embedding_reward: Tensor,
    well_formed: Tensor,
    lengths: Tensor,
    *,
    weight_format: float = 1.0,
    weight_embedding: float = 1.0,
    weight_length: float = 0.0,
    free_length: int = 128,
) -> Tensor:
    """All parts together.

    ``R = w_f F + F w_e R_emb - w_l max(0, (len - L0) / L0)``

    Args:
        embedding_reward: (N,) R_emb.
        well_formed: (N,) bool F: not empty, and ended by <gen_emb> that the model itself wrote.
        lengths: (N,) tokens of the rewrite.
        weight_format, weight_embedding, weight_length: w_f, w_e, w_l.
        free_length: L0, tokens that cost nothing, > 0.

    Returns:
        (N,) float32.

    Paper: ours.

    Example:
        >>> import torch
        >>> total_reward(torch.tensor([-0.5, -0.5]), torch.tensor([True, False]), torch.tensor([3, 3]))
        tensor([0.5000, 0.0000])
    """
    formed = well_formed.to(embedding_reward.dtype)
    excess = ((lengths - free_length) / free_length).clamp(min=0)
    return weight_format * formed + formed * weight_embedding * embedding_reward - weight_length * excess


def _mean(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores * mask).sum(dim=1) / mask.sum(dim=1)


def _check(anchors: Anchors, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; it divides the cosines.")
    if not bool(anchors.positives.any(dim=1).all()):
        raise ValueError("a rewrite has no positive among the anchors.")


def _need_negatives(anchors: Anchors) -> None:
    if not bool(anchors.negatives.any(dim=1).all()):
        raise ValueError(
            "a rewrite has no negative among the anchors: one group alone, and no table of anchors."
        )
