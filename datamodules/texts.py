"""Reads the texts of a corpus without its pictures: what an adapter keeps of its training texts.

Called by the data module at the end of a run, and by ``rime search`` for adapters that do not keep them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        most: About how many pairs, evenly spaced; None for all.
    """
    for index in range(0, len(reader), max(1, len(reader) // most) if most else 1):
        try:
            yield reader.read(index)
        except DataError:
            continue
