"""Draws picture sheets: each query with the pictures found for it, marked right or wrong.

Called by ``rime_pl.callbacks.rewrite_samples`` (TensorBoard) and by ``rime search`` (PNG). Uses PIL only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from rime_pl.media import thinned
from rime_pl.report.drawing import (
    CARD,
    GAP,
    INK,
    LINE,
    PAPER,
    PLAIN,
    QUERY,
    RIGHT,
    SOFT,
    WRONG,
    font,
    side_by_side,
    text_line,
    wrapped,
)
from rime_pl.types import THUMBNAIL, Clip, Item, Medium, frames_of

SIDE = THUMBNAIL  # width and height of a card's picture
CAPTION_LINES = 3
CLIP_FRAMES = 3  # of a clip on a card
_HEAD = 44  # height of the title


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
    width = _width(columns)
    top = _HEAD if title else GAP
    heights = [_row_height(row) for row in rows]
    paper = Image.new("RGB", (width, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    if title:
        text_line(draw, (GAP, 14), title, width - 2 * GAP, 16, INK, True)
    for row, height in zip(rows, heights, strict=True):
        _draw_row(paper, draw, row, top, width)
        top += height
    return paper


def cards_of(picture: Image.Image, num_rows: int, num_notes: int) -> list[list[Image.Image]]:
    """Cut a drawn sheet into its cards: for each row the query, then what was found, best first.

    A narrow page then shows them below each other, where the sheet would not be readable.

    Args:
        picture: From :func:`sheet`, with a title, and with rows that have titles.
        num_rows: Number of its rows.
        num_notes: Number of notes of each row.

    Returns:
        The cards; nothing if the sheet was drawn in another way, as by another version.
    """
    columns = (picture.width - 3 * GAP) // (SIDE + GAP)
    top, height = _HEAD, _height(LINE + 4, num_notes)
    if picture.size != (_width(columns), top + num_rows * height):
        return []
    lefts = [GAP, *(GAP + SIDE + 2 * GAP + number * (SIDE + GAP) for number in range(columns - 1))]
    rows = []
    for number in range(num_rows):
        end = top + (number + 1) * height
        start = end - height + LINE + 4 + LINE * num_notes + 6
        rows.append([picture.crop((left, start, left + SIDE + 1, end - GAP)) for left in lefts])
    return rows


def _width(columns: int) -> int:
    return GAP + columns * (SIDE + GAP) + 2 * GAP


def _row_height(row: SheetRow) -> int:
    return _height(LINE + 4 if row.title else 0, len(row.notes))


def _height(title: int, num_notes: int) -> int:
    return title + LINE * num_notes + SIDE + 10 + CAPTION_LINES * LINE + 2 * GAP


def _draw_row(paper: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, top: int, width: int) -> None:
    room = width - 2 * GAP
    if row.title:
        text_line(draw, (GAP, top), row.title, room, 13, INK, True)
        top += LINE + 4
    for note in row.notes:
        text_line(draw, (GAP, top), note, room, 12, SOFT)
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
        picture = side_by_side(frames, inside, inside)
        paper.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
    else:
        used = font(14, text=card.item.text)
        lines = wrapped(card.item.text, used, inside, (inside - 8) // 19)
        start = top + (SIDE - 19 * len(lines)) // 2
        for number, line in enumerate(lines):
            draw.text((left + SIDE / 2, start + 19 * number), line, INK, used, anchor="ma")
    if card.right is not None:
        mark = font(13, True)
        draw.ellipse((left + SIDE - 24, top + 4, left + SIDE - 4, top + 24), colour)
        draw.text((left + SIDE - 14, top + 14), "✓" if card.right else "✗", PAPER, mark, anchor="mm")
    used = font(12, text=card.caption)
    for number, line in enumerate(wrapped(card.caption, used, SIDE, CAPTION_LINES)):
        draw.text((left + 1, top + SIDE + 7 + LINE * number), line, INK if number == 0 else SOFT, used)


def shown(medium: Medium) -> Medium:
    """Return a medium as a card shows it: of a clip the first, the middle and the last frame."""
    return thinned(medium, CLIP_FRAMES) if isinstance(medium, Clip) else medium
