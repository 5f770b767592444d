"""What a user may give to embed, and how it becomes an Item: opened when its batch is due, and not kept.

Called by the retriever and by ``rime search``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.clips import read_video
from rime_pl.errors import DataError, RimeError
from rime_pl.media import open_picture, picture_shape
from rime_pl.prompts import MAX_MEDIA, refuse_many_media
from rime_pl.types import Clip, Item, Medium, Page, frames_of

#: A text, a picture (path or opened), a video (path), a clip, a page, or an item that may hold several of
#: them, a text and an instruction.
Source = str | Path | Image.Image | Clip | Page | Item
#: File names that end like this are taken for pictures.
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"),
}
#: And these for videos.
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"}
#: What the size of a video file is taken for before it is decoded: frames, height and width.
_VIDEO_SHAPE = (8, 480, 640)


@dataclass(frozen=True)
class Blank(Item):
    """An item with neither text nor media that is to be embedded all the same, such as a blank answer.

    Public benchmarks have some among their candidates. From a user, a blank item is a mistake.
    """


def is_one(items: Source | Iterable[Source]) -> bool:
    """Return whether ``items`` is one item and not several: a text is not a sequence of characters."""
    return isinstance(items, Source)


def checked(
    items: Source | Iterable[Source], files: bool = True, max_media: int = MAX_MEDIA
) -> Sequence[Source]:
    """Return the items as a sequence, each checked as far as possible without opening pictures.

    A sequence of another kind than list or tuple is taken as it is, because it may read its items when they
    are asked for.

    Args:
        items: What the user gave.
        files: Whether the picture files must be there; otherwise they are looked for when they are due.
        max_media: Largest number of media of an item.

    Raises:
        RimeError: If there are no items, or one is no text, no medium and no item, or holds nothing or too
            many media.
    """
    if isinstance(items, Source):
        items = (items,)
    elif isinstance(items, Mapping | bytes) or not isinstance(items, Iterable):
        raise RimeError(
            f"The items must be a list of texts, paths, pictures or Items, but are a {type(items).__name__}."
        )
    rows = items if isinstance(items, Sequence) else tuple(items)
    if not len(rows):
        raise RimeError(
            "There must be at least one text or picture to embed, but the list of items is empty."
        )
    if isinstance(rows, list | tuple):
        for number, source in enumerate(rows):
            name = item_name(number, len(rows))
            if files or not isinstance(source, Path):
                _check(source, name)
            if isinstance(source, Item):
                refuse_many_media(len(_media(source)), max_media, name)
        _warn_of_file_names([row for row in rows if isinstance(row, str)])
    return rows


def item_name(number: int, count: int) -> str:
    """Return what an error calls one of ``count`` items."""
    return f"item {number}" if count > 1 else "the item"


def to_item(source: Source, instruction: str = "", name: str = "the item") -> Item:
    """Return a text, a path to a picture or a picture as an Item; an Item keeps its own instruction.

    Args:
        source: What the user gave.
        instruction: For an item without one.
        name: What an error calls the item.

    Raises:
        RimeError: If it is nothing that can be embedded; a DataError if a picture cannot be used.
    """
    _check(source, name)
    if isinstance(source, str):
        return Item(source, instruction=instruction)
    if isinstance(source, Path):
        return Item("", (_opened(source, name),), str(source), instruction)
    if not isinstance(source, Item):
        return Item("", (_opened(source, name),), instruction=instruction)
    media = tuple(_opened(medium, _named(medium, name)) for medium in _media(source))
    return replace(source, media=media, instruction=source.instruction or instruction)


def _opened(medium: Any, name: str) -> Medium:
    """Return a picture, clip or page ready to be read."""
    if isinstance(medium, Clip):
        return replace(medium, frames=tuple(open_picture(frame, name) for frame in medium.frames))
    if isinstance(medium, Page):
        return Page(open_picture(medium.image, name))
    if _is_video(medium):
        return read_video(medium)
    return open_picture(medium, name if isinstance(medium, Image.Image) else "")


def _is_video(medium: Any) -> bool:
    return isinstance(medium, str | Path) and Path(medium).suffix.lower() in VIDEO_SUFFIXES


def one_item(
    rows: Sequence[Source], number: int, instruction: str, unusable: dict[int, str] | None
) -> Item | None:
    """Return an item, or None if it cannot be used and that is only counted."""
    try:
        return to_item(rows[number], instruction, item_name(number, len(rows)))
    except (DataError, PermissionError) as error:
        if unusable is None:
            raise
        unusable[number] = str(error)
        return None


def text_of(source: Source) -> str:
    """Return the words of an item; none of a picture, or of what is nothing that can be embedded."""
    text = source.text if isinstance(source, Item) else source
    return text if isinstance(text, str) else ""


def media_shapes(source: Source) -> list[tuple[type, int, int, int]]:
    """Return kind, frames, height and width of the media of an item; only of those that can be read.

    The kind is Clip, Page or Image. Of a video file it is a guess.
    """
    found: list[tuple[type, int, int, int]] = []
    for medium in _media_of(source):
        if _is_video(medium):
            found.append((Clip, *_VIDEO_SHAPE))
            continue
        opened = isinstance(medium, Clip | Page)
        kind, frames = (type(medium), frames_of(medium)) if opened else (Image.Image, (medium,))
        if frames and (shape := picture_shape(frames[0])) is not None:
            found.append((kind, len(frames), *shape))
    return found


def holds_opened(source: Source) -> bool:
    """Return whether an item has a medium that the user has opened; the others are files."""
    return any(not isinstance(medium, str | Path) for medium in _media_of(source))


def _media_of(source: Source) -> tuple[Any, ...]:
    if isinstance(source, Item):
        return _media(source)
    return () if isinstance(source, str) else (source,)


def content_digest(items: Sequence[Source], instruction: str, skip_unusable: bool = False) -> str:
    """Return a hash of all that decides the embeddings of the items: texts, instructions and pictures.

    A file is hashed as it is, so that a folder of photos need not be decoded for it.

    Args:
        items: From :func:`checked`.
        instruction: See :func:`to_item`.
        skip_unusable: Whether an item that cannot be used is hashed as its error, and not raised.
    """
    digest = hashlib.sha256(instruction.encode())
    for number in range(len(items)):
        try:
            _add_content(digest, items[number], instruction, item_name(number, len(items)))
        except (DataError, FileNotFoundError, PermissionError) as error:
            if not skip_unusable:
                raise
            digest.update(f"{number} {error}".encode())
    return digest.hexdigest()


def _add_content(digest: Any, source: Source, instruction: str, name: str) -> None:
    if isinstance(source, Path):
        with source.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return
    item = to_item(source, instruction, name)
    kinds = [
        [type(medium).__name__, medium.times if isinstance(medium, Clip) else []] for medium in item.media
    ]
    frames = [frame for medium in item.media for frame in frames_of(medium)]
    sizes = [frame.size for frame in frames]
    digest.update(json.dumps([item.text, item.instruction, kinds, sizes]).encode())
    for frame in frames:
        digest.update(frame.tobytes())


def _check(source: Any, name: str) -> None:
    if not isinstance(source, Source):
        raise RimeError(
            f"{name} must be a text (str), a path to a picture or video (Path), a picture, a clip, a page or "
            f"an Item, but is a {type(source).__name__}."
        )
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{name} must be a picture or video file, but there is none: {source}.")
    if isinstance(source, Path) and source.suffix.lower() == ".pdf":
        raise RimeError(
            f"{name} must be one page, but {source} is a document. Give its pages: "
            "rime_pl.read_pages yields them."
        )
    if isinstance(source, Item):
        for medium in _media(source):
            if not isinstance(medium, str | Path | Image.Image | Clip | Page):
                kind = type(medium).__name__
                raise RimeError(
                    f"{name}: media must be pictures, clips, pages or paths to pictures and videos, but one "
                    f"is a {kind}."
                )
        if not isinstance(source.text, str) or not isinstance(source.instruction, str):
            raise RimeError(f"{name}: text and instruction of an Item must be str.")
    text = source if isinstance(source, str) else source.text if isinstance(source, Item) else None
    blank = text is not None and not text.strip() and not (isinstance(source, Item) and _media(source))
    if blank and not isinstance(source, Blank):
        raise RimeError(f"{name} must have a text or a medium, but has neither.")


def _media(item: Item) -> tuple[Any, ...]:
    """Return the media of an Item, one or several: a user may give one without a tuple."""
    media: Any = item.media
    return (media,) if isinstance(media, str | Path | Image.Image | Clip | Page) else tuple(media)


def _named(medium: Any, name: str) -> str:
    return f"{name}, {medium}" if isinstance(medium, str | Path) else name


def _warn_of_file_names(texts: Sequence[str]) -> None:
    """Warn of texts that are the names of picture files: they would be embedded as words."""
    names = [text for text in texts if text.lower().endswith(tuple(SUFFIXES)) and _is_file(text)]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]!r}{others} is embedded as a text, but is the name of a picture file. "
            f"Give Path({names[0]!r}) to embed the picture.",
            stacklevel=5,
        )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # e.g. longer than a name may be
        return False
