"""Builds the scenes corpus: drawn pictures that are found only by working out an answer.

Each target is a picture of two things, one left and one right (shape x colour each: 3,584 contents). A query
describes it, or shows a picture from which the two things must be *derived*: by a relative position, by
counting, by a look-up in a table, or by applying a change. Called by `rime shards scenes`.

Everything follows from the seed. Each split has its own scenes. No training picture, of a query, a target or
a caption, shows two things together whose scene is a target of the validation or test split.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path

from rime_pl.datamodules.builders.scenes.drawing import (
    COLOURS,
    SHAPES,
    Cells,
    Couple,
    Scene,
    Thing,
    couples_in,
    draw,
    drawn,
    in_a_row,
    in_groups,
)
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair

INSTRUCTION = "Find the picture."
#: How often a question is made anew until its picture shows nothing that is held out.
TRIES = 1000


# -- words --------------------------------------------------------------------------------------------


def a(thing: Thing) -> str:
    """Return the thing with its indefinite article."""
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing}"


def rewrite(scene: Scene, rng: random.Random) -> str:
    """Return the answer in words, already worked out. Query and target choose their wording separately."""
    return rng.choice(
        (
            f"Left {a(scene.left)}, right {a(scene.right)}.",
            f"{a(scene.left).capitalize()}, then {a(scene.right)}.",
        )
    )


def describe(scene: Scene, rng: random.Random) -> str:
    """Return a user's description, in words that no rewrite uses."""
    return rng.choice(
        (
            f"{scene.right} with {a(scene.left)} before it",
            f"first {scene.left} and second {scene.right}",
            f"{scene.left} beside {scene.right}",
        )
    )


# -- tasks --------------------------------------------------------------------------------------------
# Each takes the scene to be found and returns (text, cells of the query picture or None, chain of thought).

Question = tuple[str, Cells | None, str]


def ask_describe(scene: Scene, rng: random.Random) -> Question:
    """Describe the scene in words, without a picture."""
    return describe(scene, rng), None, f"It names {scene.left} and {scene.right}."


def ask_twin(scene: Scene, rng: random.Random) -> Question:
    """Show another drawing of the scene itself."""
    cells = in_a_row([scene.left, scene.right], rng)
    return "the same scene, drawn anew", cells, f"It shows {scene.left} and {scene.right}."


def ask_relative(scene: Scene, rng: random.Random) -> Question:
    """Show the two things and a landmark in a row; the text names the things by their distance to it."""
    mark = another_thing(rng, scene.left, scene.right)
    near, far = rng.sample((scene.left, scene.right), 2)
    row = rng.choice(([mark, near, far], [far, near, mark]))
    places = ("next to", "far from") if near == scene.left else ("far from", "next to")
    text = f"left: {places[0]} the {mark.shape}; right: {places[1]} the {mark.shape}"
    thoughts = f"next to the {mark.shape} is {near}; far from the {mark.shape} is {far}."
    return text, in_a_row(row, rng), thoughts


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """Show several of each thing; the reader must count which one there are more of."""
    few = rng.randint(1, 3)
    counts = {scene.left: few + rng.randint(2, 3), scene.right: few}
    tally = f"{counts[scene.left]} {scene.left}, {counts[scene.right]} {scene.right}."
    return "left: what there is more of; right: fewer", in_groups(counts, rng), tally


def ask_table(scene: Scene, rng: random.Random) -> Question:
    """Show two keys; the text is the table that says which thing each key stands for."""
    keys = rng.sample(SHAPES, 3)
    third = another_thing(rng, scene.left, scene.right)
    table = list(zip(keys, (scene.left, scene.right, third), strict=True))
    shown = [Thing(rng.choice(list(COLOURS)), key) for key in keys[:2]]
    rows = ", ".join(f"{key}: {thing}" for key, thing in rng.sample(table, 3))
    thoughts = f"{keys[0]} is {scene.left}; {keys[1]} is {scene.right}."
    return f"read each shape in the table: {rows}", in_a_row(shown, rng), thoughts


def another_thing(rng: random.Random, *things: Thing) -> Thing:
    """Return a thing whose shape and colour differ from those of all ``things``."""
    used = {value for thing in things for value in (thing.shape, thing.colour)}
    colour = rng.choice([c for c in COLOURS if c not in used])
    return Thing(colour, rng.choice([s for s in SHAPES if s not in used]))


