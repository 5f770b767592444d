"""The drawn scenes: each question has the one answer that its target shows, worked out here independently."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.builders.scenes.drawing import COLOURS, SHAPES, Cells, Scene, Thing
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError


def from_left(cells: Cells) -> list[Thing]:
    return [thing for _, thing in sorted(cells.items(), key=lambda cell: cell[0][1])]


def solve_relative(text: str, cells: Cells) -> Scene:
    row = from_left(cells)
    mark = re.findall(r"the (\w+)", text)[0]
    place = [thing.shape for thing in row].index(mark)
    near, far = (row[1], row[2]) if place == 0 else (row[1], row[0])
    return Scene(near, far) if text.startswith("left: next to") else Scene(far, near)


def solve_count(text: str, cells: Cells) -> Scene:
    (most, _), (least, _) = Counter(cells.values()).most_common()
    return Scene(most, least)


def solve_table(text: str, cells: Cells) -> Scene:
    table = {key: Thing(*words.split()) for key, words in re.findall(r"(\w+): (\w+ \w+)", text)}
    left, right = from_left(cells)
    return Scene(table[left.shape], table[right.shape])


def solve_composed(text: str, cells: Cells) -> Scene:
    left, right = from_left(cells)
    for step in text.split(", then "):
        if step == "swap the sides":
            left, right = right, left
        elif step == "swap the colours":
            left, right = Thing(right.colour, left.shape), Thing(left.colour, right.shape)
        else:
            side, value = step.split()[2], step.split()[-1]
            thing = left if side == "left" else right
            new = Thing(value, thing.shape) if step.startswith("paint") else Thing(thing.colour, value)
            left, right = (new, right) if side == "left" else (left, new)
    return Scene(left, right)


SOLVERS: dict[str, Callable[[str, Cells], Scene]] = {
    "relative": solve_relative,
    "count": solve_count,
    "table": solve_table,
    "composed": solve_composed,
}


@pytest.fixture(scope="module")
def contents() -> dict[str, list[Scene]]:
    return scenes.compositions(seed=0, val=60, test=600)


@pytest.mark.parametrize("task", SOLVERS)
def test_question_has_the_answer_of_its_target(task: str, contents: dict[str, list[Scene]]) -> None:
    rng = random.Random(3)
    for scene in contents["test"][:300]:
        text, cells, thoughts = scenes.TASKS[task](scene, rng)
        assert cells is not None
        assert SOLVERS[task](text, cells) == scene, (text, cells)
        assert str(scene.left) not in text or task == "table"
        assert thoughts.endswith(".")


@pytest.mark.parametrize("task", ["relative", "table", "composed", "twin"])
def test_reading_the_picture_alone_answers_only_the_simple_task(
    task: str, contents: dict[str, list[Scene]]
) -> None:
    rng = random.Random(4)
    right = 0
    for scene in contents["test"]:
        _, cells, _ = scenes.TASKS[task](scene, rng)
        assert cells is not None
        row = from_left(cells)
        right += Scene(row[0], row[-1]) == scene
    share = right / len(contents["test"])
    assert share == 1 if task == "twin" else share < 0.35


def test_splits_share_no_content_and_know_every_thing(contents: dict[str, list[Scene]]) -> None:
    sets = {split: {scene.content_id for scene in held} for split, held in contents.items()}
    assert len(sets["test"]) == 600
    assert not sets["test"] & sets["train"] and not sets["val"] & sets["train"] | sets["val"] & sets["test"]
    seen = {thing for scene in contents["train"] for thing in (scene.left, scene.right)}
    assert len(seen) == 64
    for held in contents.values():  # with each scene its mirror image: the order is asked for, too
        assert {Scene(scene.right, scene.left) for scene in held} == set(held)


def test_no_training_picture_shows_what_is_held_out(tmp_path: Path) -> None:
    """Parsed from what samples say of their pictures, and from their captions and rewrites."""
    scenes.build(tmp_path, train_per_task=150, val_per_task=40, test_per_task=100, captions=600)
    thing = re.compile(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})")

    def couples(text: str) -> set[frozenset[str]]:
        found = thing.findall(text.lower())
        return {frozenset((one, other)) for one in found for other in found if one != other}

    pairs = {
        split: [reader.read(n) for n in range(len(reader))]
        for split in ("train", "val", "test", "captions")
        for reader in [ShardReader(read_split(tmp_path, split))]
    }
    held = {c for split in ("val", "test") for pair in pairs[split] for c in couples(pair.target.content_id)}
    shown = Counter[str]()
    for pair in [*pairs["train"], *pairs["captions"]]:
        asked, _, found = pair.source.partition("; target: ")
        captions = pair.target.text.split("\n") if pair.dataset == "captions" else []
        for text in (asked, found, pair.target.rewrite or "", *captions):
            assert not couples(text) & held, (pair.key, text)
            shown[pair.dataset] += len(couples(text))
        assert couples(found) == couples(pair.target.rewrite or "")
    assert set(shown) == {*scenes.TASKS, "captions"} and min(shown.values()) >= 150
    # the test may ask of anything, so these pictures show that the words are parsed and could have failed
    asked = [couples(pair.source.partition(";")[0]) for pair in pairs["test"]]
    assert sum(bool(found & held) for found in asked) > 100


def test_splits_that_leave_nothing_to_show_are_refused(tmp_path: Path) -> None:
    for val, test in ((0, 600), (216, 0), (1000, 2600)):
        with pytest.raises(DataError, match="leave scenes for training"):
            scenes.build(tmp_path / "scenes", val_contents=val, test_contents=test)
    with pytest.raises(DataError, match="Lower --val_contents"):
        scenes.build(tmp_path / "scenes", val_contents=1, test_contents=3580)


def test_captions_are_no_rewrites(contents: dict[str, list[Scene]]) -> None:
    rng = random.Random(5)
    wordings = {scenes.rewrite(scene, rng) for scene in contents["train"] for _ in range(4)}
    for number in range(300):
        captions = scenes.caption_pair(number, contents["train"], 24, rng).target.text.split("\n")
        assert not wordings & set(captions)


def test_the_same_seed_draws_the_same_pair(contents: dict[str, list[Scene]]) -> None:
    scene = contents["train"][0]
    first, again = (scenes.make_pair("composed", 0, scene, 48, random.Random(7)) for _ in range(2))
    other = scenes.make_pair("composed", 0, scene, 48, random.Random(8))
    assert first.query and again.query and other.query
    assert first.query.text == again.query.text
    assert first.query.media[0].tobytes() == again.query.media[0].tobytes()
    assert first.query.media[0].tobytes() != other.query.media[0].tobytes()
