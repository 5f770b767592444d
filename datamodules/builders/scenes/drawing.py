"""Defines a scene and draws it: coloured shapes on a grid. Used by builder.py beside it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (240, 200, 20),
    "purple": (140, 40, 170), "orange": (250, 130, 20), "cyan": (40, 200, 220), "black": (20, 20, 20),
}  # fmt: skip
GRID = 3
SPOTS = [(row, column) for row in range(GRID) for column in range(GRID)]


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a target: one thing left, one thing right."""

    left: Thing
    right: Thing

    @property
    def content_id(self) -> str:
        return f"scene: {self.left} | {self.right}"


Cells = dict[tuple[int, int], Thing]  # (row, column) -> thing
Couple = frozenset[Thing]  # two different things


def couples_in(things: Iterable[Thing]) -> set[Couple]:
    """Return all couples of different things among those that a picture shows."""
    return {frozenset(two) for two in itertools.combinations(set(things), 2)}


def drawn(things: Iterable[Thing]) -> str:
    """Return what a picture shows, for the source of a sample.

    >>> drawn([Thing("red", "circle"), Thing("blue", "star"), Thing("red", "circle")])
    'blue star, red circle'
    """
    return ", ".join(sorted({str(thing) for thing in things})) or "no picture"


def in_a_row(things: list[Thing], rng: random.Random) -> Cells:
    """Return two or three things from left to right, each at a random height."""
    columns = (0, GRID - 1) if len(things) == 2 else range(GRID)
    return {(rng.randrange(GRID), column): thing for column, thing in zip(columns, things, strict=True)}


def in_groups(counts: dict[Thing, int], rng: random.Random) -> Cells:
    """Return the given number of each thing, at random places."""
    things = [thing for thing, count in counts.items() for _ in range(count)]
    return dict(zip(rng.sample(SPOTS, len(things)), things, strict=True))


def draw(cells: Cells, size: int, rng: random.Random) -> Image.Image:
    """Draw a ``GRID`` x ``GRID`` picture with a little jitter, so that duplicates differ in their pixels."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    step = size / GRID
    for (row, column), thing in cells.items():
        radius = step * rng.uniform(0.30, 0.42)
        slack = step / 2 - radius
        x = (column + 0.5) * step + rng.uniform(-slack, slack)
        y = (row + 0.5) * step + rng.uniform(-slack, slack)
        draw_shape(pen, thing.shape, x, y, radius, COLOURS[thing.colour])
    return image


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]
) -> None:
    """Draw a shape of ``r`` pixels from its middle (x, y) to its edge."""
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, round(r * 0.35)))
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    else:
        pen.polygon([(x + dx * r, y + dy * r) for dx, dy in _OUTLINES[shape]], fill=fill)


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": [(0, -1), (0.25, -0.3), (1, -0.3), (0.4, 0.15), (0.6, 0.9), (0, 0.45), (-0.6, 0.9), (-0.4, 0.15),
             (-1, -0.3), (-0.25, -0.3)],
    "heart": [(0, 0.95), (-0.95, -0.05), (-0.95, -0.6), (-0.5, -0.9), (0, -0.45), (0.5, -0.9), (0.95, -0.6),
              (0.95, -0.05)],
}  # fmt: skip
