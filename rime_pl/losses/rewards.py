"""Rewards: how well the embedding of a rewrite finds the positive of its item among the anchors.

Called by modules/scoring.py with embeddings that carry no gradient. Anchors are embeddings of the *other*
side: discriminative ones of the frozen reference, which do not move, or generative ones of the rollouts.

Shape legend: N rewrites, A anchors, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rime_pl.losses.contrastive import check_temperature


@dataclass
class Anchors:
    """The embeddings that N rewrites are compared with.

    An anchor may be neither positive nor negative, such as a duplicate of the positive; it is left out.

    Source: RIME, arXiv 2604.22280, has discriminative anchors; UME-R1, arXiv 2511.00405, takes rollouts.

    Example:
        >>> import torch
        >>> right = torch.tensor([[True, False]])
        >>> Anchors(torch.eye(2), right, ~right).negatives.tolist()
        [[False, True]]
    """

    embeddings: Tensor  # (A, D) float32, normalised
    positives: Tensor  # (N, A) bool, at least one True in each row
    negatives: Tensor  # (N, A) bool, never True where positives is


def anchored_reward(embeddings: Tensor, anchors: Anchors, temperature: float) -> Tensor:
    """Return how much more likely than by chance the positive is picked among all anchors.

    In plain terms: a rewrite is good if its embedding is nearer to the positive than to the other anchors.

    ``R = logsumexp_{a in P}(e.a / tau) - logsumexp_{a in P or N}(e.a / tau) + log(|P or N| / |P|)``

    Args:
        embeddings: (N, D) float32, normalised.
        anchors: With one positive of each rewrite, or several (rollouts of the other side).
        temperature: Divisor tau of the cosines, > 0.

    Returns:
        (N,) float32 in nats; 0 if all anchors are equally near.

    Raises:
        ValueError: If the temperature is not positive, or a rewrite has no positive.

    Paper: discriminative embeddings as stable anchors are RIME's (arXiv 2604.22280); the formula is ours. The
    last term, which is constant for an item, sets chance to 0. A malformed rewrite, worth 0, then beats a
    well-formed one only if the latter picks its positive with less than exp(-w_f / w_e) times chance.

    Source: ours, with the anchors of RIME, arXiv 2604.22280.

    Example:
        >>> import torch
        >>> anchors = Anchors(torch.eye(2), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> round(anchored_reward(torch.tensor([[1.0, 0.0]]), anchors, temperature=1.0).item(), 4)
        0.3799
    """
    _check(anchors, temperature)
    scores = embeddings @ anchors.embeddings.T / temperature  # (N, A)
    hit = scores.masked_fill(~anchors.positives, float("-inf")).logsumexp(dim=1)  # (N,)
    everything = scores.masked_fill(~(anchors.positives | anchors.negatives), float("-inf"))
    num_anchors = (anchors.positives | anchors.negatives).sum(dim=1).to(scores.dtype)  # (N,)
    chance = anchors.positives.sum(dim=1) / num_anchors
    return hit - everything.logsumexp(dim=1) - chance.log()


def rank_margin_reward(embeddings: Tensor, anchors: Anchors) -> Tensor:
    """Return the reward of UME-R1: share of positives among the nearest anchors, times the similarity gap.

    In plain terms: a rewrite is good if it ranks its positives first, and clearly before the others.

    ``R = (positives among the |P| nearest / |P|) * (mean_{p} e.p - mean_{n} e.n)``

    The reward is not monotone: if the gap is negative, a better rank lowers it.

    Args:
        embeddings: (N, D) float32, normalised.
        anchors: In UME-R1 the rollouts of the other side: G positives, those of the other items as negatives.

    Returns:
        (N,) float32, without unit. A negative that ties with a positive ranks before it.

    Raises:
        ValueError: If a rewrite has no positive or no negative, because a mean over none is not a number.

    Source: UME-R1, arXiv 2511.00405, reward of its RL stage: ranking and similarity gap.

    Example:
        >>> import torch
        >>> anchors = Anchors(torch.eye(2), torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> rank_margin_reward(torch.tensor([[0.8, 0.6]]), anchors)
        tensor([0.2000])
    """
    _check(anchors, 1.0)
    if not bool(anchors.negatives.any(dim=1).all()):
        raise ValueError("Each rewrite must have a negative among the anchors: add items or an anchor table.")
    scores = embeddings @ anchors.embeddings.T  # (N, A)
    count = anchors.positives.sum(dim=1)  # (N,)
    negatives = scores.masked_fill(~anchors.negatives, float("-inf")).unsqueeze(1)
    ahead = (negatives >= scores.unsqueeze(2)).sum(dim=2)  # (N, A): negatives before each anchor
    others = scores.masked_fill(~anchors.positives, float("-inf"))
    place = ahead + (others.unsqueeze(1) > scores.unsqueeze(2)).sum(dim=2)  # (N, A), from 0
    among = ((place < count.unsqueeze(1)) & anchors.positives).sum(dim=1).to(scores.dtype) / count  # (N,)
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
    """Return the sum of all parts of the reward.

    In plain terms: a rewrite must end by itself to earn anything, and may pay for each token too many.

    ``R = w_f F + F w_e R_emb - w_l max(0, (len - L0) / L0)``

    Args:
        embedding_reward: (N,) float32, R_emb.
        well_formed: (N,) bool, F: the rewrite is not empty, and the model itself wrote <gen_emb>.
        lengths: (N,) tokens of the rewrite.
        weight_format, weight_embedding, weight_length: w_f, w_e, w_l.
        free_length: L0, number of tokens that cost nothing, > 0.

    Returns:
        (N,) float32.

    Paper: ours.

    Source: ours; a reward for the format as in UME-R1, arXiv 2511.00405.

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
    check_temperature(temperature)
    if not bool(anchors.positives.any(dim=1).all()):
        raise ValueError("Each rewrite must have a positive among the anchors.")
