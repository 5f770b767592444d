"""Reads samples as they are stored: no picture is decoded, so that a copy of the corpus has the same bytes.

Called by `rime rewrite`, which writes a corpus again with rewrites, and by mining and the index, which need
to know which items are the same.
"""

from __future__ import annotations

import hashlib
import io
import json

from PIL import Image, ImageFile

from rime_pl.datamodules.shards import Entry, ShardReader
from rime_pl.errors import DataError
from rime_pl.types import Clip, Item, frames_of


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


def media_digest(item: Item) -> str:
    """Return a hash of the bytes of all media of an item from a StoredReader, in their order; "" for none."""
    if not item.media:
        return ""
    media = hashlib.sha256()
    for medium in item.media:
        times = medium.times if isinstance(medium, Clip) else ()
        media.update(json.dumps([type(medium).__name__, times, len(frames_of(medium))]).encode())
        for frame in frames_of(medium):
            media.update(hashlib.sha256(_stored(frame)).digest())
    return media.hexdigest()


def look_of(item: Item, media: str | None = None) -> bytes:
    """Return a 16-byte digest of all of an item that is embedded: instruction, text and media.

    Args:
        item: From a StoredReader.
        media: Its :func:`media_digest`, if it is known.
    """
    shown = json.dumps([item.instruction, item.text, media_digest(item) if media is None else media])
    return hashlib.blake2b(shown.encode(), digest_size=16).digest()


def _stored(frame: Image.Image) -> bytes:
    assert isinstance(frame, ImageFile.ImageFile) and frame.fp, "an undecoded picture"
    frame.fp.seek(0)
    return frame.fp.read()
