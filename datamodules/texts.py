"""Reads the texts of a corpus without its pictures: what an adapter keeps of its training texts.

Called by the data module at the end of a run, and by ``rime search`` for adapters that do not keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rime_pl.bars import track
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader
from rime_pl.errors import DataError
from rime_pl.types import Pair

_PLACEHOLDER = Image.new("RGB", (1, 1))


class TextReader(ShardReader):
    """Reads samples without decoding their pictures: each picture is a placeholder of one pixel."""

    def _image(self, *member: Any) -> Image.Image:
        return _PLACEHOLDER


def read_texts(reader: TextReader, most: int | None = None, progress: str = "") -> Iterator[Pair]:
    """Yield the pairs of a split; broken ones are left out, because training has counted them.

    Args:
        reader: Of the split.
        most: About how many pairs, of every task; None for all.
        progress: Title of a progress bar; empty for no bar.
    """
    codes = reader.entries.task_codes() if isinstance(reader.entries, Samples) else np.zeros(len(reader))
    for index in track(_spread(codes, most), progress, off=not progress):
        try:
            yield reader.read(index)
        except DataError:
            continue


def _spread(tasks: NDArray[Any], most: int | None) -> Sequence[int]:
    """Return the indices of about ``most`` samples, evenly spaced in each task, so that no task is missed.

    Args:
        tasks: Number of the task of each sample.
        most: None for all samples.

    Example:
        >>> _spread(np.array([0] * 8 + [1]), 4)
        [0, 4, 8]
    """
    if most is None or len(tasks) <= most:
        return range(len(tasks))
    of_task = [np.flatnonzero(tasks == task) for task in np.unique(tasks)]
    share = max(1, most // len(of_task))
    return sorted(index for each in of_task for index in each[:: -(-len(each) // share)].tolist())
