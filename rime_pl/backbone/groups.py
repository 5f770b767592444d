"""Several completions behind one prompt, in one row: the prompt is computed once.

Called by mllm.py. Each completion sees the prompt and itself, and its positions continue at the end of the
prompt.

Shape legend: R prompts, P prompt tokens, L all tokens of a row: its prompt and its completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Kernels of attention that accept a mask of our own; with another one each completion needs its own row.
TAKE_MASKS = ("sdpa", "eager")


def shared_prompt_mask(valid: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: 0 where a token attends to another, else the lowest number.

    A token attends to earlier tokens of the prompt and of its own completion.

    Args:
        valid: (R, L), 0 at padding.
        widths: Tokens of each completion, with padding; the prompt has the rest.
        dtype: Of the scores.

    Returns:
        (R, 1, L, L), query by key. Each token, also padding, attends to itself: no softmax is empty.

    Example:
        >>> mask = shared_prompt_mask(torch.tensor([[0, 1, 1, 1, 1]]), [1, 2], torch.float32)
        >>> (mask == 0).int()[0, 0].tolist()
        [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]
    """
    length, device = valid.shape[1], valid.device
    part = torch.arange(len(widths) + 1, device=device)  # 0 is the prompt
    tokens = torch.tensor([length - sum(widths), *widths], device=device)
    segment = part.repeat_interleave(tokens, output_size=length)  # (L,)
    related = (segment == 0) | (segment == segment.unsqueeze(1))  # (L, L)
    seen = related.tril() & valid.bool().unsqueeze(1)  # (R, L, L)
    seen |= torch.eye(length, dtype=torch.bool, device=device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def continued_positions(prompt: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the rotary positions (3, R, L) of prompts (3, R, P) and their completions.

    >>> continued_positions(torch.tensor([[[0, 1]]] * 3), [1, 2])[0].tolist()
    [[0, 1, 2, 2, 3]]
    """
    after = torch.cat([torch.arange(width, device=prompt.device) for width in widths])
    return torch.cat([prompt, prompt[:, :, -1:] + 1 + after], dim=2)
