"""The openmoji corpus: held-out combinations, names, independent wordings. A small one is built once."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rime_pl.datamodules.builders.openmoji import builder as openmoji
from rime_pl.datamodules.builders.openmoji import pictures as openmoji_pictures
from rime_pl.datamodules.builders.openmoji import words
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.types import Pair

THINGS = {"word_to_picture": "things", "picture_to_word": "words"}  # task -> gallery
TASKS = {"name_to_picture", "picture_to_name", "composed", "multilingual", *THINGS}
SETTINGS = {"size": 24, "test_pictures": 8, "val_pictures": 5, "limit": 12}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openmoji")
    openmoji.build(folder, seed=0, **SETTINGS)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def splits(path: Path) -> dict[str, list[Pair]]:
    found = {}
    for split in ("train", "val", "test", "everyday", "distractors", "captions"):
        reader = ShardReader(read_split(path, split))
        found[split] = [reader.read(index) for index in range(len(reader))]
    return found


def contents(pairs: list[Pair]) -> set[str]:
    return {pair.target.content_id for pair in pairs}


def people(pairs: list[Pair]) -> list[Pair]:
    """The pairs whose answer is a person."""
    return [pair for pair in pairs if " " in pair.target.content_id]


def base_and_tone(content: str) -> tuple[str, str]:
    base, _, tone = content.partition(" ")
    return base, tone


def pixels(pair: Pair) -> dict[str, bytes]:
    """Content -> pixels of all pictures in a pair."""
    return {item.content_id: item.media[0].tobytes() for item in (pair.target,) if item.media}


def test_tasks_and_galleries(splits: dict[str, list[Pair]]) -> None:
    for split in ("train", "val", "test"):
        assert {pair.dataset for pair in splits[split]} == TASKS
    for pair in splits["train"] + splits["test"]:
        assert pair.query is not None
        names = "names" if pair.dataset == "picture_to_name" else "pictures"
        assert pair.gallery == THINGS.get(pair.dataset, names)
        assert bool(pair.target.media) == (pair.gallery in ("pictures", "things"))
        assert bool(pair.query.media) == (pair.dataset in ("picture_to_name", "picture_to_word", "composed"))
        if pair.dataset != "multilingual":
            assert (pair.dataset in THINGS) == (not people([pair]))
        assert pair.query.instruction and not pair.target.instruction


def test_combinations_are_held_out_but_their_parts_are_not(splits: dict[str, list[Pair]]) -> None:
    train, val, test = (contents(people(splits[split])) for split in ("train", "val", "test"))
    for split in ("val", "test"):  # tasks with held-out pictures hold no others
        assert people(splits[split]) == [pair for pair in splits[split] if pair.dataset not in THINGS]
    assert len(test) == 8 and len(val) == 5
    assert not train & val and not train & test and not val & test
    bases, tones = map(set, zip(*map(base_and_tone, train), strict=True))
    for content in val | test:
        base, tone = base_and_tone(content)
        assert base in bases and tone in tones
    assert len({base_and_tone(content)[1] for content in test}) == 5


def test_no_held_out_picture_is_seen_in_training(splits: dict[str, list[Pair]]) -> None:
    held_out = {
        data for split in ("val", "test") for pair in people(splits[split]) for data in pixels(pair).values()
    }
    for pair in splits["train"] + splits["captions"]:
        assert pair.query is not None
        for item in (pair.query, pair.target):
            assert not any(image.tobytes() in held_out for image in item.media)
    for pair in splits["val"] + splits["test"]:  # a change starts from a training picture
        if pair.dataset == "composed":
            assert pair.query is not None and pair.query.media[0].tobytes() not in held_out


def test_every_picture_is_one_content_and_the_test_gallery_holds_all(splits: dict[str, list[Pair]]) -> None:
    seen: dict[bytes, str] = {}
    for pairs in splits.values():
        for pair in pairs:
            for content, data in pixels(pair).items():
                assert seen.setdefault(data, content) == content
    gallery = contents(splits["test"]) | contents(splits["distractors"])
    assert gallery == set(seen.values())
    assert not contents(people(splits["test"])) & contents(splits["distractors"])
    assert all(pair.query is None and pair.target.rewrite for pair in splits["distractors"])


def test_rewrites_resolve_the_content_in_words_of_their_own(splits: dict[str, list[Pair]]) -> None:
    for pair in splits["train"] + splits["test"]:
        assert pair.query is not None and pair.query.rewrite and pair.target.rewrite
        assert pair.query.content_id == pair.target.content_id
        tone = base_and_tone(pair.target.content_id)[1]
        for rewrite in (pair.query.rewrite, pair.target.rewrite):
            assert rewrite.endswith(".") and len(rewrite.split()) <= 20
            assert not tone or tone in rewrite.lower()
        assert pair.query.rewrite != pair.target.rewrite
        assert pair.query.rewrite not in (pair.query.text, pair.target.text)


def test_composed_queries_ask_for_each_kind_of_change(splits: dict[str, list[Pair]]) -> None:
    texts = [pair.query.text for pair in splits["train"] if pair.dataset == "composed" and pair.query]
    kinds = Counter(
        "tone" if "skin" in text else "gender" if re.search(r"\b(man|woman|gender)\b", text) else "role"
        for text in texts
    )
    assert set(kinds) == {"tone", "gender", "role"}


def test_changing_the_source_as_asked_gives_the_target(splits: dict[str, list[Pair]]) -> None:
    by_pixels = {data: c for pairs in splits.values() for pair in pairs for c, data in pixels(pair).items()}
    for pair in splits["test"]:
        if pair.dataset != "composed" or pair.query is None:
            continue
        source = by_pixels[pair.query.media[0].tobytes()]
        (old_base, old_tone), (base, tone) = base_and_tone(source), base_and_tone(pair.target.content_id)
        old, new = words.person_concept(old_base), words.person_concept(base)
        if old_base == base:
            assert tone in pair.query.text and old_tone != tone
        elif old.role == new.role:
            assert (old.gender, old_tone) != (new.gender, tone) and old_tone == tone
            assert {"man": " man", "woman": " woman", "person": " any gender"}[new.gender] in pair.query.text
        else:
            assert (old.gender, old_tone) == (new.gender, tone) and words._spaced(new.role) in pair.query.text


def test_captions_use_other_sentences_than_rewrites(splits: dict[str, list[Pair]]) -> None:
    rewrites = {
        r for pairs in splits.values() for p in pairs for r in (p.target.rewrite, p.query and p.query.rewrite)
    }
    for pair in splits["captions"]:
        lines = pair.target.text.splitlines()
        assert len(lines) == len(set(lines)) >= 3
        assert not set(lines) & rewrites
        assert pair.target.rewrite is None


def training_texts(splits: dict[str, list[Pair]]) -> set[str]:
    """All texts that a stage or the base model learns from, one for each line, lower case."""
    items = [
        item for pair in splits["train"] + splits["captions"] for item in (pair.query, pair.target) if item
    ]
    lines = {
        line for item in items for text in (item.text, item.rewrite) for line in (text or "").splitlines()
    }
    return {line.lower() for line in lines}


def test_every_thing_is_shown_in_training(splits: dict[str, list[Pair]]) -> None:
    things = {content for content in contents(splits["captions"]) if not base_and_tone(content)[1]}
    assert len(things) == SETTINGS["limit"]
    for task in THINGS:
        shown = Counter(pair.target.content_id for pair in splits["train"] if pair.dataset == task)
        assert shown == dict.fromkeys(things, 2)


def test_everyday_queries_ask_for_known_things_in_unknown_words(splits: dict[str, list[Pair]]) -> None:
    known = training_texts(splits)
    asked = [pair for pair in splits["everyday"] if pair.query]
    assert {pair.target.content_id for pair in asked} <= contents(splits["train"])
    assert len(asked) == SETTINGS["limit"]
    for pair in asked:
        assert pair.query is not None and not base_and_tone(pair.target.content_id)[1]
        name = words.object_concept(pair.target.content_id.replace("_", " ")).head
        around = pair.query.text.lower().replace(name.lower(), "{}")
        assert around != pair.query.text.lower(), "the name is in the query"
        assert pair.query.text.lower() not in known
        assert not any(around.format(thing.lower()) in known for thing in ("pizza", name)), around


def test_the_everyday_gallery_holds_every_picture(splits: dict[str, list[Pair]]) -> None:
    everything = contents(splits["test"]) | contents(splits["distractors"])
    assert contents(splits["everyday"]) == everything
    assert {pair.gallery for pair in splits["everyday"]} == {"all pictures"}
    assert not any(pair.distractor for pair in splits["everyday"])
    assert all(pair.distractor for pair in splits["distractors"])


def test_further_names_belong_to_one_picture(splits: dict[str, list[Pair]]) -> None:
    pictures = openmoji_pictures.load_pictures(24)
    owners = Counter(n for p in pictures if not p.concept.tone for n in (p.concept.head, *p.concept.also))
    assert max(owners.values()) == 1 and any(picture.concept.also for picture in pictures)
    things = {picture.concept.head: picture.concept.also for picture in pictures if not picture.concept.tone}
    assert len(things) > 1000 and "car" in things["automobile"]
    assert not [name for name in things if name.startswith(("flag of", "family"))]


def test_same_seed_same_bytes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = openmoji_pictures.load_pictures(SETTINGS["size"], SETTINGS["limit"])
    monkeypatch.setattr(openmoji, "load_pictures", lambda *_: pictures)
    hashes = {}
    for seed in (0, 1):
        openmoji.build(tmp_path / str(seed), seed=seed, **SETTINGS)  # type: ignore[arg-type]
        hashes[seed] = read_corpus(tmp_path / str(seed))["data_hash"]
    assert hashes[0] == read_corpus(path)["data_hash"] != hashes[1]


def test_duplicates_are_merged_under_the_clearer_name() -> None:
    pictures = openmoji_pictures.load_pictures(24, limit=12)
    bases = {picture.concept.base for picture in pictures}
    assert "man_cook" in bases and "cook" not in bases  # OpenMoji draws both alike
    arrays = np.stack([np.asarray(picture.image, dtype=np.float32).ravel() for picture in pictures])
    for number, array in enumerate(arrays):
        assert (np.abs(arrays - array).sum(1) == 0).sum() == 1, pictures[number].content_id


@pytest.mark.parametrize(
    ("base", "tone", "name", "query", "target"),
    [
        (
            "woman_cook",
            "dark",
            "a woman cook with dark skin",
            "A woman cook, dark skin.",
            "Dark female: cook.",
        ),
        (
            "man_red_hair",
            "medium-light",
            "a man with medium-light skin and red hair",
            "A man with red hair, medium-light skin.",
            "Medium-light male: with red hair.",
        ),
        (
            "person_rowing_boat",
            "light",
            "a person with light skin, rowing a boat",
            "A person rowing a boat, light skin.",
            "Light any gender: rowing a boat.",
        ),
        (
            "ear",
            "medium",
            "an ear with medium skin",
            "An ear, medium skin.",
            "Medium ear.",
        ),
    ],
)
def test_wordings(base: str, tone: str, name: str, query: str, target: str) -> None:
    concept = words.person_concept(base).with_tone(tone)
    assert words.names(concept)[0] == name
    assert words.query_rewrites(concept)[0] == query
    assert words.target_rewrites(concept)[0] == target


def test_doctests() -> None:
    assert doctest.testmod(words).failed == 0
