"""A pair whose media nobody has opened yet, and where its media lie.

A builder turns each row of its data set into drafts. The first pass looks at drafts only; the second pass
opens their media. Called by the builders and by building.py.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from rime_pl.clips import PAGE_SIDE, read_pages, read_video
from rime_pl.datamodules.pair_check import SPECIAL
from rime_pl.errors import DataError
from rime_pl.media import checked_clip, stored_picture
from rime_pl.types import Clip, Item, Medium, Page, Pair


class Refused(Exception):
    """A row that is left out, and counted.

    Args:
        kind: What is counted, such as "missing file".
        says: What must hold and what was found.
        more: What else is wrong with the row.
    """

    def __init__(self, kind: str, says: str, more: Sequence[Refused] = ()) -> None:
        super().__init__(says)
        self.kind, self.says, self.more = kind, says, tuple(more)


@dataclass(frozen=True)
class PictureFile:
    """A picture, or a page, in a file of its own."""

    path: Path
    name: str  # in the data set: the same on every machine
    page: bool = False

    kind = "unusable picture"

    def open(self) -> Medium:
        picture = _kept(self.path)
        return Page(picture) if self.page else picture


@dataclass(frozen=True)
class PictureBytes:
    """A picture, or a page, whose bytes lie in a row of the source."""

    name: str
    data: bytes | None  # None: not read
    page: bool = False

    kind = "unusable picture"

    def open(self) -> Medium:
        picture = _opened(stored_picture(self.data or b"", self.name))
        return Page(picture) if self.page else picture


@dataclass(frozen=True)
class FrameFiles:
    """A clip as pictures of its frames."""

    paths: tuple[Path, ...]
    name: str
    times: tuple[float, ...]  # seconds

    kind = "unusable clip"

    def open(self) -> Medium:
        frames = tuple(_kept(path) for path in self.paths)
        return checked_clip(Clip(frames, self.times), str(self.paths[0].parent))


@dataclass(frozen=True)
class VideoFile:
    """A video file, of which some frames are taken."""

    path: Path
    name: str
    frames: int
    side: int  # pixels of the longer side of a frame; larger ones are made smaller

    kind = "unusable clip"

    def open(self) -> Medium:
        clip = read_video(self.path, self.frames)
        frames = []
        for frame in clip.frames:
            frame.thumbnail((self.side, self.side))
            frames.append(_packed(frame, "JPEG"))
        return replace(clip, frames=tuple(frames))


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF."""

    path: Path
    name: str
    number: int  # from 0
    side: int = PAGE_SIDE  # pixels of the longer side

    kind = "unusable page"

    def open(self) -> Medium:
        (page,) = read_pages(self.path, [self.number], self.side)
        return Page(_packed(page.image, "PNG"))


MediumFile: TypeAlias = PictureFile | PictureBytes | FrameFiles | VideoFile | PdfPage


@dataclass(frozen=True)
class Draft:
    """A pair without its media, and the files that hold them."""

    task: str
    gallery: str
    query: Item | None
    target: Item
    query_files: tuple[MediumFile, ...] = ()
    target_files: tuple[MediumFile, ...] = ()
    split: str = ""  # "": by hash of the group
    #: What must not be in two splits: the target's content; if the target is a text only and the query shows
    #: something, what it shows, because an answer such as "yes" would take half of a task along.
    group: str = ""
    notes: tuple[str, ...] = ()  # what was repaired; counted

    def __post_init__(self) -> None:
        if not self.group:
            shown = self.query_files if self.query_files and not self.target_files else ()
            group = "\n".join(one.name for one in shown) or self.target.content_id
            object.__setattr__(self, "group", group)

    def check(self) -> None:
        """Look at texts and at what is missing.

        Raises:
            Refused: If a side is empty, or a text holds a special token or half a character.
        """
        _refuse_half(self.task, "the name of the task")
        _refuse_half(self.gallery, "the name of the gallery")
        for side, item, files in (
            ("query", self.query, self.query_files),
            ("target", self.target, self.target_files),
        ):
            if item is None:
                continue
            if not item.text.strip() and not files:
                raise Refused("empty side", f"the {side} has neither text nor media.")
            for text in (item.text, item.instruction, item.rewrite or "", item.cot or "", item.content_id):
                _refuse_half(text, f"the {side}")
                if token := SPECIAL.search(text):
                    said = f"the {side} holds {token.group()!r}, a special token of the model."
                    raise Refused("special token", said)

    def digest(self) -> int:
        """Return a 64-bit hash of all that the pair shows; equal for duplicates."""
        shown = repr(
            (
                self.task,
                self.split,
                _told(self.query, self.query_files),
                _told(self.target, self.target_files),
            )
        )
        return int.from_bytes(hashlib.blake2b(shown.encode(), digest_size=8).digest(), "big")

    def pair(self, key: str, source: str) -> Pair:
        """Return the pair with its media. Pictures are checked, but kept as the bytes of their files.

        Raises:
            Refused: If a medium cannot be used.
        """
        query = None if self.query is None else replace(self.query, media=_media(self.query_files))
        target = replace(self.target, media=_media(self.target_files))
        return Pair(key, self.task, self.gallery, query, target, source=source)


def _refuse_half(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a character, and no file can
        raise Refused("half a character", f"{what} holds {text!a:.90}.") from error


def _told(item: Item | None, files: Sequence[MediumFile]) -> tuple[str, ...]:
    if item is None:
        return ()
    return (item.instruction, item.text, *(f"{type(one).__name__} {one.name}" for one in files))


def _media(files: Sequence[MediumFile]) -> tuple[Medium, ...]:
    media = []
    for file in files:
        try:
            media.append(file.open())
        except (DataError, FileNotFoundError, PermissionError) as error:
            raise Refused(file.kind, str(error)) from error
    return tuple(media)


#: Files that were decoded before and are kept as they are: path, time of the last change, bytes.
_plain: set[tuple[Path, int, int]] = set()
_MOST_PLAIN = 100_000


def _kept(path: Path) -> Image.Image:
    """Return the picture of a file; one that several pairs show is decoded once to check it."""
    about = path.stat()
    key = path, about.st_mtime_ns, about.st_size
    data = path.read_bytes()
    if key in _plain and len(data) == about.st_size:
        return _opened(data)
    stored = stored_picture(data, str(path))
    if stored is data:
        if len(_plain) >= _MOST_PLAIN:
            _plain.clear()
        _plain.add(key)
    return _opened(stored)


def _opened(data: bytes) -> Image.Image:
    """Return a picture that is not decoded, so that the writer copies its bytes."""
    return Image.open(io.BytesIO(data))


def _packed(picture: Image.Image, form: str) -> Image.Image:
    """Return the picture as a file in memory: hundreds of decoded ones would not fit."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **({} if form == "PNG" else {"quality": 90, "subsampling": 0}))
    return _opened(buffer.getvalue())


def identity(*parts: str) -> str:
    """Return a short content id by hash.

    >>> identity("a", "b") == identity("a", "b") != identity("ab")
    True
    """
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def text_identity(text: str, *parts: str) -> str:
    r"""Return a content id of a text: answers and classes are equal if their words are.

    >>> text_identity(" Yes\n") == text_identity("yes") != text_identity("no")
    True
    """
    return identity(" ".join(text.split()).casefold(), *parts)


def text_of(values: dict[str, object], name: str) -> str:
    """Return a text of a row, "" if it is null or missing.

    Raises:
        Refused: If it is no text.
    """
    value = values.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused("not a string", f"field {name!r} must be a text, but is {value!r:.90}.")
    return value
