"""Draws picture sheets: each query with the pictures found for it, marked right or wrong.

Called by ``rime_pl.callbacks.rewrite_samples`` (TensorBoard) and by ``rime search`` (PNG). Uses PIL only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from rime_pl.media import thinned
from rime_pl.types import THUMBNAIL, Clip, Item, Medium, frames_of

INK, SOFT, PAPER, CARD = "#1f2933", "#6b7785", "#ffffff", "#f6f7f9"
RIGHT, WRONG, QUERY, PLAIN = "#1a9c5b", "#d64545", "#2f6bde", "#cfd6df"
SIDE = THUMBNAIL  # width and height of a card's picture
GAP = 14
LINE = 17  # height of a line of text
CAPTION_LINES = 3
CLIP_FRAMES = 3  # of a clip on a card


@dataclass
class Card:
    """One item on a sheet."""

    item: Item
    caption: str = ""  # below the picture, e.g. score and name
    right: bool | None = None  # None: unknown, drawn with a plain frame


@dataclass
class SheetRow:
    """A query and the items found for it, best first."""

    query: Card
    found: list[Card]
    title: str = ""  # one line above the row
    notes: list[str] = field(default_factory=list)  # small lines below the title, e.g. rewrites


def sheet(rows: Sequence[SheetRow], title: str = "") -> Image.Image:
    """Return an RGB picture of the rows, one below the other, as wide as the longest row.

    Args:
        rows: At least one row; rows may hold different numbers of cards.
        title: One line at the top.
    """
    columns = max(1 + len(row.found) for row in rows)
    width = GAP + columns * (SIDE + GAP) + 2 * GAP
    top = 44 if title else GAP
    heights = [_row_height(row) for row in rows]
    paper = Image.new("RGB", (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    if title:
        draw.text((GAP, 14), _cut(title, _font(16, True), width - 2 * GAP), INK, _font(16, True))
    for row, height in zip(rows, heights, strict=True):
        _draw_row(paper, draw, row, top, width)
        top += height
    return paper


def _row_height(row: SheetRow) -> int:
    head = (LINE + 4 if row.title else 0) + LINE * len(row.notes)
    return head + SIDE + 10 + CAPTION_LINES * LINE + 2 * GAP


def _draw_row(paper: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, top: int, width: int) -> None:
    room = width - 2 * GAP
    if row.title:
        draw.text((GAP, top), _cut(row.title, _font(13, True), room), INK, _font(13, True))
        top += LINE + 4
    for note in row.notes:
        draw.text((GAP, top), _cut(note, _font(12), room), SOFT, _font(12))
        top += LINE
    top += 6
    _draw_card(paper, draw, row.query, GAP, top, QUERY)
    left = GAP + SIDE + 2 * GAP
    draw.line((left - GAP, top, left - GAP, top + SIDE), PLAIN, 1)
    for number, card in enumerate(row.found):
        colour = PLAIN if card.right is None else RIGHT if card.right else WRONG
        _draw_card(paper, draw, card, left + number * (SIDE + GAP), top, colour)


def _draw_card(
    paper: Image.Image, draw: ImageDraw.ImageDraw, card: Card, left: int, top: int, colour: str
) -> None:
    thick = 2 if colour == PLAIN else 4
    box = (left, top, left + SIDE, top + SIDE)
    draw.rounded_rectangle(box, 8, CARD, colour, thick)
    inside = SIDE - 2 * thick - 8
    if card.item.media:
        frames = [frame for medium in card.item.media for frame in frames_of(shown(medium))]
        picture = _collage(frames, inside)
        paper.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
    else:
        lines = _wrapped(card.item.text, _font(14), inside, (inside - 8) // 19)
        start = top + (SIDE - 19 * len(lines)) // 2
        for number, line in enumerate(lines):
            draw.text((left + SIDE / 2, start + 19 * number), line, INK, _font(14), anchor="ma")
    if card.right is not None:
        mark = _font(13, True)
        draw.ellipse((left + SIDE - 24, top + 4, left + SIDE - 4, top + 24), colour)
        draw.text((left + SIDE - 14, top + 14), "✓" if card.right else "✗", PAPER, mark, anchor="mm")
    for number, line in enumerate(_wrapped(card.caption, _font(12), SIDE, CAPTION_LINES)):
        draw.text((left + 1, top + SIDE + 7 + LINE * number), line, INK if number == 0 else SOFT, _font(12))


def shown(medium: Medium) -> Medium:
    """Return a medium as a card shows it: of a clip the first, the middle and the last frame."""
    return thinned(medium, CLIP_FRAMES) if isinstance(medium, Clip) else medium


def _collage(images: Sequence[Image.Image], side: int) -> Image.Image:
    """Return all pictures of an item side by side, ``side`` pixels wide; small pictures are enlarged."""
    share = (side - 4 * (len(images) - 1)) // len(images)
    parts = []
    for image in images:
        scale = share / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        parts.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    canvas = Image.new("RGB", (share * len(parts) + 4 * (len(parts) - 1), max(p.height for p in parts)), CARD)
    for number, part in enumerate(parts):
        canvas.paste(
            part, (number * (share + 4) + (share - part.width) // 2, (canvas.height - part.height) // 2)
        )
    return canvas


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib, because it is the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text as one line, shortened with an ellipsis if it is too long."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, num_lines: int) -> list[str]:
    """Return the text in at most ``num_lines`` lines; line breaks are kept, text that does not fit is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    if len(lines) > num_lines:
        lines = [*lines[: num_lines - 1], " ".join(lines[num_lines - 1 :])]
    return [_cut(line, font, width) for line in lines]
