"""Pages with a small table of numbers: what they show, how they are drawn, and what is asked about them.

Used by builder.py beside it. Each page has neighbours with the same words and other numbers, so a question
finds its page only if the numbers are read.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from rime_pl.types import Page

NAMES = ("apples", "beans", "eggs", "figs", "leeks", "nuts", "pears", "plums")
LARGEST = 9
#: Numbers next to each other that the pages of a block have.
SPAN = 3
#: A page is divided into rows of this share of its height: a head and two entries.
ROWS = 3


@dataclass(frozen=True)
class Entry:
    """A row of a table."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


@dataclass(frozen=True)
class Sheet:
    """The content of a page: two entries. Their order on the page says nothing."""

    first: Entry
    second: Entry  # its name comes later in the alphabet

    def __str__(self) -> str:
        return f"{self.first}, {self.second}"

    @property
    def content_id(self) -> str:
        return f"page: {self.first} | {self.second}"


def blocks() -> list[list[Sheet]]:
    """Return all contents that a page can have, in blocks of nine: two names, and three numbers for each.

    A page of a block shares an entry with four others, so that one entry does not tell which page is right.
    """
    spans = [range(first, first + SPAN) for first in range(1, LARGEST + 1, SPAN)]
    return [
        [Sheet(Entry(one, a), Entry(other, b)) for a in left for b in right]
        for one, other in itertools.combinations(NAMES, 2)
        for left, right in itertools.product(spans, repeat=2)
    ]


def sheet(one: Entry, other: Entry) -> Sheet:
    """Return the sheet of two entries, in any order."""
    return Sheet(*sorted((one, other), key=lambda entry: entry.name))


def draw_page(sheet: Sheet, size: int, rng: random.Random) -> Page:
    """Draw a page: a head with lines around it, and the entries in any order below."""
    image = Image.new("L", (size, size), 255)
    pen, step = ImageDraw.Draw(image), size / ROWS
    rows = [("goods", "price"), *((e.name, str(e.number)) for e in _any_order(sheet, rng))]
    left, grey = rng.uniform(1, 4), rng.randrange(60)
    for number, (name, value) in enumerate(rows):
        words, figures = (
            ImageFont.load_default(step * of) for of in ((0.42, 0.62) if number else (0.36,) * 2)
        )
        top = (number + 0.5) * step + rng.uniform(-0.04, 0.04) * step
        pen.text((left, top), name, grey, words, anchor="lm")
        pen.text((size * 0.82 + rng.uniform(-1, 1), top), value, grey, figures, anchor="mm")
        pen.line((0, (number + 1) * step - 1, size, (number + 1) * step - 1), 128)
    pen.line((size * 0.62, 0, size * 0.62, size), 128)
    return Page(image)


def _any_order(sheet: Sheet, rng: random.Random) -> list[Entry]:
    return rng.sample((sheet.first, sheet.second), 2)


# -- words ----------------------------------------------------------------------------------------------


def rewrite(sheet: Sheet, rng: random.Random) -> str:
    """Return the answer in words, by the alphabet. Query and target choose their wording separately."""
    one, other = sheet.first, sheet.second
    return rng.choice(
        (
            f"A list with {one.name} at {one.number} and {other.name} at {other.number}.",
            f"{one.name.capitalize()} cost {one.number}, {other.name} cost {other.number}.",
        )
    )


def captions(sheet: Sheet, rng: random.Random) -> list[str]:
    """Return captions for the tiny base model, in words that no rewrite uses."""
    one, other = _any_order(sheet, rng)
    return [
        f"the price of {one.name} is {one.number}",
        f"the price of {other.name} is {other.number}",
        f"{one.number} is the price of {one.name}, {other.number} is the price of {other.name}",
        f"goods: {other.name} and {one.name}",
    ]


# -- tasks: each takes the page to be found and returns (text, the page of the query if any, chain of thought)


def compared(more: int) -> str:
    """Return a difference in words.

    >>> compared(2), compared(0), compared(-1)
    ('2 more', 'the same', '1 less')
    """
    return "the same" if more == 0 else f"{abs(more)} {'more' if more > 0 else 'less'}"


def ask_sum(found: Sheet, rng: random.Random) -> tuple[str, str]:
    """Name one number; the other one has to be worked out from the sum or the difference."""
    one, other = _any_order(found, rng)
    if rng.random() < 0.5:
        text = f"{one.name} for {one.number}, {other.name} for {compared(other.number - one.number)}"
    else:
        text = f"{one.name} for {one.number}, with {other.name} {one.number + other.number} in all"
    return text, f"{one}, so {other}."


def ask_update(found: Sheet, rng: random.Random) -> tuple[str, Sheet, str]:
    """Show another page; the text names the change that makes it the page to be found."""
    one, other = _any_order(found, rng)
    if rng.random() < 0.4 and one.number != other.number:
        before = sheet(Entry(one.name, other.number), Entry(other.name, one.number))
        return "swap the two prices", before, f"before: {before}; swapped."
    more = rng.choice([d for d in range(-3, 4) if d and 1 <= one.number - d <= LARGEST])
    before = sheet(Entry(one.name, one.number - more), other)
    return f"{one.name} cost {compared(more)}", before, f"before: {before}; so {one}."
