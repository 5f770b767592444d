"""Collectives with gradient: the whole batch as negatives, whatever the number of processes.

Called by the modules in every training step. Without a process group everything is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rime_pl.types import Completions


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllGather(torch.autograd.Function):
    """Concatenate the rows of all ranks; backward sums what each rank wants of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # all-reduce and slice: gloo has no reduce-scatter
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather_rows(local: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradient to the rows of each rank.

    Every rank must hold the same number of rows and compute the same loss on the result. The gradient is the
    *sum* over ranks, so that the mean which DDP and FSDP take of parameter gradients equals one process on
    the whole batch.

    Args:
        local: (R, ...) any dtype; gradient only for floats.

    Returns:
        (world * R, ...).
    """
    if world_size() == 1:
        return local
    return _AllGather.apply(local)


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def all_gather_completions(local: Completions) -> Completions:
    """Completions of all ranks in rank order, padded to the widest."""
    if world_size() == 1:
        return local
    width = local.ids.shape[1]
    missing = all_reduce_max(width, local.ids.device) - width
    ids, mask = (all_gather_rows(F.pad(part, (0, missing))) for part in (local.ids, local.mask))
    return Completions(ids, mask)
