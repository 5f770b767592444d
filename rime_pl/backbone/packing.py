"""The tokens of all rows in one row, without padding.

Called by mllm.py. Rows differ in length, and a linear layer has no use for padding, so all layers but
attention see the tokens of a batch one after the other. Attention takes them apart, each row by itself.
Several completions behind one prompt are in shared_prompts.py beside it.

Shape legend: R rows, L tokens of a row with padding on either side; without padding T tokens of the longest
row of a group and N of all rows; H heads, W width of a head, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rime_pl.errors import RimeError

#: Queries, keys and values (R, H, T, W), and what is added to the scores -> (R, T, H, W).
Kernel = Callable[..., Tensor]
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
    widths: tuple[int, ...]  # of the parts of a padded row, L in all: a prompt, say, and its completion
    masks: tuple[Tensor, ...] | None = None  # what attention adds to the scores; None: it is causal

    @classmethod
    def of(cls, *valid: Tensor) -> Packing:
        """Return the packing of rows whose parts, one behind the other, are (R, width) and 0 at padding."""
        kept = torch.cat(valid, dim=1).bool()
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
        seats = torch.tensor(starts, device=kept.device).unsqueeze(1) + kept.cumsum(dim=1) - 1
        columns = kept.flatten().nonzero().squeeze(1)
        return cls(columns, seats[kept], tuple(groups), lengths, tuple(part.shape[1] for part in valid))

    def rows(self) -> tuple[Tensor, ...]:
        """Return the numbers of the rows of each group, (rows,) int64."""
        longest_first = self.lengths.argsort(descending=True, stable=True)
        return longest_first.split([rows for rows, _ in self.groups])

    def with_masks(self, dtype: torch.dtype) -> Packing:
        """Return the packing for a kernel that knows no causal attention; ``dtype`` is that of the scores."""
        lowest, device = torch.finfo(dtype).min, self.seats.device
        squares = (
            torch.full((longest, longest), lowest, dtype=dtype, device=device) for _, longest in self.groups
        )
        return replace(self, masks=tuple(square.triu(1)[None, None] for square in squares))

    def pick(self, *values: Tensor) -> Tensor:
        """Return values of each part of a row, (..., R, width), in one row without padding: (..., 1, N)."""
        return torch.cat(values, dim=-1).flatten(-2).index_select(-1, self.columns).unsqueeze(-2)

    def put_back(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return hidden states (1, N, D) as parts of padded rows, (R, width, D); 0 at padding."""
        rows, size = len(self.lengths), hidden.shape[-1]
        padded = hidden.new_zeros(rows * sum(self.widths), size).index_copy(0, self.columns, hidden[0])
        return padded.view(rows, -1, size).split(self.widths, dim=1)

    def take_apart(self, states: Tensor) -> list[Tensor]:
        """Return states (1, H, N, W) of each group, (R, H, T, W); 0 behind the tokens of a row."""
        return [group.transpose(1, 2) for group in self._apart(states[0].transpose(0, 1))]

    def bring_together(self, states: Sequence[Tensor]) -> Tensor:
        """Return states (R, T, H, W) of each group in one row, (1, N, H, W)."""
        return torch.cat([group.flatten(0, 1) for group in states])[self.seats].unsqueeze(0)

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every token (1, H, N, W) attend to earlier ones of its row, and return (1, N, H, W)."""
        apart = zip(*(self.take_apart(states) for states in (query, key, value)), strict=True)
        masks = self.masks or [None] * len(self.groups)
        return self.bring_together([kernel(*group, mask) for group, mask in zip(apart, masks, strict=True)])

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


class Seats(Protocol):
    """Where the tokens of packed rows stand: a :class:`Packing`, or ``SharedPrompts``."""

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let every token (1, H, N, W) attend to those that it may see, and return (1, N, H, W)."""


def attend_apart(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Seats | None = None,
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

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mixed: Tensor = kernel(module, query, key, value, mask, **more)[0]
        return mixed

    return packing.attend(attend, query, key, value), None


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
