"""Divide the rows of a batch that is too large for one forward into micro-batches.

Called by the modules of the contrastive stages before they encode a side. Every process must run the same
number of forwards, because under FSDP each of them is a collective.
"""

from __future__ import annotations

import torch
from torch import Tensor


def micro_batches(lengths: Tensor, num_rows: int | None, num_tokens: int | None) -> list[Tensor]:
    """Return the rows in groups, longest first: rows of similar length go together.

    Args:
        lengths: (R,) int64: tokens of each row, visual ones included.
        num_rows: Maximum number of rows in a group; None for no limit.
        num_tokens: Maximum number of tokens in a group; None for no limit. A longer row gets its own group.

    Returns:
        Groups of int64 row numbers; each row is in exactly one of them.

    Example:
        >>> lengths = torch.tensor([3, 10, 4, 4])
        >>> [group.tolist() for group in micro_batches(lengths, None, num_tokens=12)]
        [[1], [2, 3, 0]]
        >>> [group.tolist() for group in micro_batches(lengths, 3, None)]
        [[1, 2, 3], [0]]
    """
    order = lengths.argsort(descending=True, stable=True)
    groups: list[list[int]] = [[]]
    total = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        too_long = num_tokens is not None and total + length > num_tokens
        too_many = num_rows is not None and len(groups[-1]) == num_rows
        if groups[-1] and (too_long or too_many):
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += length
    return [torch.tensor(group, device=lengths.device) for group in groups]


def split_to(groups: list[Tensor], count: int) -> list[Tensor]:
    """Return the same rows in exactly ``count`` groups, by halving the largest group until there are enough.

    Args:
        groups: At most ``count`` groups, with at least ``count`` rows together.

    Raises:
        ValueError: If there are fewer rows.

    Example:
        >>> [group.tolist() for group in split_to([torch.tensor([3, 1, 0]), torch.tensor([2])], 3)]
        [[3, 1], [0], [2]]
    """
    groups = list(groups)
    if (rows := sum(map(len, groups))) < count:
        raise ValueError(f"{rows} rows cannot be in {count} groups")
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda number: len(groups[number]))
        half = (len(groups[largest]) + 1) // 2
        groups[largest : largest + 1] = groups[largest].split(half)
    return groups
