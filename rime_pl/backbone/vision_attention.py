"""Attention of the vision tower in one call for all pictures of the same size.

Called by mllm.py and miniature/tiny.py when they build a model. Without a flash kernel, transformers calls
scaled-dot-product attention once per picture; with many small pictures, the calls take more time than the
computation.

Shape legend: P patches of all pictures together, H heads, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

#: transformers gives all pictures with their borders only to kernels with "flash" in their name.
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
    """Let every patch attend to the patches of its own picture.

    Args:
        module: Not used; transformers passes it to every kernel.
        query, key, value: (1, H, P, W).
        attention_mask: None, because the borders replace it.
        scaling: Factor of the scores.
        cu_seq_lens_q: (pictures + 1,) int, borders of the pictures, from 0 to P.

    Returns:
        (1, P, H, W), and None in place of attention weights.

    Source: the signature is that of the flash kernels in transformers; the results are those of SDPA.
    """
    by_length: dict[int, list[Tensor]] = {}
    for rows in torch.arange(query.shape[2], device=query.device).split(cu_seq_lens_q.diff().tolist()):
        by_length.setdefault(len(rows), []).append(rows)
    found, places = [], []
    for length, pictures in by_length.items():
        place = torch.cat(pictures)
        # (pictures, H, length, W); no patch has to be moved if all pictures have the same size
        q, k, v = (
            (part[0] if len(by_length) == 1 else part[0, :, place])
            .unflatten(1, (len(pictures), length))
            .transpose(0, 1)
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # (pictures, H, length, W)
        found.append(mixed.transpose(1, 2).flatten(0, 1))
        places.append(place)
    if len(found) == 1:
        return found[0].unsqueeze(0), None
    return torch.cat(found)[torch.cat(places).argsort()].unsqueeze(0), None


def attend_pictures_together(model: Any) -> None:
    """Make the vision tower of a Qwen2-VL or Qwen3-VL use :func:`attend_by_size` in place of SDPA."""
    AttentionInterface.register(BY_SIZE, attend_by_size)
    model.model.visual.config._attn_implementation = BY_SIZE
