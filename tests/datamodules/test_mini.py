"""The mini corpus: each question has one answer, no training medium shows what is held out, order decides."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rime_pl.datamodules.builders.mini import builder as mini
from rime_pl.datamodules.builders.mini import moving, tables
from rime_pl.datamodules.builders.mini.moving import Move
from rime_pl.datamodules.builders.mini.tables import Entry, Sheet
from rime_pl.datamodules.builders.scenes.drawing import COLOURS, SHAPES, Scene, Thing
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError
from rime_pl.types import Clip, Page, Pair

THING = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    numbers = {"train_per_task": 120, "val_per_task": 16, "test_per_task": 40, "captions": 360}
    mini.build(folder, **numbers)
    return folder


@pytest.fixture(scope="module")
def pairs(corpus: Path) -> dict[str, list[Pair]]:
    readers = {
        split: ShardReader(read_split(corpus, split)) for split in ("train", "val", "test", "captions")
    }
    return {split: [reader.read(n) for n in range(len(reader))] for split, reader in readers.items()}


def things(text: str) -> set[str]:
    return set(re.findall(THING, text.lower()))


def entries(text: str) -> set[str]:
    """Table entries in any of the wordings: 'figs 3', 'figs at 3', 'the price of figs is 3'."""
    names = "|".join(tables.NAMES)
    text = text.lower()
    found = re.findall(rf"({names})(?: at| is| cost)? (\d)", text) or [
        (name, number) for number, name in re.findall(rf"(\d) is the price of ({names})", text)
    ]
    return {f"{name} {number}" for name, number in found}


def descriptions(pair: Pair) -> list[str]:
    """What each medium of a pair shows, as the texts of the pair and its source tell."""
    asked, _, found = pair.source.removeprefix("query: ").partition("; target: ")
    rewrite = pair.target.rewrite or ""
    return [asked, found, rewrite, *(pair.target.text.split("\n") if pair.dataset == "captions" else ())]


# -- questions and answers ------------------------------------------------------------------------------


def solve_motion(text: str, before: Move) -> Move:
    if text == "once more":
        return before
    assert text == "played backwards"
    direction = {"rightwards": "leftwards", "upwards": "downwards"}
    direction |= {back: forth for forth, back in direction.items()}
    return Move(before.mover, direction[before.direction], before.still)


def test_the_change_of_a_movement_leads_to_the_answer() -> None:
    rng = random.Random(0)
    texts = Counter[str]()
    for move in mini.contents(0, 18, 63)["test"].moves[:300]:
        text, before, thoughts = moving.ask_motion(move, rng)
        assert solve_motion(text, before) == move
        assert thoughts.startswith(f"{before.mover} moves {before.direction}, {before.still} stays;")
        texts[text] += 1
    assert len(texts) == 2 and min(texts.values()) > 100


def test_the_end_of_a_movement_is_the_scene() -> None:
    rng = random.Random(1)
    for scene in mini.contents(0, 18, 63)["test"].scenes:
        _, move, _ = moving.ask_finish(scene, rng)
        ends = {"rightwards": Scene(move.still, move.mover), "leftwards": Scene(move.mover, move.still)}
        assert ends[move.direction] == scene


def solve_sum(text: str) -> Sheet:
    if found := re.fullmatch(r"(\w+) for (\d), with (\w+) (\d+) in all", text):
        one, number, other, total = found.groups()
        return tables.sheet(Entry(one, int(number)), Entry(other, int(total) - int(number)))
    found = re.fullmatch(r"(\w+) for (\d), (\w+) for (?:the same|(\d) (more|less))", text)
    assert found, text
    one, number, other, more, sign = found.groups()
    change = int(more or 0) * (-1 if sign == "less" else 1)
    return tables.sheet(Entry(one, int(number)), Entry(other, int(number) + change))


def solve_update(text: str, before: Sheet) -> Sheet:
    first, second = before.first, before.second
    if text == "swap the two prices":
        return Sheet(Entry(first.name, second.number), Entry(second.name, first.number))
    found = re.fullmatch(r"(\w+) cost (\d) (more|less)", text)
    assert found, text
    more = int(found[2]) * (1 if found[3] == "more" else -1)
    changed = [Entry(e.name, e.number + more) if e.name == found[1] else e for e in (first, second)]
    return Sheet(*changed)


def test_questions_about_pages_have_their_answer() -> None:
    rng = random.Random(2)
    for found in mini.contents(0, 18, 63)["test"].sheets * 4:
        text, _ = tables.ask_sum(found, rng)
        assert solve_sum(text) == found
        changed, before, _ = tables.ask_update(found, rng)
        assert solve_update(changed, before) == found
        assert {1 <= entry.number <= tables.LARGEST for entry in (before.first, before.second)} == {True}


# -- what is shown ----------------------------------------------------------------------------------------


def middle(frame: np.ndarray, colour: tuple[int, ...]) -> tuple[float, float]:
    """The (row, column) in the middle of the pixels of a colour."""
    rows, columns = np.nonzero((frame == np.array(colour)).all(-1))
    return float(rows.mean()), float(columns.mean())


@pytest.mark.parametrize("direction", moving.DIRECTIONS)
def test_a_clip_shows_one_thing_moving_in_its_direction(direction: str) -> None:
    mover, still = Thing("red", "circle"), Thing("blue", "square")
    way = dict(zip(moving.DIRECTIONS, ((0, 1), (1, 0), (0, -1), (-1, 0)), strict=True))[direction]
    for seed in range(20):
        clip = moving.film(Move(mover, direction, still), 72, random.Random(seed))
        frames = [np.asarray(frame) for frame in clip.frames]
        moved = [middle(frame, COLOURS["red"]) for frame in frames]
        steps = np.diff(np.array(moved), axis=0)
        assert (steps @ np.array(way) > 10).all()  # pixels, of 72
        assert np.abs(steps @ np.array(way[::-1])).max() < 1
        rest = np.array([middle(frame, COLOURS["blue"]) for frame in frames])
        assert np.abs(rest - rest[0]).max() == 0


def test_in_the_task_finish_the_mover_passes_the_other_thing() -> None:
    mover, still = Thing("red", "circle"), Thing("blue", "square")
    for seed in range(20):
        clip = moving.film(Move(mover, "rightwards", still), 72, random.Random(seed), lane=1)
        first, last = (np.asarray(clip.frames[number]) for number in (0, -1))
        column = middle(first, COLOURS["blue"])[1]
        assert middle(first, COLOURS["red"])[1] < column - 8 < column + 8 < middle(last, COLOURS["red"])[1]


def test_a_page_shows_its_numbers_in_any_order() -> None:
    rng, seen = random.Random(0), set()
    for number in (1, 7):
        for _ in range(8):
            page = tables.draw_page(Sheet(Entry("eggs", number), Entry("nuts", 3)), 72, rng)
            assert isinstance(page, Page) and page.image.mode == "L" and page.image.size == (72, 72)
            seen.add(page.image.tobytes())
    assert len(seen) == 16


# -- the corpus -------------------------------------------------------------------------------------------


def combined(found: set[str]) -> set[frozenset[str]]:
    return {frozenset((one, other)) for one in found for other in found if one < other}


@pytest.mark.parametrize("words", [things, entries])
def test_no_training_medium_shows_what_is_held_out(
    pairs: dict[str, list[Pair]], words: Callable[[str], set[str]]
) -> None:
    """Parsed from descriptions: a rule of the builder that was wrong would be wrong here, too."""
    held = {
        couple
        for split in ("val", "test")
        for pair in pairs[split]
        for couple in combined(words(pair.target.content_id))
    }
    assert len(held) > 50
    shown = Counter[str]()
    for split in ("train", "captions"):
        for pair in pairs[split]:
            for text in descriptions(pair):
                couples = combined(words(text))
                assert not couples & held, (pair.key, text)
                shown[split] += len(couples)
    assert min(shown["train"], shown["captions"]) > 150, "the descriptions were parsed"


def test_descriptions_are_parsed() -> None:
    assert things("A red ring, then an orange star.") == {"red ring", "orange star"}
    for text in ("figs at 3 and nuts at 4", "Figs cost 3, nuts cost 4.", "figs 3, nuts 4"):
        assert entries(text) == {"figs 3", "nuts 4"}, text
    assert entries("the price of figs is 3") == {"figs 3"}
    assert entries("3 is the price of figs, 4 is the price of nuts") == {"figs 3", "nuts 4"}


def test_what_is_told_of_a_sample_is_what_its_texts_say(pairs: dict[str, list[Pair]]) -> None:
    for pair in [*pairs["train"], *pairs["test"]]:
        _, _, found = pair.source.partition("; target: ")
        for words in (things, entries):
            assert words(found) == words(pair.target.content_id)
            assert words(pair.target.rewrite or "") == words(found), pair.key
            assert pair.query and words(pair.query.rewrite or "") == words(found)


@pytest.fixture(scope="module")
def asked() -> list[Pair]:
    """The test split in its full size, with small pictures."""
    return [*mini.split_pairs("test", mini.contents(0, 63, 243)["test"], 160, 24, 0, mini.Held())]


def test_shortcuts_find_little(asked: list[Pair]) -> None:
    """Whoever reads everything but what the task is about may guess among those that are left."""
    galleries: dict[str, set[str]] = {gallery: set() for gallery in ("pictures", "clips", "pages")}
    for pair in asked:
        galleries[pair.gallery].add(pair.target.content_id)

    def guessed(task: str, key: Callable[[str], object]) -> float:
        contents = [pair.target.content_id for pair in asked if pair.dataset == task]
        left = Counter(
            key(content) for content in galleries[next(p for p in asked if p.dataset == task).gallery]
        )
        return float(np.mean([1 / left[key(content)] for content in contents]))

    for task in ("composed", "finish"):  # the things, not their order
        assert guessed(task, lambda content: frozenset(things(content))) == 0.5
    assert guessed("motion", lambda content: frozenset(things(content))) == 1 / 8
    for task in ("sum", "update"):
        assert guessed(task, lambda content: re.sub(r"\d", "", content)) < 0.12  # the names, no number
        for kept in (0, 1):  # and the number of one of them
            one = guessed(
                task, lambda content, kept=kept: (re.sub(r"\d", "", content), content.split("|")[kept])
            )
            assert one < 0.36


def test_each_change_changes_something(asked: list[Pair]) -> None:
    for pair in asked:
        if pair.dataset in ("composed", "update"):
            before, _, found = pair.source.removeprefix("query: ").partition("; target: ")
            assert before != found or "swap the sides" in (pair.query.text if pair.query else "")


def test_controls_ask_the_same_of_other_frames(pairs: dict[str, list[Pair]]) -> None:
    by_key = {pair.key.partition("/")[2]: pair for pair in pairs["test"]}
    tasks = Counter(pair.dataset for pair in pairs["test"])
    assert set(tasks) == {*mini.TASKS, *(f"{t}_{c}" for t in mini.CLIP_TASKS for c in mini.CONTROLS)}
    assert len(set(tasks.values())) == 1

    def frames(pair: Pair) -> list[bytes]:
        assert pair.query and isinstance(pair.query.media[0], Clip)
        return [frame.tobytes() for frame in pair.query.media[0].frames]

    for key, pair in by_key.items():
        task, _, control = pair.dataset.partition("_")
        if not control:
            continue
        own = by_key[key.removeprefix(f"{pair.dataset}-")]
        assert own.dataset == task and pair.query and own.query
        assert pair.query.text == own.query.text
        assert pair.target.content_id == own.target.content_id
        if control == "shuffled":
            assert frames(pair) != frames(own) and Counter(frames(pair)) == Counter(frames(own))
        else:
            assert len(set(frames(pair))) == 1 and frames(pair)[0] in frames(own)
            assert len(frames(pair)) == len(frames(own))


def test_modalities_are_kept(pairs: dict[str, list[Pair]]) -> None:
    kinds = {"picture": "Image", "clip": "Clip", "page": "Page"}

    def kind(media: Sequence[object]) -> str:
        if not media:
            return "text"
        name = type(media[0]).__name__
        return next((kind for kind, of in kinds.items() if of == name), "picture")

    for pair in pairs["train"]:
        assert pair.query
        assert (kind(pair.query.media), kind(pair.target.media)) == mini.TASKS[pair.dataset]


@pytest.mark.parametrize(("val", "test"), [(0, 10), (10, 0), (1000, 800)])
def test_splits_that_leave_nothing_are_refused(tmp_path: Path, val: int, test: int) -> None:
    with pytest.raises(DataError, match=r"--val_contents .* must be at least 1 each"):
        mini.build(tmp_path / "mini", val_contents=val, test_contents=test)


def test_the_same_seed_draws_the_same_corpus(tmp_path: Path) -> None:
    numbers = {"train_per_task": 4, "val_per_task": 2, "test_per_task": 8, "captions": 6}
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        mini.build(tmp_path / name, seed=seed, **numbers)
        hashes.append((tmp_path / name / "corpus.json").read_text())
    assert hashes[0] == hashes[1] != hashes[2]
