"""Read an embedding: the hidden state at one token of each row, normalised.

Called by mllm.py. A row without the token gets the zero vector and is
reported; no other position is used for it.

Shape legend: R rows, L tokens of a row, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def first_position(token_ids: Tensor, mask: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """Return the first position of a token in each row, within the mask.

    Args:
        token_ids: (R, L) int64.
        mask: (R, L), non-zero where a token counts.
        token_id: The token to find.

    Returns:
        Position (R,) int64, 0 where the token is missing; found (R,) bool.

    Example:
        >>> first_position(torch.tensor([[5, 7, 7], [7, 5, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), 7)
        (tensor([1, 0]), tensor([ True, False]))
    """
    hits = (token_ids == token_id) & mask.bool()
    return hits.int().argmax(dim=1), hits.any(dim=1)


def pool_at(hidden: Tensor, position: Tensor, found: Tensor) -> Tensor:
    """Return the L2-normalised hidden state at one position of each row, in float32.

    Args:
        hidden: (R, L, D), any float type.
        position: (R,) int64.
        found: (R,) bool; a row where it is False becomes the zero vector, with cosine 0 to everything.

    Returns:
        (R, D) float32.

    Source: last-layer state at ``<disc_emb>`` / ``<gen_emb>``, UME-R1, arXiv 2511.00405.
    """
    picked = hidden[torch.arange(len(hidden), device=hidden.device), position].float()
    return F.normalize(picked, dim=-1) * found.unsqueeze(-1)
