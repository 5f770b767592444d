"""The tokens of all rows in one row, without padding; several completions share one prompt.

Called by mllm.py. Rows differ in length, and a linear layer has no use for padding, so all layers but
attention see the tokens of a batch one after the other. Attention takes them apart, each row by itself. Where
several completions stand behind one prompt, each sees the prompt and itself, and its positions continue at
the end of the prompt: the prompt is computed once.

Shape legend: R rows, L tokens of a row with padding on either side; without padding T tokens of the longest
row of a group and N of all rows; P tokens of a prompt, H heads, W width of a head, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rime_pl.errors import RimeError

#: Kernels of attention that accept a mask of our own; with a flash kernel each completion needs its own row.
TAKE_MASKS = ("sdpa", "eager")
#: A row goes into a group of attention if it is at least this part of the longest there.
SIMILAR = 0.75


@dataclass(frozen=True)
class Packing:
    """Where the tokens of R padded rows stand once they are in one row.

    For attention they are taken apart into groups of rows of similar length, each as long as its longest.

    >>> packing = Packing.of(torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]))
    >>> packing.pick(torch.tensor([[0, 5, 6, 0], [7, 0, 8, 9]])).tolist()
    [[5, 6, 7, 8, 9]]
    >>> packing.groups, packing.seats.tolist()
    (((1, 3), (1, 2)), [3, 4, 0, 1, 2])
    """

    columns: Tensor  # (N,) int64: the place of each token among the R * L of the padded rows
    seats: Tensor  # (N,) int64: its place among those of all groups, one group after the other
    groups: tuple[tuple[int, int], ...]  # of each group: rows, tokens of the longest
    lengths: Tensor  # (R,) int64: tokens of each row
    padded: int  # L
    masks: tuple[Tensor, ...] | None = None  # what attention adds to the scores; None: it is causal

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """Return the packing of rows (R, L) that are 0 at padding."""
        kept = valid.bool()
        lengths = kept.sum(dim=1)
        numbers = lengths.tolist()
        groups: list[tuple[int, int]] = []
        starts, end = [0] * len(numbers), 0
        for row in sorted(range(len(numbers)), key=lambda row: -numbers[row]):
            if not groups or numbers[row] < SIMILAR * groups[-1][1]:
                groups.append((0, numbers[row]))
            rows, longest = groups[-1]
            groups[-1] = rows + 1, longest
            starts[row], end = end, end + longest
        seats = torch.tensor(starts, device=valid.device).unsqueeze(1) + kept.cumsum(dim=1) - 1
        columns = kept.flatten().nonzero().squeeze(1)
        return cls(columns, seats[kept], tuple(groups), lengths, valid.shape[1])

    def with_masks(self, part: Tensor, dtype: torch.dtype) -> Packing:
        """Return the packing of rows in which several completions share a prompt.

        Args:
            part: (L,) from :func:`parts`.
            dtype: Of the scores.
        """
        apart = self._apart(self.pick(part.expand(len(self.lengths), -1))[0])
        return replace(self, masks=tuple(shared_prompt_mask(group, dtype) for group in apart))

    def pick(self, values: Tensor) -> Tensor:
        """Return values (..., R, L) in one row, without padding: (..., 1, N)."""
        return values.flatten(-2).index_select(-1, self.columns).unsqueeze(-2)

    def put_back(self, hidden: Tensor) -> Tensor:
        """Return hidden states (1, N, D) at their places in padded rows, (R, L, D); 0 at padding."""
        rows, width = len(self.lengths), hidden.shape[-1]
        padded = hidden.new_zeros(rows * self.padded, width).index_copy(0, self.columns, hidden[0])
        return padded.view(rows, self.padded, width)

    def take_apart(self, states: Tensor) -> list[Tensor]:
        """Return states (1, H, N, W) of each group, (R, H, T, W); 0 behind the tokens of a row."""
        return [group.transpose(1, 2) for group in self._apart(states[0].transpose(0, 1))]

    def bring_together(self, states: Sequence[Tensor]) -> Tensor:
        """Return states (R, T, H, W) of each group in one row, (1, N, H, W)."""
        return torch.cat([group.flatten(0, 1) for group in states])[self.seats].unsqueeze(0)

    def borders(self) -> dict[str, Any]:
        """Return what flash kernels in transformers ask for."""
        ends = F.pad(self.lengths.cumsum(0), (1, 0)).int()
        longest = self.groups[0][1]
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def _apart(self, values: Tensor) -> list[Tensor]:
        """Return values (N, ...) of each group, (R, T, ...); 0 behind the tokens of a row."""
        sizes = [rows * longest for rows, longest in self.groups]
        apart = values.new_zeros(sum(sizes), *values.shape[1:]).index_copy(0, self.seats, values)
        pairs = zip(apart.split(sizes), self.groups, strict=True)
        return [group.unflatten(0, shape) for group, shape in pairs]


def attend_apart(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    kernel: Any = sdpa_attention_forward,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Let every token attend to the tokens of its own row.

    Args:
        module: The attention layer.
        query, key, value: (1, H, N, W), or rows as usual if there is no packing.
        attention_mask: Only for rows without packing, which has its own.
        packing: Of the rows.
        kernel: The attention of transformers that does it.
        more: Its further arguments.

    Returns:
        (1, N, H, W), and None in place of attention weights.

    Source: the signature is that of the attention functions in transformers.
    """
    if packing is None:
        found: tuple[Tensor, Tensor | None] = kernel(module, query, key, value, attention_mask, **more)
        return found
    apart = zip(*(packing.take_apart(states) for states in (query, key, value)), strict=True)
    masks = packing.masks or [None] * len(packing.groups)
    pairs = zip(apart, masks, strict=True)
    return packing.bring_together([kernel(module, *group, mask, **more)[0] for group, mask in pairs]), None


