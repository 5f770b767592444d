"""Reads the texts of a corpus without its pictures: what an adapter keeps of its training texts.

Called by the data module at the end of a run, and by ``rime search`` for adapters that do not keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from rime_pl.datamodules.shards import ShardReader
from rime_pl.errors import DataError
from rime_pl.types import Pair

_PLACEHOLDER = Image.new("RGB", (1, 1))


class TextReader(ShardReader):
    """Reads samples without decoding their pictures: each picture is a placeholder of one pixel."""

    def _image(self, *member: Any) -> Image.Image:
        return _PLACEHOLDER


def read_texts(reader: TextReader, most: int | None = None) -> Iterator[Pair]:
    """Yield the pairs of a split; broken ones are left out, because training has counted them.

    Args:
        reader: Of the split.
        most: About how many pairs, of every task; None for all.
    """
    for index in _spread([entry.dataset for entry in reader.entries], most):
        try:
            yield reader.read(index)
        except DataError:
            continue


def _spread(tasks: Sequence[str], most: int | None) -> Sequence[int]:
    """Return the indices of about ``most`` samples, evenly spaced in each task, so that no task is missed.

    Args:
        tasks: Task of each sample.
        most: None for all samples.

    Example:
        >>> _spread([*"aaaaaaaa", "b"], 4)
        [0, 4, 8]
    """
    if most is None or len(tasks) <= most:
        return range(len(tasks))
    of_task: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        of_task.setdefault(task, []).append(index)
    share = max(1, most // len(of_task))
    return sorted(index for each in of_task.values() for index in each[:: -(-len(each) // share)])
