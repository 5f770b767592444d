"""Several completions behind one prompt, which goes through the model once.

Called by mllm.py; packing.py beside it has the usual case of one completion. The row of all tokens holds
those of all prompts, then those of all completions. A token of a prompt attends to earlier ones of it. A
token of a completion attends to the whole prompt and to earlier tokens of its own completion, and its
position continues at the end of the prompt. The completions of a prompt never meet in attention: with P
tokens of the prompt and G completions of C tokens, there are P * P + G * C * (P + C) scores and not
(P + G * C) squared. Completions of similar length attend in one call, whatever part they belong to. The price
is memory: each completion has a copy of its prompt's keys and values while its layer computes, and without
gradient checkpointing until the backward pass.

Shape legend: R prompts, P tokens of the longest one; a part is R * G completions, G behind each prompt, of up
to C tokens; S completions of all parts, K of them in a group, of up to T tokens; N tokens of all without
padding; H heads, W width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
    behind: Packing  # S rows
    parts: tuple[tuple[int, int], ...]  # of each part: completions, tokens of the longest
    read: tuple[Tensor, ...]  # of each group of completions, (K,) int64: the prompt of each
    masks: tuple[Tensor, ...]  # of each group, (K, 1, T, P + T): what attention adds to the scores

    @classmethod
    def of(cls, prompts: Tensor, behind: Sequence[Tensor], dtype: torch.dtype) -> SharedPrompts:
        """Return it for rows that are 0 at padding.

        Args:
            prompts: (R, P), with padding on the left.
            behind: (R * G, C) of each part, with padding on the right.
            dtype: Of the scores.
        """
        every = _stack(behind)
        completions = Packing.of(every)
        rows = torch.arange(len(prompts), device=prompts.device)
        of_prompt = torch.cat([rows.repeat_interleave(len(part) // len(prompts)) for part in behind])
        groups = completions.rows()
        read = tuple(of_prompt[group] for group in groups)
        masks = tuple(
            completion_mask(prompts[owners], every[group, :longest], dtype)
            for owners, group, (_, longest) in zip(read, groups, completions.groups, strict=True)
        )
        parts = tuple((part.shape[0], part.shape[1]) for part in behind)
        return cls(Packing.of(prompts), completions, parts, read, masks)

    def with_masks(self, dtype: torch.dtype) -> SharedPrompts:
        """Return it for a kernel that knows no causal attention."""
        return replace(self, prompts=self.prompts.with_masks(dtype))

    def pick(self, *values: Tensor) -> Tensor:
        """Return values (..., R, P), and those of each part, in one row without padding: (..., 1, N)."""
        read, *written = values
        return torch.cat([self.prompts.pick(read), self.behind.pick(_stack(written))], dim=-1)

    def put_back(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states (1, N, D) as (R, P, D), and (R * G, C, D) of each part; 0 at padding."""
        of_prompts, of_completions = self._split(hidden, 1)
        (read,), (written,) = self.prompts.put_back(of_prompts), self.behind.put_back(of_completions)
        apart = written.split([count for count, _ in self.parts])
        return read, *(part[:, :width] for part, (_, width) in zip(apart, self.parts, strict=True))

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every token (1, H, N, W) attend to those that it may see, and return (1, N, H, W)."""
        halves = [self._split(states, 2) for states in (query, key, value)]
        (of_prompts, keys, values), completions = ([half[at] for half in halves] for at in range(2))
        mixed = self.prompts.attend(kernel, of_prompts, keys, values)
        prompts = [_padded(self.prompts, states) for states in (keys, values)]
        apart = zip(*(self.behind.take_apart(states) for states in completions), strict=True)
        found = [
            kernel(
                asking,
                *(torch.cat([read[owners], own], dim=2) for read, own in zip(prompts, known, strict=True)),
                mask,
            )
            for (asking, *known), owners, mask in zip(apart, self.read, self.masks, strict=True)
        ]
        return torch.cat([mixed, self.behind.bring_together(found)], dim=1)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        return values.split([len(self.prompts.columns), len(self.behind.columns)], dim)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Return values (..., R * G, C) of each part as those of one, (..., S, width of the widest)."""
    widest = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, widest - part.shape[-1])) for part in parts], dim=-2)


def _padded(packing: Packing, states: Tensor) -> Tensor:
    """Return states (1, H, N, W) of packed rows at their places in padded rows, (R, H, L, W)."""
    heads, width = states.shape[1], states.shape[3]
    (rows,) = packing.put_back(states.transpose(1, 2).flatten(2))  # (R, L, H * W)
    return rows.unflatten(2, (heads, width)).transpose(1, 2)


def completion_mask(prompts: Tensor, completions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to the scores: 0 where a token is seen, else the lowest number.

    Args:
        prompts: (K, P) of each completion, or one of all (1, P); 0 at padding.
        completions: (K, T), 0 at padding, which is on the right.
        dtype: Of the scores.

    Returns:
        (K, 1, T, P + T), query by key.

    Example:
        >>> mask = completion_mask(torch.tensor([[0, 1]]), torch.tensor([[1, 1], [1, 0]]), torch.float32)
        >>> (mask == 0).int()[0, 0].tolist()
        [[0, 1, 1, 0], [0, 1, 1, 1]]
    """
    rows, width = completions.shape
    read = prompts.bool().unsqueeze(1).expand(rows, width, -1)
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
