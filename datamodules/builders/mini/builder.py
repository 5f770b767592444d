"""Builds the mini corpus: pictures, clips and pages in one, most of them found by working out an answer.

Pictures are those of `scenes`. A clip shows two things, of which one moves; a page shows two numbers in a
table. Called by `rime shards mini`.

Everything follows from the seed. Each split has its own contents. No picture, clip or page of training, of a
query, a target or a caption, shows two things together, or two table entries, that are held out for the
validation or test split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.mini import moving, tables
from rime_pl.datamodules.builders.mini.moving import Move
from rime_pl.datamodules.builders.mini.tables import Sheet
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.builders.scenes.drawing import Couple, Scene, draw, drawn, in_a_row
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import DataError
from rime_pl.types import Clip, Item, Medium, Pair

#: Tasks that are asked of pictures, as in `scenes`.
PICTURE_TASKS = ("composed",)
#: All tasks, by what is asked and what is found.
TASKS = {
    "composed": ("picture", "picture"),
    "motion": ("clip", "clip"),
    "finish": ("clip", "picture"),
    "sum": ("text", "page"),
    "update": ("page", "page"),
}
#: Controls of the test split: how each changes the clip of a query.
CONTROLS: dict[str, Callable[[Clip, random.Random], Clip]] = {
    "shuffled": moving.in_another_order,
    "one_frame": moving.one_frame,
}
CLIP_TASKS = ("motion", "finish")


@dataclass(frozen=True)
class Contents:
    """What the targets of a split show."""

    scenes: list[Scene]
    moves: list[Move]
    sheets: list[Sheet]

    def of(self, kind: str) -> Sequence[Scene | Move | Sheet]:
        """Return what targets of a kind show: picture, clip or page."""
        of_kind: dict[str, Sequence[Scene | Move | Sheet]]
        of_kind = {"picture": self.scenes, "clip": self.moves, "page": self.sheets}
        return of_kind[kind]


def contents(seed: int, val: int, test: int) -> dict[str, Contents]:
    """Return the contents of each split.

    Args:
        seed: Seed of the choice.
        val: Number of couples of things, and of pages, that are held out for validation.
        test: Number of those that are held out for the test.

    Raises:
        DataError: If training keeps nothing.
    """
    couples, blocks = scenes.all_couples(), tables.blocks()
    most = min(len(couples), sum(map(len, blocks)))
    if val < 1 or test < 1 or val + test >= most:
        raise DataError(
            f"--val_contents {val} and --test_contents {test} must be at least 1 each and leave some of the "
            f"{most} contents for training."
        )
    rng = random.Random(f"mini {seed}")
    rng.shuffle(couples)
    rng.shuffle(blocks)
    # couple by couple and block by block: what is most alike is in the gallery together
    sheets = [sheet for block in blocks for sheet in block]
    parts = {"test": slice(test), "val": slice(test, test + val), "train": slice(test + val, None)}
    found = {}
    for split, part in parts.items():
        mirrored = [scene for one, two in couples[part] for scene in (Scene(one, two), Scene(two, one))]
        moves = [move for one, two in couples[part] for move in moving.moves_of(one, two)]
        found[split] = Contents(mirrored, moves, sheets[part])
    for contents_of_training in (found["train"].scenes, found["train"].moves, found["train"].sheets):
        rng.shuffle(contents_of_training)
    return found


# -- pairs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What no query of training may show: couples of things, and pages."""

    couples: Set[Couple] = frozenset()
    sheets: Set[Sheet] = frozenset()


@dataclass(frozen=True)
class Half:
    """One side of a pair before it is an item."""

    medium: Medium | None
    shown: str  # for the source of the sample
    text: str = ""
    content_id: str = ""
    instruction: str = ""


