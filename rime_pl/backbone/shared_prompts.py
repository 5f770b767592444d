"""Several completions behind one prompt, which goes through the model once.

Called by mllm.py; packing.py beside it has the usual case of one completion. The row of all tokens holds
those of all prompts, then those of all completions. A token of a prompt attends to earlier ones of it. A
token of a completion attends to the whole prompt and to earlier tokens of its own completion, and its
position continues at the end of the prompt. The completions of a prompt never meet in attention: with P
tokens of the prompt and G completions of C tokens, there are P * P + G * C * (P + C) scores and not
(P + G * C) squared. The price is memory: each completion has a copy of its prompt's keys and values while its
layer computes, and without gradient checkpointing until the backward pass.

Shape legend: R prompts, P tokens of the longest one; a part is R * G completions, G behind each prompt, of up
to C tokens; N tokens of all without padding; H heads, W width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rime_pl.backbone.packing import Kernel, Packing


@dataclass(frozen=True)
class SharedPrompts:
    """Where the tokens of prompts, and of the parts behind them, stand once they are in one row.

    >>> prompts, completions = torch.tensor([[0, 1]]), torch.tensor([[1, 1], [1, 0]])
    >>> shared = SharedPrompts.of(prompts, [completions], torch.float32)
    >>> shared.pick(torch.tensor([[0, 5]]), torch.tensor([[6, 7], [8, 0]])).tolist()
    [[5, 6, 7, 8]]
    """

    prompts: Packing  # R rows
    behind: tuple[Packing, ...]  # of each part, R * G rows
    masks: tuple[Tensor, ...]  # of each part, (R * G, 1, C, P + C): what attention adds to the scores

    @classmethod
    def of(cls, prompts: Tensor, behind: Sequence[Tensor], dtype: torch.dtype) -> SharedPrompts:
        """Return it for rows that are 0 at padding.

        Args:
            prompts: (R, P), with padding on the left.
            behind: (R * G, C) of each part, with padding on the right.
            dtype: Of the scores.
        """
        masks = tuple(completion_mask(prompts, part, dtype) for part in behind)
        return cls(Packing.of(prompts), tuple(Packing.of(part) for part in behind), masks)

    def with_masks(self, dtype: torch.dtype) -> SharedPrompts:
        """Return it for a kernel that knows no causal attention."""
        return SharedPrompts(self.prompts.with_masks(dtype), self.behind, self.masks)

    def pick(self, *values: Tensor) -> Tensor:
        """Return values (..., R, P), and those of each part, in one row without padding: (..., 1, N)."""
        pairs = zip((self.prompts, *self.behind), values, strict=True)
        return torch.cat([packing.pick(each) for packing, each in pairs], dim=-1)

    def put_back(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states (1, N, D) as (R, P, D), and (R * G, C, D) of each part; 0 at padding."""
        pairs = zip((self.prompts, *self.behind), self._split(hidden, 1), strict=True)
        return tuple(part for packing, each in pairs for part in packing.put_back(each))

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every token (1, H, N, W) attend to those that it may see, and return (1, N, H, W)."""
        (of_prompts, *queries), keys, values = (self._split(states, 2) for states in (query, key, value))
        mixed = [self.prompts.attend(kernel, of_prompts, keys[0], values[0])]
        read = [_padded(self.prompts, states[0]) for states in (keys, values)]
        for number, (packing, mask) in enumerate(zip(self.behind, self.masks, strict=True)):
            whole = [
                _behind(prompt, _padded(packing, states[number + 1]))
                for prompt, states in zip(read, (keys, values), strict=True)
            ]
            found = kernel(_padded(packing, queries[number]), *whole, mask)  # (R * G, C, H, W)
            mixed.append(found.flatten(0, 1)[packing.columns].unsqueeze(0))
        return torch.cat(mixed, dim=1)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        return values.split([len(packing.columns) for packing in (self.prompts, *self.behind)], dim)


def _padded(packing: Packing, states: Tensor) -> Tensor:
    """Return states (1, H, N, W) of packed rows at their places in padded rows, (R, H, L, W)."""
    heads, width = states.shape[1], states.shape[3]
    (rows,) = packing.put_back(states.transpose(1, 2).flatten(2))  # (R, L, H * W)
    return rows.unflatten(2, (heads, width)).transpose(1, 2)


def _behind(prompts: Tensor, completions: Tensor) -> Tensor:
    """Return states of prompts (R, H, P, W), with those of each completion behind: (R * G, H, P + C, W)."""
    grouped = completions.unflatten(0, (len(prompts), -1))  # (R, G, H, C, W)
    read = prompts.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1, -1)
    return torch.cat([read, grouped], dim=3).flatten(0, 1)


def completion_mask(prompts: Tensor, completions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to the scores: 0 where a token is seen, else the lowest number.

    Args:
        prompts: (R, P), 0 at padding.
        completions: (R * G, C), 0 at padding, which is on the right.
        dtype: Of the scores.

    Returns:
        (R * G, 1, C, P + C), query by key.

    Example:
        >>> mask = completion_mask(torch.tensor([[0, 1]]), torch.tensor([[1, 1], [1, 0]]), torch.float32)
        >>> (mask == 0).int()[0, 0].tolist()
        [[0, 1, 1, 0], [0, 1, 1, 1]]
    """
    rows, width = completions.shape
    read = prompts.bool().repeat_interleave(rows // len(prompts), dim=0).unsqueeze(1).expand(-1, width, -1)
    own = torch.ones(rows, width, width, dtype=torch.bool, device=prompts.device).tril()
    seen = torch.cat([read, own], dim=2)
    mask = torch.zeros(seen.shape, dtype=dtype, device=prompts.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)


def continued_positions(prompts: Tensor, completions: Tensor) -> Tensor:
    """Return the rotary positions (3, R * G, C) of completions behind prompts with positions (3, R, P).

    >>> continued_positions(torch.tensor([[[0, 1]]] * 3), torch.zeros(2, 2))[0].tolist()
    [[2, 3], [2, 3]]
    """
    rows, width = completions.shape
    after = prompts[:, :, -1:].repeat_interleave(rows // prompts.shape[1], dim=1) + 1
    return after + torch.arange(width, device=prompts.device)
