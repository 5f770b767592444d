"""Gives each row another row of other content, so that it can take that row's rewrite.

Called by modules/cma.py for the wrong rewrites of a batch, and by callbacks/retrieval_recall.py for the
rewrite ablation of a whole split.
"""

from __future__ import annotations

import torch
from torch import Tensor


def derange(content: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return for each row the nearest following row (cyclically) of other content, or itself without one.

    Time and memory are linear in the number of rows, apart from a binary search.

    Args:
        content: (R,) int64 content ids.
        allowed: (R,) bool, the rows that may be picked; None for all.

    Returns:
        (R,) int64 row numbers.

    Source: ours.

    Example:
        >>> derange(torch.tensor([4, 4, 5, 6])).tolist()
        [2, 2, 3, 0]
        >>> derange(torch.tensor([4, 4, 4])).tolist()
        [0, 1, 2]
    """
    index = torch.arange(len(content), device=content.device)
    offered = index if allowed is None else allowed.nonzero()[:, 0]  # (M,), ascending
    if not len(offered):
        return index
    place = torch.searchsorted(offered, index, right=True) % len(offered)  # of the next row that is allowed
    twice = content[offered].repeat(2)  # so that a run may go on behind the last row
    ends = (twice[1:] != twice[:-1]).nonzero()[:, 0] + 1  # where a run of equal content has ended
    if len(ends):
        behind = ends[torch.searchsorted(ends, place, right=True)] % len(offered)  # of the run at ``place``
        place = torch.where(content[offered[place]] == content, behind, place)
    partner = offered[place]
    return partner.where(content[partner] != content, index)
