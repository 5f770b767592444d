"""Rewrites that are not the item's own: another item's, or an empty one.

CMA trains against them (the decisive term), and every stage evaluates with them (the rewrite ablation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions


def derange(content: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return for each row the nearest following row (cyclically) of other content, or itself without one.

    Args:
        content: (R,) int64 content ids.
        allowed: (R,) bool, the rows that may be picked; None for all.

    Returns:
        (R,) int64 row numbers.

    Example:
        >>> derange(torch.tensor([4, 4, 5, 6])).tolist()
        [2, 2, 3, 0]
    """
    rows = len(content)
    index = torch.arange(rows, device=content.device)
    step = (index.unsqueeze(1) + 1 + index) % rows  # (R, R): row i, then its followers in order
    differs = content[step] != content.unsqueeze(1)  # (R, R)
    if allowed is not None:
        differs &= allowed[step]
    return step[index, differs.int().argmax(dim=1)].where(differs.any(dim=1), index)


def empty_completions(rows: int, width: int, processor: RimeProcessor, device: torch.device) -> Completions:
    """Return empty rewrites: only <gen_emb> and end of turn, padded to ``width`` >= 2 tokens."""
    ids = torch.full((rows, width), processor.pad_id, device=device)
    ids[:, 0], ids[:, 1] = processor.gen_id, processor.turn_end_id
    mask = torch.zeros_like(ids)
    mask[:, :2] = 1
    return Completions(ids, mask)
