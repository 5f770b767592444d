"""What a user may give to embed, and how it becomes an Item: opened when its batch is due, and not kept.

Called by the retriever and by ``rime search``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.errors import DataError, RimeError
from rime_pl.media import open_picture, picture_shape
from rime_pl.prompts import MAX_IMAGES, refuse_many_images
from rime_pl.types import Item

#: A text, a picture (path or opened), or an item that may hold both and an instruction.
Source = str | Path | Image.Image | Item
#: File names that end like this are taken for pictures.
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"),
}


def is_one(items: Source | Iterable[Source]) -> bool:
    """Return whether ``items`` is one item and not several: a text is not a sequence of characters."""
    return isinstance(items, Source)


def checked(
    items: Source | Iterable[Source], files: bool = True, max_images: int = MAX_IMAGES
) -> Sequence[Source]:
    """Return the items as a sequence, each checked as far as possible without opening pictures.

    A sequence of another kind than list or tuple is taken as it is, because it may read its items when they
    are asked for.

    Args:
        items: What the user gave.
        files: Whether the picture files must be there; otherwise they are looked for when they are due.
        max_images: Largest number of pictures of an item.

    Raises:
        RimeError: If there are no items, or one is no text, no picture and no item, or holds nothing or too
            many pictures.
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
                refuse_many_images(len(_pictures(source)), max_images, name)
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
        return Item("", (open_picture(source),), str(source), instruction)
    if isinstance(source, Image.Image):
        return Item("", (open_picture(source, name),), instruction=instruction)
    images = tuple(open_picture(picture, _named(picture, name)) for picture in _pictures(source))
    return replace(source, images=images, instruction=source.instruction or instruction)


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


def picture_shapes(source: Source) -> list[tuple[int, int]]:
    """Return height and width of the pictures of an item in pixels; only of those that can be read."""
    shapes = map(picture_shape, _pictures_of(source))
    return [shape for shape in shapes if shape is not None]


def holds_opened(source: Source) -> bool:
    """Return whether an item has a picture that the user has opened; the others are files."""
    return any(isinstance(picture, Image.Image) for picture in _pictures_of(source))


def _pictures_of(source: Source) -> tuple[Any, ...]:
    if isinstance(source, Item):
        return _pictures(source)
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
    sizes = [image.size for image in item.images]
    digest.update(json.dumps([item.text, item.instruction, sizes]).encode())
    for image in item.images:
        digest.update(image.tobytes())


def _check(source: Any, name: str) -> None:
    if not isinstance(source, Source):
        raise RimeError(
            f"{name} must be a text (str), a path to a picture (Path), a picture or an Item, but is a "
            f"{type(source).__name__}."
        )
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{name} must be a picture file, but there is none: {source}.")
    if isinstance(source, Item):
        for picture in _pictures(source):
            if not isinstance(picture, str | Path | Image.Image):
                kind = type(picture).__name__
                raise RimeError(f"{name}: images must be pictures or paths to pictures, but one is a {kind}.")
        if not isinstance(source.text, str) or not isinstance(source.instruction, str):
            raise RimeError(f"{name}: text and instruction of an Item must be str.")
    text = source if isinstance(source, str) else source.text if isinstance(source, Item) else None
    if text is not None and not text.strip() and not (isinstance(source, Item) and _pictures(source)):
        raise RimeError(f"{name} must have a text or a picture, but has neither.")


def _pictures(item: Item) -> tuple[Any, ...]:
    """Return the pictures of an Item, one or several: a user may give one picture without a tuple."""
    images: Any = item.images
    return (images,) if isinstance(images, str | Path | Image.Image) else tuple(images)


def _named(picture: str | Path | Image.Image, name: str) -> str:
    return name if isinstance(picture, Image.Image) else f"{name}, {picture}"


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
