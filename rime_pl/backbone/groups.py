"""Several completions behind one prompt, in one row: the prompt is computed once.

Called by mllm.py. Each completion sees the prompt and itself, and its positions continue at the end of the
prompt.

Shape legend: R prompts, G completions of each, P prompt tokens, C completion tokens, L = P + G * C.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Kernels of attention that accept a mask of our own; with another one each completion needs its own row.
TAKE_MASKS = ("sdpa", "eager")


def shared_prompt_mask(valid: Tensor, prompt_length: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: 0 where a token attends to another, else the lowest number.

    A token attends to earlier tokens of the prompt and of its own completion.

    Args:
        valid: (R, L), 0 at padding.
        prompt_length: P.
        group: G.
        dtype: Of the scores.

    Returns:
        (R, 1, L, L), query by key. Each token, also padding, attends to itself: no softmax is empty.

    Example:
        >>> mask = shared_prompt_mask(torch.tensor([[0, 1, 1, 1]]), 2, 2, torch.float32)
        >>> (mask == 0).int()[0, 0].tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    place = torch.arange(valid.shape[1], device=valid.device)  # (L,)
    width = (len(place) - prompt_length) // group
    segment = (place - prompt_length).div(width, rounding_mode="floor").clamp(min=-1)  # -1 is the prompt
    related = (segment == -1) | (segment == segment.unsqueeze(1))  # (L, L)
    earlier = related & (place <= place.unsqueeze(1))
    seen = earlier & valid.bool().unsqueeze(1)  # (R, L, L)
    seen |= torch.eye(len(place), dtype=torch.bool, device=valid.device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=valid.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def continued_positions(prompt: Tensor, tokens: int, group: int) -> Tensor:
    """Return the rotary positions of prompts and their completions.

    Args:
        prompt: (3, R, P) int64.
        tokens: G * C.
        group: G.

    Returns:
        (3, R, L) int64.

    Example:
        >>> continued_positions(torch.tensor([[[0, 1]]] * 3), 4, 2)[0].tolist()
        [[0, 1, 2, 3, 2, 3]]
    """
    after = torch.arange(tokens // group, device=prompt.device).repeat(group)
    return torch.cat([prompt, prompt[:, :, -1:] + 1 + after], dim=2)