def motion(move: Move, size: int, rng: random.Random, held: Held) -> tuple[Half, Half, str]:
    """Show a clip and name a change; the clip after the change is to be found."""
    text, before, thoughts = moving.ask_motion(move, rng)
    shown = drawn((move.mover, move.still))
    query = Half(moving.film(before, size, rng), shown, text, instruction="Find the clip.")
    return query, Half(moving.film(move, size, rng), shown, content_id=move.content_id), thoughts


def finish(scene: Scene, size: int, rng: random.Random, held: Held) -> tuple[Half, Half, str]:
    """Show a clip; the picture of its end is to be found."""
    text, move, thoughts = moving.ask_finish(scene, rng)
    shown = drawn((scene.left, scene.right))
    query = Half(moving.film(move, size, rng, lane=1), shown, text, instruction=scenes.INSTRUCTION)
    picture = draw(in_a_row([scene.left, scene.right], rng), size, rng)
    return query, Half(picture, shown, content_id=scene.content_id), thoughts


def total(sheet: Sheet, size: int, rng: random.Random, held: Held) -> tuple[Half, Half, str]:
    """Ask for a page in words that name one number and the sum or the difference."""
    text, thoughts = tables.ask_sum(sheet, rng)
    page = Half(tables.draw_page(sheet, size, rng), str(sheet), content_id=sheet.content_id)
    return Half(None, drawn(()), text, instruction="Find the page."), page, thoughts


def update(sheet: Sheet, size: int, rng: random.Random, held: Held) -> tuple[Half, Half, str]:
    """Show a page and name a change; the page after the change is to be found."""
    for _ in range(scenes.TRIES):
        text, before, thoughts = tables.ask_update(sheet, rng)
        if before not in held.sheets:
            break
    else:
        raise scenes.too_many_held_out(f"a page before {sheet.content_id!r}")
    query = Half(tables.draw_page(before, size, rng), str(before), text, instruction="Find the page.")
    return query, Half(tables.draw_page(sheet, size, rng), str(sheet), content_id=sheet.content_id), thoughts


Ask = Callable[[Any, int, random.Random, Held], tuple[Half, Half, str]]
Reword = Callable[[Any, random.Random], str]
#: Tasks that `scenes` lacks: what is asked, and how the answer is worded.
ASKED: dict[str, tuple[Ask, Reword]] = {
    "motion": (motion, moving.rewrite),
    "finish": (finish, scenes.rewrite),
    "sum": (total, tables.rewrite),
    "update": (update, tables.rewrite),
}


def make_pair(task: str, number: int, answer: Any, size: int, rng: random.Random, held: Held) -> Pair:
    """Return a pair of a task whose target shows ``answer``: a Scene, a Move or a Sheet."""
    if task in PICTURE_TASKS:
        return scenes.make_pair(task, number, answer, size, rng, held.couples)
    ask, reword = ASKED[task]
    asked, found, thoughts = ask(answer, size, rng, held)
    wording = reword(answer, rng)
    query = Item(
        asked.text,
        () if asked.medium is None else (asked.medium,),
        f"{task} {number}",
        asked.instruction,
        rewrite=wording,
        cot=f"{thoughts} {wording}",
    )
    assert found.medium is not None, "each target shows its answer"
    target = Item("", (found.medium,), found.content_id, rewrite=reword(answer, rng))
    gallery = f"{TASKS[task][1]}s"
    source = f"query: {asked.shown}; target: {found.shown}"
    return Pair(f"{task}-{number:06d}", task, gallery, query, target, source=source)


def split_pairs(
    split: str, contents: Contents, per_task: int, size: int, seed: int, held: Held
) -> Iterator[Pair]:
    """Yield ``per_task`` pairs of each task; the contents take turns as targets."""
    for offset, (task, (_, found)) in enumerate(TASKS.items()):
        rng = random.Random(f"{split} {task} {seed}")
        answers = contents.of(found)
        for number in range(per_task):
            answer = answers[(offset * per_task + number) % len(answers)]
            yield make_pair(task, number, answer, size, rng, held)