def swapped(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """Return an exchange of sides or colours in words, and the scene before it."""
    left, right = scene.left, scene.right
    if rng.random() < 0.5 or left.colour == right.colour:
        return "swap the sides", Scene(right, left)
    return "swap the colours", Scene(Thing(right.colour, left.shape), Thing(left.colour, right.shape))


def repainted(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """Return a change of one thing in words, and the scene before it."""
    side = rng.choice(("left", "right"))
    thing, other = (scene.left, scene.right) if side == "left" else (scene.right, scene.left)
    if rng.random() < 0.5:
        words = f"paint the {side} one {thing.colour}"
        thing = Thing(rng.choice([c for c in COLOURS if c != thing.colour]), thing.shape)
    else:
        words = f"make the {side} one a {thing.shape}"
        thing = Thing(thing.colour, rng.choice([s for s in SHAPES if s not in (thing.shape, other.shape)]))
    return words, Scene(thing, other) if side == "left" else Scene(other, thing)


def ask_composed(scene: Scene, rng: random.Random) -> Question:
    """Show another scene; the text names the change that turns it into the scene to be found."""
    words, before = rng.choice((swapped, repainted))(scene, rng)
    thoughts = f"before: {before.left} and {before.right}; {words}."
    return words, in_a_row([before.left, before.right], rng), thoughts


TASKS: dict[str, Callable[[Scene, random.Random], Question]] = {
    "describe": ask_describe,
    "twin": ask_twin,
    "table": ask_table,
    "relative": ask_relative,
    "count": ask_count,
    "composed": ask_composed,
}


def ask(task: str, scene: Scene, held_out: Set[Couple], rng: random.Random) -> Question:
    """Return a question of a task for a scene, whose picture shows none of the couples in ``held_out``."""
    for _ in range(TRIES):
        text, cells, thoughts = TASKS[task](scene, rng)
        if not couples_in((cells or {}).values()) & held_out:
            return text, cells, thoughts
    raise too_many_held_out(f"a question of {task!r} for {scene.content_id!r}")


def too_many_held_out(what: str) -> DataError:
    """Return the error of a builder that finds nothing to show in training."""
    return DataError(
        f"{what} must show nothing that is held out for the validation and test splits, but {TRIES} tries "
        "found none. Lower --val_contents or --test_contents."
    )


def make_pair(
    task: str, number: int, scene: Scene, size: int, rng: random.Random, held_out: Set[Couple] = frozenset()
) -> Pair:
    """Return a query of a task for a scene, and a new picture of the scene as its target.

    Args:
        task: One of ``TASKS``.
        number: Number of the pair in its task and split.
        scene: The scene to be found.
        size: Width and height of a picture in pixels.
        rng: Chooses words, places and pixels.
        held_out: Things that the picture of the query must not show together.
    """
    text, cells, thoughts = ask(task, scene, held_out, rng)
    answer = rewrite(scene, rng)
    query = Item(
        text=text,
        media=() if cells is None else (draw(cells, size, rng),),
        content_id=f"{task} {number}",
        instruction=INSTRUCTION,
        rewrite=answer,
        cot=f"{thoughts} {answer}",
    )
    target = Item(
        text="",
        media=(draw(in_a_row([scene.left, scene.right], rng), size, rng),),
        content_id=scene.content_id,
        rewrite=rewrite(scene, rng),
    )
    source = f"query: {drawn((cells or {}).values())}; target: {drawn([scene.left, scene.right])}"
    return Pair(f"{task}-{number:06d}", task, "pictures", query, target, source=source)


# -- captions to pre-train the tiny base model -------------------------------------------------------


def caption_pair(
    number: int, scenes: list[Scene], size: int, rng: random.Random, held_out: Set[Couple] = frozenset()
) -> Pair:
    """Return a picture with plain captions, one per line: which things are where, and how many.

    No two things in it are one of the couples in ``held_out``.
    """
    for _ in range(TRIES):
        cells, lines = _caption(rng.choice(scenes), rng)
        if not couples_in(cells.values()) & held_out:
            break
    else:
        raise too_many_held_out("a caption")
    item = Item("", (draw(cells, size, rng),), f"caption {number}")
    text = Item("\n".join(lines), (), f"caption {number}")
    return Pair(
        f"captions-{number:06d}", "captions", "captions", item, text, source=f"query: {drawn(cells.values())}"
    )


def _caption(scene: Scene, rng: random.Random) -> tuple[Cells, list[str]]:
    things = [scene.left, scene.right]
    kind = rng.random()
    if kind < 0.3:
        counts = dict(zip(things, rng.sample(range(1, 6), 2), strict=True))
        return in_groups(counts, rng), group_captions(counts)
    if kind > 0.65:
        things.insert(rng.randrange(3), another_thing(rng, *things))
    return in_a_row(things, rng), row_captions(things)


def row_captions(things: list[Thing]) -> list[str]:
    """Return the captions of a row. The place comes first, so that the model learns to look there."""
    names = ("left", "right") if len(things) == 2 else ("left", "middle", "right")
    pairs = list(itertools.pairwise(things))
    return [
        ", ".join(f"on the {name} {thing}" for name, thing in zip(names, things, strict=True)),
        ", ".join(f"{second} after {a(first)}" for first, second in reversed(pairs)),
        ", ".join(f"next to the {first.shape} {a(second)}" for first, second in pairs),
        ", ".join(f"the {thing.shape} is {thing.colour}" for thing in things),
    ]


def group_captions(counts: dict[Thing, int]) -> list[str]:
    """Return the captions of two groups, the larger group first."""
    (most, many), (least, few) = sorted(counts.items(), key=lambda kv: -kv[1])
    return [f"{many} times {most}, {few} times {least}", f"more of {most} than of {least}"]


# -- the corpus -----------------------------------------------------------------------------------------


def all_couples() -> list[tuple[Thing, Thing]]:
    """Return all couples of things of two shapes."""
    things = [Thing(colour, shape) for shape in SHAPES for colour in COLOURS]
    return [couple for couple in itertools.combinations(things, 2) if couple[0].shape != couple[1].shape]


def compositions(seed: int, val: int, test: int) -> dict[str, list[Scene]]:
    """Return the scenes of each split. Training targets show every thing, but no pairing of val or test.

    A scene and its mirror image belong to the same split, so a query must also get the order right.

    Raises:
        DataError: If a split is empty.
    """
    couples = all_couples()
    random.Random(f"scenes {seed}").shuffle(couples)
    scenes = [scene for first, second in couples for scene in (Scene(first, second), Scene(second, first))]
    splits = {"test": scenes[:test], "val": scenes[test : test + val], "train": scenes[test + val :]}
    if not all(splits.values()):
        raise DataError(
            f"--val_contents {val} and --test_contents {test} must be at least 1 each and leave scenes for "
            f"training; there are {len(scenes)} in all."
        )
    for split, held in splits.items():  # so that mirror images are not neighbours in a task
        random.Random(f"{split} {seed}").shuffle(held)
    return splits


def couples_of(scenes: Iterable[Scene]) -> frozenset[Couple]:
    """Return the couples of things that scenes consist of."""
    return frozenset(frozenset((scene.left, scene.right)) for scene in scenes)


def split_pairs(
    split: str,
    tasks: Sequence[str],
    scenes: list[Scene],
    per_task: int,
    size: int,
    seed: int,
    held_out: Set[Couple],
) -> Iterator[Pair]:
    """Yield ``per_task`` pairs of each task; the scenes take turns as targets."""
    for offset, task in enumerate(tasks):
        rng = random.Random(f"{split} {task} {seed}")
        for number in range(per_task):
            scene = scenes[(offset * per_task + number) % len(scenes)]
            yield make_pair(task, number, scene, size, rng, held_out)


def build(
    output: Path,
    seed: int = 0,
    size: int = 72,
    train_per_task: int = 4000,
    val_per_task: int = 36,
    test_per_task: int = 200,
    captions: int = 12000,
    val_contents: int = 216,
    test_contents: int = 600,
) -> None:
    """Draw the scenes corpus and write its shards.

    Args:
        output: Corpus folder to write.
        seed: Seed of all random choices.
        size: Width and height of a picture in pixels.
        train_per_task: Number of training pairs for each of the six tasks.
        val_per_task: Number of validation pairs for each of the six tasks.
        test_per_task: Number of test pairs for each of the six tasks.
        captions: Number of captioned pictures to pre-train the tiny base model.
        val_contents: Number of distinct scenes in the validation gallery; none is a training target.
        test_contents: Number of distinct scenes in the test gallery; none is a training target.
    """
    scenes = compositions(seed, val_contents, test_contents)
    held_out = couples_of([*scenes["val"], *scenes["test"]])
    rng = random.Random(f"captions {seed}")
    tasks = [*TASKS]
    splits = {
        "train": split_pairs("train", tasks, scenes["train"], train_per_task, size, seed, held_out),
        "val": split_pairs("val", tasks, scenes["val"], val_per_task, size, seed, frozenset()),
        "test": split_pairs("test", tasks, scenes["test"], test_per_task, size, seed, frozenset()),
        "captions": (caption_pair(n, scenes["train"], size, rng, held_out) for n in range(captions)),
    }
    totals = {
        "train": train_per_task * len(TASKS),
        "val": val_per_task * len(TASKS),
        "test": test_per_task * len(TASKS),
        "captions": captions,
    }
    licence = "Apache-2.0 (drawn by this builder)"
    write_corpus(output, name="scenes", licence=licence, splits=splits, totals=totals, seed=seed)
