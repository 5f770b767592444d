"""Clips of two things, of which one moves: what they show, how they are drawn, and what is asked about them.

Used by builder.py beside it. A single frame, or the frames in another order, does not tell what moved where.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from rime_pl.datamodules.builders.scenes.builder import a
from rime_pl.datamodules.builders.scenes.drawing import COLOURS, GRID, Couple, Scene, Thing, draw_shape
from rime_pl.types import Clip

#: Clockwise. Captions of pictures say "left" and "right" of places.
DIRECTIONS = ("rightwards", "downwards", "leftwards", "upwards")
#: Frames of a clip, and the seconds between two of them.
NUM_FRAMES, SPACING = 4, 0.5


@dataclass(frozen=True)
class Move:
    """The content of a clip: a thing crosses the picture, another one stays where it is."""

    mover: Thing
    direction: str
    still: Thing

    @property
    def content_id(self) -> str:
        return f"move: {self.mover} {self.direction} | {self.still}"

    @property
    def couple(self) -> Couple:
        return frozenset((self.mover, self.still))


def opposite(direction: str) -> str:
    """Return the other way.

    >>> opposite("rightwards"), opposite("upwards")
    ('leftwards', 'downwards')
    """
    return DIRECTIONS[(DIRECTIONS.index(direction) + 2) % len(DIRECTIONS)]


def moves_of(first: Thing, second: Thing) -> list[Move]:
    """Return the eight contents that two things can have: the hard neighbours of each other."""
    return [
        Move(mover, direction, still)
        for mover, still in ((first, second), (second, first))
        for direction in DIRECTIONS
    ]


# -- drawing --------------------------------------------------------------------------------------------


def film(move: Move, size: int, rng: random.Random, lane: int | None = None) -> Clip:
    """Draw a clip.

    Args:
        move: What it shows.
        size: Width and height of the frames in pixels.
        rng: Chooses places, sizes and speed.
        lane: Cell along the way beside which the other thing stands; None: any.
    """
    step = size / GRID
    mover_lane, still_lane = rng.sample(range(GRID), 2)  # the two never meet
    along = rng.randrange(GRID) if lane is None else lane
    radii = [step * rng.uniform(0.30, 0.42) for _ in range(2)]
    shifts = [(step / 2 - radius) * rng.uniform(-1, 1) for radius in radii]
    start, stop = rng.uniform(0, 0.2), rng.uniform(GRID - 1.2, GRID - 1)
    ahead, across = (
        move.direction in ("rightwards", "downwards"),
        move.direction in ("rightwards", "leftwards"),
    )
    frames = []
    for number in range(NUM_FRAMES):
        way = start + (stop - start) * number / (NUM_FRAMES - 1)
        places = ((mover_lane, way if ahead else GRID - 1 - way), (still_lane, float(along)))
        image = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(image)
        for thing, place, radius, shift in zip((move.mover, move.still), places, radii, shifts, strict=True):
            row, column = place if across else place[::-1]
            x, y = (column + 0.5) * step + shift, (row + 0.5) * step + shift
            draw_shape(pen, thing.shape, x, y, radius, COLOURS[thing.colour])
        frames.append(image)
    return Clip(tuple(frames), tuple(SPACING * number for number in range(NUM_FRAMES)))


def in_another_order(clip: Clip, rng: random.Random) -> Clip:
    """Return a clip whose frames stand in any order but their own: a control."""
    order = list(range(len(clip.frames)))
    while order == sorted(order):
        rng.shuffle(order)
    return Clip(tuple(clip.frames[number] for number in order), clip.times)


def one_frame(clip: Clip, rng: random.Random) -> Clip:
    """Return one frame of a clip, any of them, for the whole length of the clip: a control."""
    return Clip((rng.choice(clip.frames),) * len(clip.frames), clip.times)


# -- words ----------------------------------------------------------------------------------------------


def rewrite(move: Move, rng: random.Random) -> str:
    """Return the answer in words. Query and target choose their wording separately."""
    return rng.choice(
        (
            f"{a(move.mover).capitalize()} moves {move.direction}, {a(move.still)} stays.",
            f"{a(move.mover).capitalize()} goes {move.direction} past {a(move.still)}.",
        )
    )


def captions(move: Move) -> list[str]:
    """Return captions for the tiny base model, in words that no rewrite uses."""
    return [
        f"going {move.direction} {move.mover}, resting {move.still}",
        f"resting {move.still}, going {move.direction} {move.mover}",
        f"the {move.mover.shape} goes {move.direction}",
        f"the {move.mover.shape} is {move.mover.colour}, the {move.still.shape} is {move.still.colour}",
    ]


# -- tasks: each takes what is to be found and returns (text, what the query shows, chain of thought) -----

Asked = tuple[str, Move, str]


def once_more(move: Move) -> Asked:
    """Show the movement itself, drawn anew."""
    return "once more", move, "the same again."


def backwards(move: Move) -> Asked:
    """Show the movement in the other direction."""
    before = Move(move.mover, opposite(move.direction), move.still)
    return "played backwards", before, f"backwards, {before.direction} is {move.direction}."


CHANGES: tuple[Callable[[Move], Asked], ...] = (once_more, backwards)


def ask_motion(move: Move, rng: random.Random) -> Asked:
    """Return a change in words, and the movement before it, which is shown."""
    text, before, thoughts = rng.choice(CHANGES)(move)
    return text, before, f"{before.mover} moves {before.direction}, {before.still} stays; {thoughts}"


def ask_finish(scene: Scene, rng: random.Random) -> Asked:
    """Return a movement by which one of two things passes the other one; the scene is its end."""
    if rng.random() < 0.5:
        move = Move(scene.right, "rightwards", scene.left)
    else:
        move = Move(scene.left, "leftwards", scene.right)
    return "left and right at the end", move, f"{move.mover} moves {move.direction} past {move.still}."
