"""Bring small Python objects of all processes together: keys, names and counts beside the tensors.

Called by the callbacks at the end of an evaluation; embeddings travel as tensors, through torchmetrics.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """The value of each process, in rank order, on every process. A collective: all of them must call it.

    >>> gather_objects({"seen": 3})
    [{'seen': 3}]
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
