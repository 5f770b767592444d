"""Scenes: drawn pictures whose retrieval asks for an answer that has to be worked out.

Each target is a picture of two objects, one left and one right (shape x colour each: 3,584 contents). A query
describes it, or gives a picture or a table from which the two objects must be *derived*: relative
reference, count then compare, look-up, composed change. Called by `rime shards scenes`.

Everything follows from the seed; splits are by composition, so no test content occurs in training.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from datamodules.shards import write_corpus
from rime_pl.types import Item, Pair

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (240, 200, 20),
    "purple": (140, 40, 170), "orange": (250, 130, 20), "cyan": (40, 200, 220), "black": (20, 20, 20),
}  # fmt: skip
CODES = ("alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "zeta")
GRID = 3
SPOTS = [(row, column) for row in range(GRID) for column in range(GRID)]
PLACES = tuple(
    f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")
)
INSTRUCTION = "Find the picture."


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a target shows: one thing left, one right."""

    left: Thing
    right: Thing

    @property
    def content_id(self) -> str:
        return f"scene: {self.left} | {self.right}"


Cells = dict[tuple[int, int], Thing]  # (row, column) -> thing


# -- drawing ------------------------------------------------------------------------------------------


def draw(cells: Cells, size: int, rng: random.Random) -> Image.Image:
    """A ``GRID`` x ``GRID`` picture with a little jitter, so that twins differ in their pixels."""
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    step = size / GRID
    for (row, column), thing in cells.items():
        radius = step * rng.uniform(0.30, 0.42)
        slack = step / 2 - radius
        x = (column + 0.5) * step + rng.uniform(-slack, slack)
        y = (row + 0.5) * step + rng.uniform(-slack, slack)
        _draw_shape(pen, thing.shape, x, y, radius, COLOURS[thing.colour])
    return image


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]
) -> None:
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


# -- words --------------------------------------------------------------------------------------------


def a(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing}"


def rewrite(scene: Scene, rng: random.Random) -> str:
    """The answer, already worked out; each side draws its wording by itself."""
    return rng.choice(
        (
            f"Left {a(scene.left)}, right {a(scene.right)}.",
            f"{a(scene.left).capitalize()}, then {a(scene.right)}.",
        )
    )


def describe(scene: Scene, rng: random.Random) -> str:
    """A user's description, in words that no rewrite uses."""
    return rng.choice(
        (
            f"{scene.right} with {a(scene.left)} before it",
            f"first {scene.left} and second {scene.right}",
            f"{scene.left} beside {scene.right}",
        )
    )


# -- tasks --------------------------------------------------------------------------------------------
# Each takes the scene to be found and returns (text, cells of the query picture or None, steps).

Question = tuple[str, Cells | None, str]


def ask_describe(scene: Scene, rng: random.Random) -> Question:
    return describe(scene, rng), None, f"It names {scene.left} and {scene.right}."


def ask_twin(scene: Scene, rng: random.Random) -> Question:
    return "the same scene, drawn anew", scene_cells(scene, rng), f"It shows {scene.left} and {scene.right}."


def ask_relative(scene: Scene, rng: random.Random) -> Question:
    """Each side of the answer stands next to a landmark that the text names by shape."""
    steps = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
    while True:
        cells: Cells = {}
        spots = rng.sample(SPOTS, 2)
        cells[spots[0]], cells[spots[1]] = scene.left, scene.right
        clues = []
        free_shapes = [s for s in SHAPES if s not in (scene.left.shape, scene.right.shape)]
        rng.shuffle(free_shapes)
        for row, column in spots:
            word = rng.choice(list(steps))
            landmark = (row - steps[word][0], column - steps[word][1])
            if not (0 <= landmark[0] < GRID and 0 <= landmark[1] < GRID) or landmark in cells:
                break
            cells[landmark] = Thing(rng.choice(list(COLOURS)), free_shapes.pop())
            clues.append((word, cells[landmark].shape))
        if len(clues) == 2:
            break
    for spot in SPOTS:  # something beside what is asked for
        if spot not in cells and free_shapes and rng.random() < 0.4:
            cells[spot] = Thing(rng.choice(list(COLOURS)), free_shapes.pop())
    (word_l, mark_l), (word_r, mark_r) = clues
    text = f"left: {word_l} the {mark_l}; right: {word_r} the {mark_r}"
    return text, cells, f"{word_l} the {mark_l} is {scene.left}; {word_r} the {mark_r} is {scene.right}."


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """Shapes are named, colours counted: the commonest one left, the rarest right (so they must differ)."""
    others = [c for c in COLOURS if c not in (scene.left.colour, scene.right.colour)]
    middle = rng.choice(others)
    counts = {scene.left.colour: rng.choice((4, 5)), middle: 2, scene.right.colour: 1}
    shape = rng.choice(SHAPES)
    spots = rng.sample(SPOTS, sum(counts.values()))
    colours = [colour for colour, count in counts.items() for _ in range(count)]
    cells = {spot: Thing(colour, shape) for spot, colour in zip(spots, colours, strict=True)}
    text = f"left: {scene.left.shape} in the commonest colour; right: {scene.right.shape} in the rarest"
    tally = ", ".join(f"{count} {colour}" for colour, count in counts.items())
    return text, cells, f"{tally}; commonest {scene.left.colour}, rarest {scene.right.colour}."


