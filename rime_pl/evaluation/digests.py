"""A hash of all that decides the embedding of an item, so that each content is embedded once.

Called by embedding.py. Files are hashed as they are: nothing is decoded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.inference.sources import Blank, is_one
from rime_pl.media import open_picture
from rime_pl.types import Clip, Item, Page, frames_of


def item_digest(item: Item) -> bytes:
    """Return the SHA-256 of text, instruction and media of an item, 32 bytes.

    The name of a file does not count, so the same picture in two tasks is one content. A picture that is
    opened already counts by its pixels.

    Raises:
        OSError: If a file cannot be read.

    Example:
        >>> item_digest(Item("a ring")) == item_digest(Item("a ring", content_id="7"))
        True
        >>> item_digest(Item("a ring")) == item_digest(Item("", instruction="a ring"))
        False
    """
    media = (item.media,) if is_one(item.media) else item.media
    told = json.dumps([item.text, item.instruction, [_medium(medium) for medium in media]])
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()


def _medium(medium: Any) -> list[Any]:
    if isinstance(medium, str | Path):  # a picture or a video; its ending says which
        return ["file", Path(medium).suffix.lower(), _frame(medium)]
    frames = [_frame(frame) for frame in frames_of(medium)]
    kind = type(medium).__name__ if isinstance(medium, Clip | Page) else "picture"
    return [kind, list(medium.times) if isinstance(medium, Clip) else [], frames]


def _frame(frame: Any) -> str:
    if isinstance(frame, Image.Image):
        if frame.mode not in ("RGB", "L") or frame.info:  # palettes, transparency, orientation
            frame = open_picture(frame)
        head = f"{frame.mode} {frame.size}".encode()
        return hashlib.sha256(head + frame.tobytes()).hexdigest()
    with Path(frame).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_source(item: Item) -> Item:
    """Return the item as the retriever takes it: one with neither text nor media is meant to be so."""
    if item.media or item.text.strip():
        return item
    return Blank(item.text, (), item.content_id, item.instruction)
