"""The contrastive loss between two sets of embeddings, symmetric, with false negatives masked.

Called by the modules with gathered tensors, for gen-gen, disc-disc and, in CMA, across the modes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_content(query_content: Tensor, target_content: Tensor) -> Tensor:
    """Which off-diagonal pairs (query i, target j) are not negatives.

    The target of j answers query i when the two targets, or the two queries, have the same content: bytes
    do not tell twins apart.

    Args:
        query_content: (B,) int64 content ids of the queries.
        target_content: (B,) int64 content ids of their targets.

    Returns:
        (B, B) bool, symmetric, False on the diagonal.

    Example:
        >>> same_content(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8]))
        tensor([[False,  True, False],
                [ True, False, False],
                [False, False, False]])
    """
    same = query_content.unsqueeze(1) == query_content
    same = same | (target_content.unsqueeze(1) == target_content)
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


def info_nce(
    queries: Tensor, targets: Tensor, temperature: float, false_negatives: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE; row i of ``targets`` is the positive of row i of ``queries``.

    ``NCE(A, B) = 1/2 mean_i [ -log softmax_j(a_i.b_j / tau)_i - log softmax_j(b_i.a_j / tau)_i ]``

    Args:
        queries: (B, D) normalised, float32.
        targets: (B, D) normalised, float32.
        temperature: The divisor tau, > 0.
        false_negatives: (B, B) bool; True pairs are left out of the sums. Must be False on the diagonal.

    Returns:
        Scalar, in nats; 0 without rows.

    Raises:
        ValueError: If the temperature is not positive.

    Source: arXiv 2511.00405 (ancestor of RIME), tau 0.02. Differences: the mask of twins.

    Example:
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)
        0.7437
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; it divides the cosines.")
    scores = queries @ targets.T / temperature
    if false_negatives is not None:
        scores = scores.masked_fill(false_negatives, float("-inf"))
    if not len(scores):
        return scores.sum()  # 0 that still hangs on its inputs, as DDP wants
    index = torch.arange(len(scores), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, index) + F.cross_entropy(scores.T, index))
