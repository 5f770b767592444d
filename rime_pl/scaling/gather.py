"""Exchange between processes, so that every process sees the whole batch as negatives.

Called by the modules in every training step and by the callbacks at the end of an evaluation. Without a
process group each function returns its input.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rime_pl.types import Completions

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllGather(torch.autograd.Function):
    """Concatenate the rows of all ranks; in backward, sum the gradients that all ranks send to these rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # all-reduce and slice, because gloo has no reduce-scatter
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather_rows(local: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, with a gradient to the rows of each rank.

    All ranks must hold the same number of rows and compute the same loss on the result. The gradient is the
    *sum* over ranks. DDP and FSDP then average parameter gradients over ranks, so the result equals one
    process on the whole batch.

    Args:
        local: (R, ...), any dtype; only floats get a gradient.

    Returns:
        (world * R, ...).
    """
    if world_size() == 1:
        return local
    return _AllGather.apply(local)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max(number: int, device: torch.device) -> int:
    """Return the largest number of all ranks."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_rank(here: bool, device: torch.device) -> bool:
    """Return whether something is so on any rank."""
    return bool(all_reduce_max(int(here), device))


def all_gather_completions(local: Completions) -> Completions:
    """Return the completions of all ranks in rank order, padded to the widest."""
    if world_size() == 1:
        return local
    width = local.ids.shape[1]
    missing = all_reduce_max(width, local.ids.device) - width
    ids, mask = (all_gather_rows(F.pad(part, (0, missing))) for part in (local.ids, local.mask))
    return Completions(ids, mask)


def gather_objects(value: T) -> list[T]:
    """Return the value of each process, in rank order. A collective: all processes must call it.

    >>> gather_objects({"seen": 3})
    [{'seen': 3}]
    """
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
