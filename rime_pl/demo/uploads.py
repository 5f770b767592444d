"""Turns what a visitor sends into a query: words, a picture, a clip or a page, each within limits.

Called by the server beside it, on the thread of the model, so that one upload is decoded at a time.
"""

from __future__ import annotations

from pathlib import Path

from rime_pl.clips import count_pages, read_pages, read_video
from rime_pl.errors import DataError
from rime_pl.inference.sources import VIDEO_SUFFIXES
from rime_pl.media import open_picture, picture_shape
from rime_pl.types import Item, Medium

#: Bytes of a request.
MAX_BYTES = 32_000_000
#: Characters of a query.
MAX_TEXT = 2000
#: Pixels of a picture: a photo of 48 megapixels passes.
MAX_PIXELS = 50_000_000
#: Seconds of a clip.
MAX_SECONDS = 120.0
#: Pixels of a frame of a clip: 4K passes. A small file may hold hundreds of huge frames.
MAX_FRAME = 9_000_000


def to_query(text: str, file: Path | None = None, name: str = "") -> Item:
    """Return the query.

    Args:
        text: The words; may be empty if there is a file.
        file: What was uploaded.
        name: What the visitor calls it; its ending tells videos.

    Raises:
        DataError: If there is nothing to search for, or the file cannot be used.
    """
    text = text.strip()
    if len(text) > MAX_TEXT:
        raise DataError(f"The words must be at most {MAX_TEXT:,} characters, but are {len(text):,}.")
    if file is None:
        if not text:
            raise DataError("Type some words, or choose a picture or a clip.")
        return Item(text)
    try:
        return Item(text, (_medium(file, name),))
    except DataError as error:  # the visitor knows the name, and not where the server keeps it
        raise DataError(str(error).replace(str(file.absolute()), name).replace(str(file), name)) from error


def _medium(file: Path, name: str) -> Medium:
    with file.open("rb") as opened:
        head = opened.read(5)
    if head == b"%PDF-" or name.lower().endswith(".pdf"):
        if (count := count_pages(file)) > 1:
            raise DataError(f"{name} must have one page, but has {count}. Save the page that you mean alone.")
        return next(read_pages(file))
    if Path(name).suffix.lower() in VIDEO_SUFFIXES:
        return read_video(file, max_seconds=MAX_SECONDS, max_pixels=MAX_FRAME)
    if (shape := picture_shape(file)) and shape[0] * shape[1] > MAX_PIXELS:
        raise DataError(
            f"{name} must have at most {MAX_PIXELS / 1e6:.0f} megapixels, but has {shape[1]:,} x "
            f"{shape[0]:,} pixels. Shrink it."
        )
    return open_picture(file, name)
