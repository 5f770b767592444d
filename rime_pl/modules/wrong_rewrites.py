"""Rewrites that are not the item's own: another item's, or an empty one.

CMA trains against them (the decisive term), and every stage evaluates with them (the rewrite ablation).
``metrics.derangement`` chooses the other item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions


def empty_completions(rows: int, width: int, processor: RimeProcessor, device: torch.device) -> Completions:
    """Return empty rewrites: only <gen_emb> and end of turn, padded to ``width`` >= 2 tokens."""
    ids = torch.full((rows, width), processor.pad_id, device=device)
    ids[:, 0], ids[:, 1] = processor.gen_id, processor.turn_end_id
    mask = torch.zeros_like(ids)
    mask[:, :2] = 1
    return Completions(ids, mask)


def completions_of(
    tokens: Sequence[Sequence[int] | None], processor: RimeProcessor, device: torch.device
) -> Completions:
    """Return rewrites as they were written, padded on the right; None becomes the empty rewrite.

    Args:
        tokens: The tokens of R completions, with <gen_emb> and end of turn.
        processor: Knows the tokens of the empty rewrite.
        device: Where the tensors go.
    """
    width = max(len(row or "..") for row in tokens)
    completions = empty_completions(len(tokens), width, processor, device)
    for number, row in enumerate(tokens):
        if row is not None:
            completions.ids[number, : len(row)] = torch.tensor(row, device=device)
            completions.mask[number, : len(row)] = 1
    return completions