def control_pairs(pairs: Iterable[Pair], seed: int) -> Iterator[Pair]:
    """Yield the pairs again whose query has a clip, once for each control, as tasks of their own."""
    kept = [pair for pair in pairs if pair.dataset in CLIP_TASKS]
    for name, change in CONTROLS.items():
        rng = random.Random(f"{name} {seed}")
        for pair in kept:
            assert pair.query is not None, "only a gallery item has no query"
            (clip,) = (medium for medium in pair.query.media if isinstance(medium, Clip))
            task = f"{pair.dataset}_{name}"
            query = replace(pair.query, media=(change(clip, rng),), content_id=f"{task} of {pair.key}")
            yield replace(pair, key=f"{task}-{pair.key}", dataset=task, query=query)


# -- captions to pre-train the tiny base model -------------------------------------------------------


def caption_pair(number: int, contents: Contents, size: int, rng: random.Random, held: Held) -> Pair:
    """Return a picture, a clip or a page, in turn, with plain captions, one per line."""
    if number % 3 == 0:
        return scenes.caption_pair(number, contents.scenes, size, rng, held.couples)
    medium: Medium
    if number % 3 == 1:
        move = rng.choice(contents.moves)
        medium, lines = moving.film(move, size, rng), moving.captions(move)
        shown = drawn((move.mover, move.still))
    else:
        sheet = rng.choice(contents.sheets)
        medium, lines, shown = tables.draw_page(sheet, size, rng), tables.captions(sheet, rng), str(sheet)
    item = Item("", (medium,), f"caption {number}")
    text = Item("\n".join(lines), (), f"caption {number}")
    return Pair(f"captions-{number:06d}", "captions", "captions", item, text, source=f"query: {shown}")


# -- the corpus -----------------------------------------------------------------------------------------


def build(
    output: Path,
    seed: int = 0,
    size: int = 72,
    train_per_task: int = 4000,
    val_per_task: int = 32,
    test_per_task: int = 160,
    captions: int = 12000,
    val_contents: int = 63,
    test_contents: int = 243,
) -> None:
    """Draw the mini corpus, with pictures, clips and pages, and write its shards.

    Args:
        output: Corpus folder to write.
        seed: Seed of all random choices.
        size: Width and height of a picture, frame or page in pixels.
        train_per_task: Number of training pairs for each of the five tasks.
        val_per_task: Number of validation pairs for each of the five tasks.
        test_per_task: Number of test pairs for each of the five tasks.
        captions: Number of captioned pictures, clips and pages to pre-train the tiny base model.
        val_contents: Number of couples of things, and of pages, that are held out for validation.
        test_contents: Number of couples of things, and of pages, that are held out for the test.
    """
    of = contents(seed, val_contents, test_contents)
    held = Held(
        scenes.couples_of([*of["val"].scenes, *of["test"].scenes]),
        frozenset([*of["val"].sheets, *of["test"].sheets]),
    )
    rng = random.Random(f"captions {seed}")
    test = [*split_pairs("test", of["test"], test_per_task, size, seed, Held())]
    splits: dict[str, Iterable[Pair]] = {
        "train": split_pairs("train", of["train"], train_per_task, size, seed, held),
        "val": split_pairs("val", of["val"], val_per_task, size, seed, Held()),
        "test": [*test, *control_pairs(test, seed)],
        "captions": (caption_pair(n, of["train"], size, rng, held) for n in range(captions)),
    }
    totals = {
        "train": train_per_task * len(TASKS),
        "val": val_per_task * len(TASKS),
        "test": test_per_task * (len(TASKS) + len(CLIP_TASKS) * len(CONTROLS)),
        "captions": captions,
    }
    licence = "Apache-2.0 (drawn by this builder)"
    write_corpus(output, name="mini", licence=licence, splits=splits, totals=totals, seed=seed)
