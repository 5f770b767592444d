"""Draws some pairs of a corpus: the query on the left, its target on the right, texts beside the pictures.

Called by ``rime shards inspect``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from rime_pl.media import thinned
from rime_pl.report.drawing import (
    CARD,
    GAP,
    INK,
    LINE,
    PAPER,
    PLAIN,
    RIGHT,
    SOFT,
    font,
    side_by_side,
    text_line,
    wrapped,
)
from rime_pl.types import Clip, Item, Medium, Page, Pair, frames_of

HALF = 620  # width of a side
SIDE = 136  # most pixels of a single picture
STRIP = 380  # width of several pictures, or of the frames of a clip
FRAMES = 4  # of a clip, or pictures of an item
_SECTION_HEAD = 2 * LINE + 10
_HEAD = 20  # height of the line above a pair
_LINES = 8  # of an item
_REWRITE_LINES = 3
_EDGE = 8  # between the frame of an item and what is in it


@dataclass
class Section:
    """Pairs under a title, such as those of one split."""

    title: str
    pairs: Sequence[Pair]


def contact_sheet(sections: Sequence[Section], title: str) -> Image.Image:
    """Return an RGB picture of the pairs, one below the other, each as high as it needs.

    Args:
        sections: At least one.
        title: One line at the top.
    """
    width = 3 * GAP + 2 * HALF
    laid_out = [[_LaidOutPair(pair) for pair in section.pairs] for section in sections]
    heights = [_SECTION_HEAD + LINE + sum(_HEAD + pair.height + GAP for pair in pairs) for pairs in laid_out]
    paper = Image.new("RGB", (width, 44 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    text_line(draw, (GAP, 14), title, width - 2 * GAP, 16, INK, bold=True)
    top = 44
    for section, pairs, height in zip(sections, laid_out, heights, strict=True):
        text_line(draw, (GAP, top), section.title, HALF, 14, INK, bold=True)
        for left, name in ((GAP, "query"), (2 * GAP + HALF, "target")):
            text_line(draw, (left, top + LINE + 6), name, HALF, 12, INK, bold=True)
        place = top + _SECTION_HEAD
        for pair in pairs:
            text_line(draw, (GAP, place), pair.name, 2 * HALF + GAP, 12, SOFT)
            for left, item in zip((GAP, 2 * GAP + HALF), pair.items, strict=True):
                _draw_item(paper, draw, item, (left, place + _HEAD), pair.height)
            place += _HEAD + pair.height + GAP
        top += height
    return paper


def strip(item: Item) -> Item:
    """Return an item as the sheet shows it: few frames of a clip, and small pictures."""
    media = tuple(thinned(one, FRAMES) if isinstance(one, Clip) else one for one in item.media)
    return replace(item, media=media).thumbnail()


def what(media: Sequence[Medium]) -> str:
    """Return in words which media an item has, "" for none.

    >>> what([Image.new("RGB", (4, 4))] * 2)
    '2 pictures'
    """
    clips = [one for one in media if isinstance(one, Clip)]
    pages = sum(isinstance(one, Page) for one in media)
    counts = {"picture": len(media) - len(clips) - pages, "page": pages, "clip": len(clips)}
    words = [name if n == 1 else f"{n} {name}s" for name, n in counts.items() if n]
    if len(clips) == 1:
        words[-1] += f", {clips[0].times[0]:.1f} to {clips[0].times[-1]:.1f} s"
    return " + ".join(words)


class _LaidOutItem:
    """The picture of an item, and its lines beside it."""

    def __init__(self, item: Item | None) -> None:
        self.picture: Image.Image | None = None
        self.lines: list[tuple[str, ImageFont.FreeTypeFont, str]] = []  # line, font, colour
        self.room = 0  # width of the picture's place
        if item is None:
            self._add("no query: this item is in the gallery only", 12, SOFT, 1)
            return
        frames = [frame for medium in item.media for frame in frames_of(medium)]
        if frames:
            self.room = SIDE if len(frames) == 1 else STRIP * min(len(frames), FRAMES) // FRAMES
            self.room = max(self.room, SIDE)
            self.picture = side_by_side(frames[:FRAMES], self.room, SIDE)
            few = f" ({FRAMES} shown)" if len(frames) > FRAMES else ""
            self._add(f"{what(item.media)}{few}", 11, SOFT, 1)
        if item.instruction:
            self._add(item.instruction, 12, SOFT, 1)
        rewrite = f"rewrite: {item.rewrite}" if item.rewrite else ""
        if item.text.strip():
            kept = min(_REWRITE_LINES, len(self._wrapped(rewrite, 12, _LINES))) if rewrite else 0
            self._add(item.text, 13, INK, _LINES - len(self.lines) - kept)
        if rewrite:
            self._add(rewrite, 12, RIGHT, _REWRITE_LINES)

    @property
    def height(self) -> int:
        picture = self.picture.height if self.picture else 0
        return max(picture, LINE * len(self.lines)) + 2 * _EDGE

    @property
    def width(self) -> int:
        """The width of a line."""
        return HALF - 2 * _EDGE - (self.room + GAP if self.room else 0)

    def _add(self, text: str, size: int, colour: str, most: int) -> None:
        used = font(size, text=text)
        self.lines += [(line, used, colour) for line in self._wrapped(text, size, most)]

    def _wrapped(self, text: str, size: int, most: int) -> list[str]:
        return wrapped(text, font(size, text=text), self.width, most)


class _LaidOutPair:
    """Both sides of a pair, and how high they are."""

    def __init__(self, pair: Pair) -> None:
        self.name = f"{pair.dataset}   {pair.key}"
        self.items = (_LaidOutItem(pair.query), _LaidOutItem(pair.target))
        self.height = max(item.height for item in self.items)


def _draw_item(
    paper: Image.Image, draw: ImageDraw.ImageDraw, item: _LaidOutItem, place: tuple[int, int], height: int
) -> None:
    left, top = place
    draw.rounded_rectangle((left, top, left + HALF, top + height), 8, CARD, PLAIN, 1)
    start = left + _EDGE
    if item.picture:
        across, down = (item.room - item.picture.width) // 2, (height - item.picture.height) // 2
        paper.paste(item.picture, (start + across, top + down))
        start += item.room + GAP
    for number, (line, used, colour) in enumerate(item.lines):
        draw.text((start, top + _EDGE - 1 + LINE * number), line, colour, used)
