"""Gives each process its part of the global batches of training and of an evaluation.

Called by loading.py, eval_plan.py and everybody who needs the number of pairs of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rime_pl.errors import RimeError


def local_batch_size(batch_size: int, processes: int) -> int:
    """Return the number of pairs of a global batch that each process works on.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> local_batch_size(64, processes=4)
        16
    """
    if batch_size < 1 or batch_size % processes:
        multiple = max(1, -(-batch_size // processes)) * processes
        raise RimeError(
            f"data.batch_size must be a multiple of the number of processes, but is {batch_size} with "
            f"{processes} processes. Set data.batch_size to {multiple}, for example."
        )
    return batch_size // processes


def rank_slice(
    indices: Sequence[int],
    rank: int,
    world_size: int,
    annotated: Sequence[bool] | NDArray[np.bool_] | None = None,
) -> Sequence[int]:
    """Return the part of a global batch that one process works on.

    All processes get the same number of samples. The annotated ones stand first in a batch, so they are
    spread evenly: otherwise the first process would get them all.

    Args:
        indices: The samples of the global batch.
        rank, world_size: This process, and how many there are.
        annotated: Whether each sample of the split is annotated; None if it does not matter.

    Raises:
        RimeError: If the batch cannot be divided by the number of processes.

    Example:
        >>> rank_slice([5, 6, 7, 8], rank=1, world_size=2)
        [7, 8]
        >>> rank_slice([0, 1, 2, 3], rank=1, world_size=2, annotated=[True, True, False, False])
        [1, 3]
    """
    size = local_batch_size(len(indices), world_size)
    if annotated is None or world_size == 1:
        return indices[rank * size : (rank + 1) * size]
    known = [index for index in indices if annotated[index]]
    others = [index for index in indices if not annotated[index]]
    first, last = (len(known) * turn // world_size for turn in (rank, rank + 1))
    return known[first:last] + others[rank * size - first : (rank + 1) * size - last]


def rank_batches(indices: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return the evaluation batches of one process; together the processes see every sample.

    All processes get the same number of batches, because generation under sharding needs all of them at
    once. If the samples do not divide evenly, some processes repeat a sample. The metric drops repeats by
    their item id.

    Example:
        >>> rank_batches([0, 1, 2, 3, 4], batch_size=2, rank=1, world_size=2)
        [[1, 3], [0]]
    """
    turns = -(-len(indices) // world_size)
    mine = [indices[(turn * world_size + rank) % len(indices)] for turn in range(turns)]
    return [mine[start : start + batch_size] for start in range(0, turns, batch_size)]
