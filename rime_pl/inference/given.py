"""Embeds items generatively with rewrites that are given, where the model would write its own.

Called by `rime rewrite`, which measures whether a rewrite raises the similarity of its pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rime_pl.backbone.lora import merged
from rime_pl.inference.retriever import Retriever
from rime_pl.types import Item


def encode_given(model: Retriever, items: Sequence[Item], batch_size: int = 32) -> Tensor:
    """Return the generative embeddings of items with the rewrites that they hold.

    Args:
        model: The trained model.
        items: N items with opened pictures, each with a rewrite.
        batch_size: Largest number of items in a forward.

    Returns:
        (N, D) float32 on the CPU, L2-normalised.

    Raises:
        DataError: If a text or a rewrite holds a special token, or a rewrite is too long for the model.
    """
    backbone = model.backbone
    device = next(backbone.parameters()).device
    found = []
    with torch.no_grad(), merged(backbone):
        for start in range(0, len(items), batch_size):
            rows = items[start : start + batch_size]
            prompts = backbone.processor.prompts(rows)
            completions = backbone.processor.completions([item.rewrite for item in rows])
            vectors = backbone(prompts.to(device), completions.to(device)).gen
            found.append(vectors.float().cpu())
    return torch.cat(found)