def ask_table(scene: Scene, rng: random.Random) -> Question:
    """Code names stand for things; the query names two codes."""
    codes = rng.sample(CODES, 4)
    used = {scene.left.shape, scene.right.shape}
    fillers = [
        Thing(rng.choice(list(COLOURS)), s) for s in rng.sample([s for s in SHAPES if s not in used], 2)
    ]
    table = list(zip(codes, [scene.left, scene.right, *fillers], strict=True))
    rng.shuffle(table)
    rows = ", ".join(f"{code} {thing}" for code, thing in table)
    return (
        f"{rows}; left: {codes[0]}; right: {codes[1]}",
        None,
        f"{codes[0]} is {scene.left}; {codes[1]} is {scene.right}.",
    )


def ask_composed(scene: Scene, rng: random.Random) -> Question:
    """A picture of another scene and a change of two steps that leads to the one sought."""
    left, right = scene.left, scene.right
    side = rng.choice(("left", "right"))
    if rng.random() < 0.5:  # colours change places, then one shape is replaced
        old = rng.choice([s for s in SHAPES if s not in (left.shape, right.shape)])
        shapes = (old, right.shape) if side == "left" else (left.shape, old)
        before = Scene(Thing(right.colour, shapes[0]), Thing(left.colour, shapes[1]))
        text = f"swap the colours, then make the {side} one a {(left if side == 'left' else right).shape}"
    else:  # the things change places, then one is repainted
        old = rng.choice([c for c in COLOURS if c != (left if side == "left" else right).colour])
        now_left = Thing(old, left.shape) if side == "left" else left
        now_right = Thing(old, right.shape) if side == "right" else right
        before = Scene(now_right, now_left)
        text = f"swap the sides, then paint the {side} one {(left if side == 'left' else right).colour}"
    return text, scene_cells(before, rng), f"before: {before.left} and {before.right}; {text}."


TASKS: dict[str, Callable[[Scene, random.Random], Question]] = {
    "describe": ask_describe,
    "twin": ask_twin,
    "relative": ask_relative,
    "count": ask_count,
    "table": ask_table,
    "composed": ask_composed,
}


def scene_cells(scene: Scene, rng: random.Random) -> Cells:
    """One thing in the left column, one in the right, each at any height."""
    return {(rng.randrange(GRID), 0): scene.left, (rng.randrange(GRID), GRID - 1): scene.right}


def make_pair(task: str, number: int, scene: Scene, size: int, rng: random.Random) -> Pair:
    """One query of a task for a scene, and a fresh picture of the scene as its target."""
    text, cells, steps = TASKS[task](scene, rng)
    answer = rewrite(scene, rng)
    query = Item(
        text=text,
        images=() if cells is None else (draw(cells, size, rng),),
        content_id=f"{task} {number}",
        instruction=INSTRUCTION,
        rewrite=answer,
        cot=f"{steps} {answer}",
    )
    target = Item(
        text="",
        images=(draw(scene_cells(scene, rng), size, rng),),
        content_id=scene.content_id,
        rewrite=rewrite(scene, rng),
    )
    return Pair(f"{task}-{number:06d}", task, "pictures", query, target)


# -- captions of the base's pre-training ------------------------------------------------------------


