"""The nearest candidates of each query, in blocks: memory does not grow with queries times candidates.

Called by choosing.py. A pass over 100,000 x 100,000 scores never holds more than a block of them.

Shape legend: Q queries, N candidates, K nearest ones, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Candidates whose scores are computed at once.
BLOCK = 4096
_LOW = 0xFFFFFFFF  # the lower half of a key: the row, counted from the end


def nearest(
    queries: Tensor, candidates: Tensor, k: int, device: torch.device | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Return the K candidates with the highest scores of each query, and their scores.

    ``s_qn = q . c_n``, sorted by ``(-s, n)``: of equal scores the candidate that comes first is nearer, so
    the result does not depend on the block.

    Args:
        queries: (Q, D) float32, normalised if the scores shall be cosines.
        candidates: (N, D) float32; they may stay in main memory.
        k: K; at most N are returned.
        device: Device that computes the scores (default: that of the queries). It holds a block of
            candidates at a time.
        block: Candidates of a block.

    Returns:
        Scores (Q, K) float32 and rows of ``candidates`` (Q, K) int64, on that device.

    Example:
        >>> scores, rows = nearest(torch.ones(1, 1), torch.tensor([[0.5], [2.0], [0.5], [-1.0]]), 3)
        >>> scores.tolist(), rows.tolist()
        ([[2.0, 0.5, 0.5]], [[1, 0, 2]])
    """
    device = device or queries.device
    wide = queries.to(device)
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    for start in range(0, len(candidates), block):
        part = candidates[start : start + block].to(device)
        keys = torch.cat([best, _keys(wide @ part.T, start)], dim=1)
        best = keys.topk(min(k, keys.shape[1]), dim=1, sorted=True).values
    return _scores(best), _LOW - (best & _LOW)


def _keys(scores: Tensor, start: int) -> Tensor:
    """Return int64 keys that sort as ``(score, -row)``: no two are equal, so no tie is left to chance.

    A float32 keeps its order as an integer if the lower bits of negative numbers are flipped.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which is the same score
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rows = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (ordered.long() << 32) | (_LOW - rows)


def _scores(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
