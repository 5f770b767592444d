"""Text and pictures on a sheet: fonts, lines that fit, pictures side by side. Uses PIL only.

Called by sheets.py (what a search found) and contact_sheet.py (what is in a corpus).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

INK, SOFT, PAPER, CARD = "#1f2933", "#6b7785", "#ffffff", "#f6f7f9"
RIGHT, WRONG, QUERY, PLAIN = "#1a9c5b", "#d64545", "#2f6bde", "#cfd6df"
GAP = 14
LINE = 17  # height of a line of text


def font(size: int, bold: bool = False, text: str = "") -> ImageFont.FreeTypeFont:
    """Return a font that has the letters of ``text``, as far as a font on this machine has them.

    It is the one that comes with matplotlib, because that is the same on every machine, unless it lacks some
    of the letters and another one has more of them.
    """
    plain = _plain(bold)
    wanted = frozenset(letter for letter in text if not letter.isspace() and letter.isprintable())
    if missing := wanted - _letters(plain):
        others = [(len(missing & _letters(path)), path) for path in _other_fonts()]
        most, path = max(others, default=(0, plain))
        if most:
            return _font(path, size)
    return _font(plain, size)


def missing_letters(texts: Iterable[str]) -> str:
    """Return the letters of texts that are shown as boxes, because no font on this machine has them."""
    letters = {letter for text in texts for letter in text if letter.isprintable() and not letter.isspace()}
    missing = letters - _letters(_plain(False))
    if missing:
        missing -= set[str]().union(*(_letters(path) for path in _other_fonts()))
    return "".join(sorted(missing))


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _plain(bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def _letters(path: str) -> frozenset[str]:
    """Return the letters of a font; none of one that cannot be opened or drawn with."""
    try:
        face = FT2Font(path)
        ImageFont.truetype(path, 14)  # fonts of colour pictures have a single size
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, face.get_charmap()))


@cache
def _other_fonts() -> list[str]:
    """Return the fonts of this machine, in one order."""
    return sorted(findSystemFonts())


def cut(text: str, used: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text as one line, shortened with an ellipsis if it is too long."""
    line = " ".join(text.split())
    if used.getlength(line) <= width:
        return line
    while line and used.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def wrapped(text: str, used: ImageFont.FreeTypeFont, width: int, num_lines: int) -> list[str]:
    """Return the text in at most ``num_lines`` lines; line breaks are kept, text that does not fit is cut.

    A word that is wider than a line, as in a language without spaces, is broken anywhere.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and used.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
            while used.getlength(line) > width and len(lines) < num_lines:
                fits = next(n for n in range(len(line), 0, -1) if n == 1 or used.getlength(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    if len(lines) > num_lines:
        lines = [*lines[: num_lines - 1], " ".join(lines[num_lines - 1 :])]
    return [cut(line, used, width) for line in lines]


def text_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    size: int,
    colour: str,
    bold: bool = False,
) -> None:
    """Draw a text on one line, cut to ``width`` pixels; ``place`` is its left upper corner."""
    used = font(size, bold, text)
    draw.text(place, cut(text, used, width), colour, used)


def side_by_side(images: Sequence[Image.Image], width: int, height: int) -> Image.Image:
    """Return pictures in one row, at most so wide and high; small pictures are enlarged."""
    share = (width - 4 * (len(images) - 1)) // len(images)
    parts = []
    for image in images:
        scale = min(share / image.width, height / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        parts.append(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    canvas = Image.new("RGB", (share * len(parts) + 4 * (len(parts) - 1), max(p.height for p in parts)), CARD)
    for number, part in enumerate(parts):
        canvas.paste(
            part, (number * (share + 4) + (share - part.width) // 2, (canvas.height - part.height) // 2)
        )
    return canvas
