"""Builds the openmoji corpus from OpenMoji pictures and their names in many languages.

Two questions, two kinds of picture. *People*: val and test hold out combinations of a base emoji ("woman
cook") and a skin tone. Training shows the base with other tones, and the tone on other bases, but not both
together. *Things* (animals, food, objects, vehicles, faces): training shows all of them, and the split
"everyday" asks for each in a wording that training never used. Called by ``rime shards openmoji``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rime_pl.datamodules.builders.openmoji import words
from rime_pl.datamodules.builders.openmoji.pictures import Picture, load_pictures
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.types import Item, Pair

_FIND_PICTURE = "Find the picture."
_FIND_NAME = "Find the name."
_CHANGE = "Apply the change."
_PICTURE = ""
_NAME = ""


def build(
    output: Path,
    seed: int = 0,
    size: int = 72,
    test_pictures: int = 100,
    val_pictures: int = 40,
    wordings: int = 3,
    thing_wordings: int = 2,
    limit: int | None = None,
) -> None:
    """Render the OpenMoji pictures, divide them into splits and write the shards.

    Args:
        output: Corpus folder to write.
        seed: Seed of the split and of all wordings.
        size: Width and height of a picture in pixels.
        test_pictures: Number of pictures held out for the test split.
        val_pictures: Number of pictures held out for the validation split.
        wordings: Number of training pairs for each picture of a person and task, each with its own wording
            or change.
        thing_wordings: Number of training pairs for each thing and task.
        limit: Number of people (each in every tone) and of things to use, for tests; all if not given.
    """
    deal = _deal(load_pictures(size, limit), seed, test_pictures, val_pictures)
    pairs = _Pairs(deal, seed, wordings, thing_wordings)
    splits = {
        "train": pairs.train(),
        "val": pairs.held_out("val", deal.val),
        "test": pairs.held_out("test", deal.test),
        "everyday": pairs.everyday(),
        "distractors": [*pairs.distractors()],
        "captions": [*pairs.captions()],
    }
    write_corpus(
        output,
        name="openmoji",
        licence="Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0. Names: Unicode CLDR.",
        splits=splits,
        totals={name: len(split) for name, split in splits.items()},
        seed=seed,
        arguments={
            "size": size,
            "test_pictures": test_pictures,
            "val_pictures": val_pictures,
            "wordings": wordings,
            "thing_wordings": thing_wordings,
            "limit": limit,
        },
    )


@dataclass
class _Deal:
    """The pictures of each split. No picture is in two of the first three lists."""

    train: list[Picture]  # one tone or yellow, not held out
    val: list[Picture]
    test: list[Picture]
    things: list[Picture]


def _deal(pictures: list[Picture], seed: int, num_test: int, num_val: int) -> _Deal:
    by_base: dict[str, dict[str, Picture]] = defaultdict(dict)
    things = []
    for picture in pictures:
        if picture.concept.tone:
            by_base[picture.concept.base][picture.concept.tone] = picture
        else:
            things.append(picture)
    bases = sorted(base for base, tones in by_base.items() if set(words.TONES) <= set(tones))
    random.Random(f"deal {seed}").shuffle(bases)
    # Test takes bases from the front and val from the back. Each takes at most one tone of a base, so that
    # three tones of each base or more stay in training. The five tones take turns.
    test = [by_base[base].pop(words.TONES[n % 5]) for n, base in enumerate(bases[:num_test])]
    first_val = max(0, len(bases) - num_val)
    val = [by_base[base].pop(words.TONES[(n + 2) % 5]) for n, base in enumerate(bases) if n >= first_val]
    train = [picture for tones in by_base.values() for picture in tones.values()]
    return _Deal(train, val, test, things)


class _Pairs:
    """Makes the samples of every split."""

    def __init__(self, deal: _Deal, seed: int, wordings: int, thing_wordings: int) -> None:
        self.deal = deal
        self.seed = seed
        self.wordings = wordings
        self.thing_wordings = thing_wordings
        self.sources = _Sources(deal.train)

    def train(self) -> list[Pair]:
        rng = random.Random(f"train {self.seed}")
        pairs: list[Pair] = []
        for picture in self.deal.train:
            for _ in range(self.wordings):
                pairs += _named(picture, rng)
                pairs += self._changed(picture, rng)
        for picture in self.deal.things:
            for _ in range(self.thing_wordings):
                pairs += _thing_named(picture, rng)
        rng.shuffle(pairs)
        return _numbered(pairs)

    def held_out(self, split: str, pictures: list[Picture]) -> list[Pair]:
        rng = random.Random(f"{split} {self.seed}")
        pairs: list[Pair] = []
        for picture in pictures:
            pairs += _named(picture, rng)
            pairs += self._changed(picture, rng)
        for picture in rng.sample(self.deal.things, min(len(pictures), len(self.deal.things))):
            # training has shown them, so they stay out of the tasks with held-out pictures
            pairs += (pair for pair in _thing_named(picture, rng) if pair.dataset != "multilingual")
        pairs.sort(key=lambda pair: pair.dataset)
        return _numbered(pairs)

    def everyday(self) -> list[Pair]:
        """Ask for each thing in a new wording; the gallery holds every picture of the corpus."""
        rng = random.Random(f"everyday {self.seed}")
        pairs = []
        for picture in [*self.deal.things, *self.deal.train, *self.deal.val, *self.deal.test]:
            query = None
            if not picture.concept.tone:
                text = rng.choice(words.everyday_queries(picture.concept))
                query = Item(text, (), picture.content_id, _FIND_PICTURE, _asked(picture, rng))
            pairs.append(Pair("", "everyday_words", "all pictures", query, _picture(picture, rng)))
        return _numbered(pairs)

    def distractors(self) -> Iterator[Pair]:
        """Yield every picture that is not a target of the test split."""
        rng = random.Random(f"distractors {self.seed}")
        pictures = [*self.deal.train, *self.deal.val, *self.deal.things]
        for number, picture in enumerate(pictures):
            yield Pair(f"distractors-{number:06d}", "distractors", "pictures", None, _picture(picture, rng))

    def captions(self) -> Iterator[Pair]:
        """Yield training pictures with captions: facts that a downloaded base model might know."""
        for number, picture in enumerate([*self.deal.train, *self.deal.things]):
            query = Item("", (picture.image,), picture.content_id)
            target = Item("\n".join(words.captions(picture.concept)), (), picture.content_id)
            yield Pair(f"captions-{number:06d}", "captions", "captions", query, target)

    def _changed(self, target: Picture, rng: random.Random) -> Iterator[Pair]:
        for text, source in self.sources.changes(target, rng):
            rewrite = rng.choice(words.query_rewrites(target.concept))
            query = Item(text, (source.image,), target.content_id, _CHANGE, rewrite)
            yield Pair("", "composed", "pictures", query, _picture(target, rng))


@dataclass
class _Sources:
    """The training pictures that a change can start from."""

    pictures: list[Picture]
    by_base: dict[str, list[Picture]] = field(init=False)
    by_role: dict[tuple[str, str, str], list[Picture]] = field(init=False)
    by_gender: dict[tuple[str, str], list[Picture]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_base, self.by_role, self.by_gender = defaultdict(list), defaultdict(list), defaultdict(list)
        for picture in self.pictures:
            concept = picture.concept
            self.by_base[concept.base].append(picture)
            if concept.role:
                self.by_role[concept.group, concept.role, concept.tone].append(picture)
            if concept.group in ("job", "fantasy") and concept.gender:
                self.by_gender[concept.gender, concept.tone].append(picture)

    def changes(self, target: Picture, rng: random.Random) -> Iterator[tuple[str, Picture]]:
        """Yield one request of each kind that leads to the target, with a picture to start from."""
        concept = target.concept
        if tones := _without(self.by_base[concept.base], target):
            yield words.tone_change(concept.tone, rng), rng.choice(tones)
        genders = self.by_role.get((concept.group, concept.role, concept.tone), [])
        if genders := _without(genders, target):
            yield words.gender_change(concept, rng), rng.choice(genders)
        if concept.group not in ("job", "fantasy") or concept.role in ("", "Claus", "royal"):
            return
        roles = _without(self.by_gender.get((concept.gender, concept.tone), []), target)
        if roles := [picture for picture in roles if picture.concept.role != concept.role]:
            yield words.role_change(concept, rng), rng.choice(roles)


def _without(pictures: list[Picture], target: Picture) -> list[Picture]:
    return [picture for picture in pictures if picture.content_id != target.content_id]


def _picture(picture: Picture, rng: random.Random) -> Item:
    rewrite = rng.choice(words.target_rewrites(picture.concept))
    return Item("", (picture.image,), picture.content_id, _PICTURE, rewrite)


def _named(picture: Picture, rng: random.Random) -> Iterator[Pair]:
    """Yield name to picture, picture to name and, if there is a translation, another language to picture."""
    concept, content = picture.concept, picture.content_id
    asked = Item(rng.choice(words.names(concept)), (), content, _FIND_PICTURE, _asked(picture, rng))
    yield Pair("", "name_to_picture", "pictures", asked, _picture(picture, rng))
    shown = Item("", (picture.image,), content, _FIND_NAME, _asked(picture, rng))
    name = Item(
        rng.choice(words.names(concept)), (), content, _NAME, rng.choice(words.target_rewrites(concept))
    )
    yield Pair("", "picture_to_name", "names", shown, name)
    if picture.translations:
        language = rng.choice(sorted(picture.translations))
        foreign = Item(picture.translations[language], (), content, _FIND_PICTURE, _asked(picture, rng))
        yield Pair("", "multilingual", "pictures", foreign, _picture(picture, rng))


def _thing_named(picture: Picture, rng: random.Random) -> Iterator[Pair]:
    """Yield the pairs of a thing under tasks of their own, so that a batch compares things with things."""
    tasks = {
        "name_to_picture": ("word_to_picture", "things"),
        "picture_to_name": ("picture_to_word", "words"),
        "multilingual": ("multilingual", "pictures"),
    }
    for pair in _named(picture, rng):
        dataset, gallery = tasks[pair.dataset]
        yield replace(pair, dataset=dataset, gallery=gallery)


def _asked(picture: Picture, rng: random.Random) -> str:
    return rng.choice(words.query_rewrites(picture.concept))


def _numbered(pairs: Iterable[Pair]) -> list[Pair]:
    return [replace(pair, key=f"{pair.dataset}-{number:06d}") for number, pair in enumerate(pairs)]