def caption_pair(number: int, scenes: list[Scene], size: int, rng: random.Random) -> Pair:
    """A picture with plain captions, one per line: what stands where, what is beside what, how many."""
    kind = rng.random()
    if kind < 0.5:
        cells = scene_cells(rng.choice(scenes), rng)
    else:
        many = kind > 0.85  # one shape in several colours, as in a count
        shapes = [rng.choice(SHAPES)] * rng.randint(4, 8) if many else rng.sample(SHAPES, rng.randint(2, 6))
        palette = rng.sample(list(COLOURS), 3) if many else list(COLOURS)
        spots = rng.sample(SPOTS, len(shapes))
        cells = {spot: Thing(rng.choice(palette), shape) for spot, shape in zip(spots, shapes, strict=True)}
    image = draw(cells, size, rng)
    item = Item("", (image,), f"caption {number}")
    return Pair(
        f"captions-{number:06d}",
        "captions",
        "captions",
        item,
        Item("\n".join(_captions(cells, rng)), (), f"caption {number}"),
    )


def _captions(cells: Cells, rng: random.Random) -> list[str]:
    # the place comes first: a reader of captions then learns to look there
    listed = [f"{PLACES[row * GRID + column]}: {thing}" for (row, column), thing in sorted(cells.items())]
    lines = [
        ", ".join(listed),
        ", ".join(f"{thing.shape} is {thing.colour}" for thing in dict.fromkeys(cells.values())),
    ]
    if {column for _, column in cells} == {0, GRID - 1} and len(cells) == 2:
        (_, first), (_, second) = sorted(cells.items(), key=lambda cell: cell[0][1])
        lines = [f"on the left {first}, on the right {second}", *lines[:1]]
    near = []
    for (row, column), thing in cells.items():
        for word, dr, dc in (("above", -1, 0), ("below", 1, 0), ("left of", 0, -1), ("right of", 0, 1)):
            other = cells.get((row + dr, column + dc))
            if other is not None and other != thing:
                near.append(f"{word} the {thing.shape} is {a(other)}")
    rng.shuffle(near)
    if near and len({t.shape for t in cells.values()}) == len(cells):
        lines.append(", ".join(near[:4]))
    tally: dict[str, int] = {}
    for thing in cells.values():
        tally[thing.colour] = tally.get(thing.colour, 0) + 1
    ordered = sorted(tally.items(), key=lambda kv: -kv[1])
    lines.append(", ".join(f"{count} {colour}" for colour, count in ordered))
    return lines


# -- the corpus -----------------------------------------------------------------------------------------


def compositions(seed: int, val: int, test: int) -> dict[str, list[Scene]]:
    """All contents, dealt out to the splits: every thing is seen in training, no test pairing is."""
    things = [Thing(colour, shape) for shape in SHAPES for colour in COLOURS]
    scenes = [Scene(a, b) for a, b in itertools.permutations(things, 2) if a.shape != b.shape]
    random.Random(f"scenes {seed}").shuffle(scenes)
    return {"test": scenes[:test], "val": scenes[test : test + val], "train": scenes[test + val :]}


def split_pairs(split: str, scenes: list[Scene], per_task: int, size: int, seed: int) -> Iterator[Pair]:
    """``per_task`` pairs of each task; the targets go round the split's contents, so that each occurs."""
    for offset, task in enumerate(TASKS):
        rng = random.Random(f"{split} {task} {seed}")
        fitting = [scene for scene in scenes if task != "count" or scene.left.colour != scene.right.colour]
        for number in range(per_task):
            yield make_pair(task, number, fitting[(offset * per_task + number) % len(fitting)], size, rng)


def build(
    output: Path,
    seed: int = 0,
    size: int = 72,
    train_per_task: int = 4000,
    val_per_task: int = 36,
    test_per_task: int = 160,
    captions: int = 12000,
    test_contents: int = 640,
) -> None:
    """Draw the corpus and write its shards.

    Args:
        output: Corpus folder to make.
        seed: Of everything.
        size: Width and height of a picture in pixels.
        train_per_task, val_per_task, test_per_task: Pairs of each of the six tasks in a split.
        captions: Captioned pictures for the base's pre-training.
        test_contents: Distinct contents that only the test split shows; its gallery.
    """
    scenes = compositions(seed, val=len(TASKS) * val_per_task, test=test_contents)
    rng = random.Random(f"captions {seed}")
    splits = {
        name: split_pairs(name, scenes[name], count, size, seed)
        for name, count in (("train", train_per_task), ("val", val_per_task), ("test", test_per_task))
    }
    splits["captions"] = (caption_pair(n, scenes["train"], size, rng) for n in range(captions))
    totals = {
        "train": train_per_task * len(TASKS),
        "val": val_per_task * len(TASKS),
        "test": test_per_task * len(TASKS),
        "captions": captions,
    }
    write_corpus(
        output,
        name="scenes",
        licence="Apache-2.0 (drawn by this builder)",
        splits=splits,
        totals=totals,
        seed=seed,
    )
