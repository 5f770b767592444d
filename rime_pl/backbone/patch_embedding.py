"""The patch embedding of the vision tower as a matrix product.

Called by mllm.py and miniature/tiny.py when they build a model. transformers writes it as a convolution whose
kernel is as large as a patch. On a CPU, and in bfloat16, that takes several times as long as the product that
it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def embed_patch(proj: nn.Conv3d, patches: Tensor) -> Tensor:
    """Return the embeddings (P, D) of P flat patches (P, C): the convolution, with the same parameters.

    >>> import torch
    >>> proj, patches = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), torch.ones(5, 96)
    >>> torch.allclose(embed_patch(proj, patches), proj(patches.view(5, 3, 2, 4, 4)).view(5, 8), atol=1e-5)
    True
    """
    weight = proj.weight.flatten(1)  # (D, C)
    return F.linear(patches.to(weight.dtype), weight, proj.bias)


def multiply_patches(model: Any) -> None:
    """Make the vision tower of a Qwen2-VL or Qwen3-VL use :func:`embed_patch`; names and values stay."""
    embedding = model.model.visual.patch_embed
    if isinstance(embedding.proj, nn.Conv3d):
        embedding.forward = partial(embed_patch, embedding.proj)
