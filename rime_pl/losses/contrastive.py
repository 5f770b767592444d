"""The contrastive loss between two sets of embeddings, symmetric, with false negatives masked.

Called by the modules with gathered tensors, for gen-gen, disc-disc and, in CMA, across the modes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def same_content(query_content: Tensor, target_content: Tensor, rows: Tensor | None = None) -> Tensor:
    """Which off-diagonal pairs (query i, target j) are not negatives.

    The target of j answers query i when the two targets, or the two queries, have the same content: bytes
    do not tell twins apart.

    Args:
        query_content: (B,) int64 content ids of the queries.
        target_content: (B,) int64 content ids of their targets.
        rows: (R,) int64, the queries asked about; None for all of them.

    Returns:
        (R, B) bool; with all rows symmetric, False on the diagonal.

    Example:
        >>> same_content(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8]))
        tensor([[False,  True, False],
                [ True, False, False],
                [False, False, False]])
    """
    index = torch.arange(len(query_content), device=query_content.device)
    rows = index if rows is None else rows
    same = query_content[rows].unsqueeze(1) == query_content
    same = same | (target_content[rows].unsqueeze(1) == target_content)
    return same & (rows.unsqueeze(1) != index)


def info_nce(
    queries: Tensor,
    targets: Tensor,
    temperature: float,
    contents: Tensor | None = None,
    block_size: int = 1 << 20,
) -> Tensor:
    """Symmetric InfoNCE; row i of ``targets`` is the positive of row i of ``queries``.

    ``NCE(A, B) = 1/2 mean_i [ -log softmax_j(a_i.b_j / tau)_i - log softmax_j(b_i.a_j / tau)_i ]``

    A matrix of more than ``block_size`` scores is never kept: row blocks, made again in the backward pass.

    Args:
        queries, targets: (B, D) normalised, float32.
        temperature: The divisor tau, > 0.
        contents: (B, 2) int64 content ids of each query and its target; pairs of :func:`same_content` are no
            negatives and are left out of the sums.
        block_size: Scores held at a time, >= 1 (at least one row of them is).

    Returns:
        Scalar, in nats; 0 without rows.

    Raises:
        ValueError: If the temperature is not positive.

    Source: arXiv 2511.00405 (ancestor of RIME), tau 0.02. Differences: twins are masked; row blocks.

    Example:
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)
        0.7437
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0, block_size=4).item(), 4)
        0.7437
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; it divides the cosines.")
    if not len(queries):
        return (queries.sum() + targets.sum()) * 0.0  # 0 that still hangs on its inputs, as DDP wants
    rows = max(1, block_size // len(queries))
    total = queries.new_zeros(())
    for one, other in ((queries, targets), (targets, queries)):
        for number, block in enumerate(one.split(rows)):
            inputs = (block, other, temperature, contents, number * rows)
            if rows >= len(queries):
                total = total + _one_direction(*inputs)
            else:
                total = total + checkpoint(
                    _one_direction, *inputs, use_reentrant=False, preserve_rng_state=False
                )
    return 0.5 * total / len(queries)


def _one_direction(
    block: Tensor, others: Tensor, temperature: float, contents: Tensor | None, first: int
) -> Tensor:
    """Summed cross-entropy of rows ``first``, ``first + 1``, ... against all rows of the other side."""
    scores = block @ others.T / temperature
    index = torch.arange(first, first + len(block), device=block.device)
    if contents is not None:
        twins = same_content(contents[:, 0], contents[:, 1], index)
        scores = scores.masked_fill(twins, float("-inf"))
    return F.cross_entropy(scores, index, reduction="sum")
