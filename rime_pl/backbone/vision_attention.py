"""The vision tower's attention in one call for all pictures of a size.

transformers calls scaled-dot-product attention once for each picture, unless a flash kernel is installed. For
many small pictures these calls cost more than what they compute.

Shape legend: P patches of all pictures together, H heads, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

#: "flash" in a name is how transformers tells the kernels that take all pictures with their borders.
BY_SIZE = "flash_by_size"


def attend_by_size(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Every patch attends to the patches of its own picture.

    Args:
        query, key, value: (1, H, P, W).
        attention_mask: None: the borders say everything.
        scaling: Factor of the scores.
        cu_seq_lens_q: (pictures + 1,) borders of the pictures, from 0 to P.

    Returns:
        (1, P, H, W), and no weights.

    Source: the call that transformers makes to its flash kernels; the numbers are those of SDPA.
    """
    by_length: dict[int, list[Tensor]] = {}
    for rows in torch.arange(query.shape[2], device=query.device).split(cu_seq_lens_q.diff().tolist()):
        by_length.setdefault(len(rows), []).append(rows)
    found, places = [], []
    for length, pictures in by_length.items():
        place = torch.cat(pictures)
        # (pictures, H, length, W); all patches in order when the pictures are of one size
        q, k, v = (
            (part[0] if len(by_length) == 1 else part[0, :, place])
            .unflatten(1, (len(pictures), length))
            .transpose(0, 1)
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        found.append(mixed.transpose(1, 2).flatten(0, 1))
        places.append(place)
    if len(found) == 1:
        return found[0].unsqueeze(0), None
    return torch.cat(found)[torch.cat(places).argsort()].unsqueeze(0), None


def attend_pictures_together(model: Any) -> None:
    """Switch the vision tower of a Qwen2-VL or Qwen3-VL from SDPA to :func:`attend_by_size`."""
    AttentionInterface.register(BY_SIZE, attend_by_size)
    model.model.visual.config._attn_implementation = BY_SIZE
