"""Reads samples as they are stored: no picture is decoded, so that a copy of the corpus has the same bytes.

Called by `rime rewrite`, which writes a corpus again with rewrites.
"""

from __future__ import annotations

import io

from PIL import Image

from rime_pl.datamodules.shards import Entry, ShardReader
from rime_pl.errors import DataError


class StoredReader(ShardReader):
    """Reads samples with undecoded pictures; shard_writer.py copies their bytes."""

    def _image(self, entry: Entry, field: str, name: str) -> Image.Image:
        data = self._member(entry, name, f"field '{field}': ")
        try:
            return Image.open(io.BytesIO(data))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            raise DataError(
                f"{entry.name}: field '{field}': {name!r} must be a picture, but cannot be opened: {error}."
            ) from error