def attend_apart_eagerly(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Do the same with the eager attention that the layer's own file has."""
    kernel = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return attend_apart(module, query, key, value, attention_mask, kernel=kernel, **more)


def pack_rows(model: Any, kernel: str) -> None:
    """Make the decoder of a Qwen2-VL or Qwen3-VL take packed rows.

    Raises:
        RimeError: If the kernel of attention does not take them.
    """
    if "flash" in kernel:  # they do by themselves
        return
    if kernel not in TAKE_MASKS:
        raise not_usable(kernel)
    attend, mask = (attend_apart, sdpa_mask) if kernel == "sdpa" else (attend_apart_eagerly, eager_mask)
    name = f"apart_{kernel}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.model.language_model.config._attn_implementation = name


def not_usable(kernel: str) -> RimeError:
    """Return the error that says which kernels of attention can be used."""
    return RimeError(
        "model.backbone.attn_implementation must be 'sdpa', 'eager' or a flash kernel that transformers "
        f"knows on this machine, but is {kernel!r}."
    )


def parts(prompt: int, widths: Sequence[int], device: torch.device) -> Tensor:
    """Return the part that each of L columns belongs to, (L,) int64: 0 is the prompt, 1 the first completion.

    >>> parts(2, [1, 2], torch.device("cpu")).tolist()
    [0, 0, 1, 2, 2]
    """
    number = torch.arange(len(widths) + 1, device=device)
    tokens = torch.tensor([prompt, *widths], device=device)
    return number.repeat_interleave(tokens, output_size=prompt + sum(widths))


def shared_prompt_mask(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention adds to its scores: 0 where a token attends to another, else the lowest number.

    A token attends to earlier tokens of the prompt, and to itself and earlier ones of its own completion.

    Args:
        part: (R, T) int64, from :func:`parts`; anything behind the tokens of a row.
        dtype: Of the scores.

    Returns:
        (R, 1, T, T), query by key.

    Example:
        >>> mask = shared_prompt_mask(torch.tensor([[0, 1, 2, 2]]), torch.float32)
        >>> (mask == 0).int()[0, 0].tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    """
    related = (part == 0).unsqueeze(1) | (part.unsqueeze(2) == part.unsqueeze(1))  # (R, T, T)
    mask = torch.zeros(related.shape, dtype=dtype, device=part.device)
    return mask.masked_fill(~related.tril(), torch.finfo(dtype).min).unsqueeze(1)


def continued_positions(prompt: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the rotary positions (3, R, L) of prompts (3, R, P) and their completions.

    >>> continued_positions(torch.tensor([[[0, 1]]] * 3), [1, 2])[0].tolist()
    [[0, 1, 2, 2, 3]]
    """
    after = [torch.arange(width, device=prompt.device) for width in widths]
    return torch.cat([prompt, *(prompt[:, :, -1:] + 1 + places for places in after)], dim=2)
