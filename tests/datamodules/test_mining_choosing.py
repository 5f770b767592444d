"""Mining a corpus of texts and pictures against loops over its pairs, and what counts as the same item."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rime_pl.datamodules.mining import choosing
from rime_pl.datamodules.mining.choosing import Embedded, Mined, mine, modes_of
from rime_pl.datamodules.mining.items import Catalogue, StoredItems, normalised
from rime_pl.datamodules.mining.rules import RULES, Rules
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import DataError
from rime_pl.types import Item, Mode, Pair, content_hash
from tests.datamodules.test_mining_rules import judged_by_loops, some_rules

MODES = ["disc-disc", "gen-gen", "gen-disc", "disc-gen"]


def picture(number: int) -> Image.Image:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, 90, 10)).save(buffer, "PNG")
    return Image.open(buffer)


def catalogue_of(folder: Path, *pairs: Pair) -> Catalogue:
    write_corpus(folder, "some", "CC0", {"train": pairs}, {"train": len(pairs)}, seed=0, samples_per_shard=5)
    catalogue = Catalogue(read_split(folder, "train"))
    catalogue.look()
    return catalogue


def random_item(rng: random.Random, content: str) -> Item:
    shown = (picture(rng.randint(0, 4)),) if rng.random() < 0.3 else ()
    words = rng.choice(["a ring", "A Ring.", "a star", "two rings", "  a star ", "a cross", "three", "four"])
    return Item(words, shown, content, rng.choice(["", "Find it."]))


def random_pairs(rng: random.Random) -> list[Pair]:
    """Two tasks; contents, texts and pictures repeat, and pairs have uneven numbers of right answers."""
    pairs = []
    for number in range(rng.randint(2, 24)):
        content = f"content {rng.randint(0, 7)}"
        positives = tuple(
            random_item(rng, f"content {rng.randint(0, 9)}") for _ in range(rng.choice([0, 0, 1, 3]))
        )
        negatives = tuple(
            random_item(rng, f"content {rng.randint(0, 9)}") for _ in range(rng.choice([0, 0, 2]))
        )
        query = random_item(rng, rng.choice([content, f"query {number}", f"query {rng.randint(0, 3)}"]))
        asked = query if rng.random() < 0.95 else None
        task = rng.choice(["one", "two"])
        pairs.append(
            Pair(f"pair-{number}", task, "texts", asked, random_item(rng, content), negatives, positives)
        )
    return pairs


Key = tuple[str, str, tuple[bytes, ...]]


def key(item: Item) -> Key:
    """All of an item that is embedded."""
    return item.instruction, item.text, tuple(image.tobytes() for image in item.media)  # type: ignore[union-attr]


def same_text(one: Item, other: Item) -> bool:
    return not one.media and not other.media and normalised(one.text) == normalised(other.text) != ""


def same_pictures(one: Item, other: Item) -> bool:
    return bool(one.media) and key(one)[2] == key(other)[2]


def same_query(one: Item, other: Item) -> bool:
    return one.content_id == other.content_id or same_text(one, other) or key(one) == key(other)


def vector(item: Item, mode: Mode) -> torch.Tensor:
    """Small numbers on a grid: their products are exact, and many scores tie."""
    generator = torch.Generator().manual_seed(content_hash(repr((key(item), mode))) % 2**31)
    return torch.randint(-4, 5, (3,), generator=generator) / 4


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def by_loops(
    pairs: list[Pair], task: str, modes: list[str], rules: Rules, keep: bool, query_pictures: bool
) -> tuple[dict[str, list[tuple[Key, str, int]]], dict[str, Counter[int]]]:
    """The negatives of each pair of a task, and the verdicts of each mode pair, in plain Python."""
    mine_ = [pair for pair in pairs if pair.dataset == task]
    contents: dict[Key, set[str]] = {}
    gallery: dict[Key, Item] = {}
    for pair in mine_:
        for item in (pair.target, *pair.positives):
            gallery.setdefault(key(item), item)
            contents.setdefault(key(item), set()).add(item.content_id)
    chosen: dict[str, list[tuple[Key, str, int]]] = {}
    verdicts: dict[str, Counter[int]] = {name: Counter() for name in modes}
    for pair in mine_:
        if pair.query is None:
            continue
        alike = [one for one in mine_ if one.query and same_query(one.query, pair.query)]
        right = [item for one in alike for item in (one.target, *one.positives)]
        right_contents = {pair.query.content_id, *(item.content_id for item in right)}
        had = pair.hard_negatives if keep else ()

        def rule(
            item: Item,
            right: Any = right,
            right_contents: Any = right_contents,
            had: Any = had,
            pair: Any = pair,
        ) -> int:
            if contents[key(item)] & right_contents:
                return 1
            if any(same_text(item, one) for one in (*right, pair.query)):
                return 2
            if any(same_pictures(item, one) for one in (*right, *(() if query_pictures else (pair.query,)))):
                return 3
            for one in had:
                if one.content_id in contents[key(item)] or same_text(item, one) or same_pictures(item, one):
                    return 4
            return 0

        lists = []
        for name in modes:
            query_mode, target_mode = modes_of(name)
            asked = vector(pair.query, query_mode)
            scores = {place: dot(asked, vector(item, target_mode)) for place, item in gallery.items()}
            order = sorted(gallery, key=lambda place: -scores[place])  # stable: of a tie the first one
            lowest = min(dot(asked, vector(item, target_mode)) for item in (pair.target, *pair.positives))
            found = judged_by_loops(
                [scores[p] for p in order], [rule(gallery[p]) for p in order], lowest, rules
            )
            verdicts[name].update(verdict for verdict in found if verdict >= 0)
            others = [place for place, verdict in zip(order, found, strict=True) if not 1 <= verdict <= 4]
            lists.append(
                [
                    (place, name, others.index(place) + 1)
                    for place, verdict in zip(order, found, strict=True)
                    if verdict == 0
                ]
            )
        taken: list[tuple[Key, str, int]] = []
        for turn in range(max(map(len, lists))):
            for some in lists:
                if turn < len(some):
                    item = gallery[some[turn][0]]
                    if not any(
                        contents[key(item)] & contents[p]
                        or same_text(item, gallery[p])
                        or same_pictures(item, gallery[p])
                        for p, *_ in taken
                    ):
                        taken.append(some[turn])
        chosen[pair.key] = taken
    return chosen, verdicts


def embedded_of(catalogue: Catalogue, task: str) -> tuple[Embedded, Embedded]:
    group = catalogue.groups[task, "texts"]
    return embedded_items(catalogue, group.queries), embedded_items(catalogue, list(group.targets))


def embedded_items(catalogue: Catalogue, numbers: list[int]) -> Embedded:
    items = list(StoredItems(catalogue, numbers))
    modes: list[Mode] = ["discriminative", "generative"]
    vectors = {mode: torch.stack([vector(item, mode) for item in items]) for mode in modes if items}
    return Embedded({number: row for row, number in enumerate(numbers)}, vectors)


@pytest.mark.parametrize("seed", range(40))
def test_a_corpus_equals_loops_over_its_pairs(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    pairs, rules = random_pairs(rng), some_rules(rng)
    keep, query_pictures = rng.random() < 0.5, rng.random() < 0.5
    modes = rng.sample(MODES, rng.randint(1, 4))
    catalogue = catalogue_of(tmp_path / "corpus", *pairs)
    monkeypatch.setattr(choosing, "_MOST_QUERIES", rng.randint(1, 5))
    monkeypatch.setattr(choosing, "_SCORES", rng.choice([1, 1 << 24]))
    for task, _ in catalogue.groups:
        group = catalogue.groups[task, "texts"]
        done: list[int] = []
        found = mine(
            *(group, catalogue, embedded_of(catalogue, task), modes, rules, keep, query_pictures),
            each=done.append,
        )
        assert sum(done) == len(group.asked) == len(found.chosen)
        expected, verdicts = by_loops(pairs, task, modes, rules, keep, query_pictures)
        for name in modes:
            assert +Counter(found.counts(name)) == +Counter(
                {r: verdicts[name][n] for n, r in enumerate(RULES, 1)}
            )
            assert found.looked_at(name) == verdicts[name].total()
        for row, choices in found.chosen.items():
            wanted = expected[catalogue.entries[row].key]
            items = StoredItems(catalogue, [choice.item for choice in choices])
            got = [(key(item), one.modes, one.rank) for item, one in zip(items, choices, strict=True)]
            assert len(got) == min(rules.num_negatives, len(wanted))
            if rules.sampling == "top":
                assert got == wanted[: len(got)]
            else:
                assert [one for one in wanted if one in got] == got, "drawn among them, in their order"


def text(words: str, content: str) -> Item:
    return Item(words, (), content)


def mined_of(catalogue: Catalogue, rules: Rules | None = None, **more: Any) -> Mined:
    group = catalogue.groups["one", "texts"]
    unlimited = Rules(num_negatives=9, relative_margin=None)
    return mine(group, catalogue, embedded_of(catalogue, "one"), ["disc-disc"], rules or unlimited, **more)


def test_a_caption_of_two_pictures_makes_neither_a_negative(tmp_path: Path) -> None:
    """The content of a caption is that of its own picture, so only the words say that the two are alike."""
    pairs = [
        Pair(f"pair-{n}", "one", "texts", text(words, f"p{n}"), Item("", (picture(n),), f"p{n}"))
        for n, words in enumerate(["a man on a wave", "A man on a wave.", "a dog", "a cat"])
    ]
    catalogue = catalogue_of(tmp_path, *pairs)
    chosen = mined_of(catalogue).chosen
    found = [{catalogue.stored(one.item).content_id for one in chosen[row]} for row in range(4)]
    assert found == [{"p2", "p3"}, {"p2", "p3"}, {"p0", "p1", "p3"}, {"p0", "p1", "p2"}]


def chosen_texts(catalogue: Catalogue, mined: Mined, row: int = 0) -> list[str]:
    return sorted(catalogue.stored(choice.item).text for choice in mined.chosen[row])


def pair(
    number: int, query: Item, target: Item, task: str = "one", gallery: str = "texts", **more: Any
) -> Pair:
    return Pair(f"pair-{number}", task, gallery, query, target, **more)


def test_no_candidate_comes_from_another_task_or_gallery(tmp_path: Path) -> None:
    catalogue = catalogue_of(
        tmp_path / "c",
        pair(0, text("who", "q0"), text("a", "a")),
        pair(1, text("who else", "q1"), text("b", "b")),
        pair(2, text("who", "q2"), text("c", "c"), task="two"),
        pair(3, text("who", "q3"), text("d", "d"), gallery="names"),
    )
    assert chosen_texts(catalogue, mined_of(catalogue)) == ["b"]


def test_right_answers_of_the_same_question_are_no_negatives(tmp_path: Path) -> None:
    """Two rows ask the same thing, and each has another right answer; one text answers several questions."""
    catalogue = catalogue_of(
        tmp_path / "c",
        pair(0, text("a town in France", "q"), text("Paris", "paris")),
        pair(1, text("a French town", "q"), text("Lyon", "lyon")),
        pair(2, text("the same of Spain", "r"), text("Madrid", "madrid"), positives=(text("PARIS.", "p2"),)),
        pair(3, text("a god of Troy", "s"), text("Paris", "other paris")),
        pair(4, text("its capital", "t"), text("the capital", "other paris")),
    )
    mined = mined_of(catalogue)
    assert chosen_texts(catalogue, mined) == ["Madrid", "the capital"]
    assert chosen_texts(catalogue, mined, 1) == ["Madrid", "the capital"]
    # "Paris" is known under two contents, and either makes it right
    assert chosen_texts(catalogue, mined, 4) == ["Lyon", "Madrid", "PARIS."]


def test_pictures_of_the_query(tmp_path: Path) -> None:
    pairs = [
        pair(0, Item("make it night", (picture(1),), "q0"), Item("", (picture(2),), "two")),
        pair(1, Item("make it day", (picture(3),), "q1"), Item("", (picture(1),), "one")),
        pair(2, text("a third", "q2"), Item("with words", (picture(2),), "again")),
        pair(3, text("a fourth", "q3"), Item("", (picture(3),), "three")),
    ]
    catalogue = catalogue_of(tmp_path / "c", *pairs)
    for allowed, wanted in ((False, ["three"]), (True, ["one", "three"])):
        mined = mined_of(catalogue, query_pictures=allowed)
        contents = sorted(catalogue.stored(one.item).content_id for one in mined.chosen[0])
        assert contents == wanted, (
            "the second pair of the same picture has other words, and is right all the same"
        )
        assert mined.counts("disc-disc")["same pictures"] > 0


def test_an_item_without_an_embedding_is_no_candidate_and_its_pair_gets_none(tmp_path: Path) -> None:
    catalogue = catalogue_of(
        tmp_path / "c",
        *(pair(n, text(f"question {n}", f"q{n}"), text(f"answer {n}", f"a{n}")) for n in range(4)),
    )
    group, embedded = catalogue.groups["one", "texts"], embedded_of(catalogue, "one")
    del embedded[1].place[group.asked[2].answers[0]]
    mined = mine(group, catalogue, embedded, ["disc-disc"], Rules(num_negatives=9, relative_margin=None))
    assert mined.not_measured == [2] and 2 not in mined.chosen and mined.candidates == 3
    assert chosen_texts(catalogue, mined) == ["answer 1", "answer 3"]


def test_random_sampling_depends_on_the_seed_and_the_pair_only(tmp_path: Path) -> None:
    pairs = [pair(n, text(f"question {n}", f"q{n}"), text(f"answer {n}", f"a{n}")) for n in range(30)]
    catalogue = catalogue_of(tmp_path / "c", *pairs)
    drawn = [
        mined_of(catalogue, Rules(2, relative_margin=None, sampling="random", seed=seed)).chosen
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(one.rank for one in choices) for choices in drawn[0].values()}) > 5


def test_too_many_unreadable_samples_are_named(tmp_path: Path) -> None:
    catalogue_of(
        tmp_path / "c", *(pair(n, text(f"q {n}", f"q{n}"), text(f"a {n}", f"a{n}")) for n in range(3))
    )
    tar = tmp_path / "c/train/train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"dataset"', b'"dxtaset"', 1))
    with pytest.raises(
        DataError, match=r"At most 5% .* but 1 of 3 are:\n  train-000000.tar/pair-0: field 'dataset'"
    ):
        Catalogue(read_split(tmp_path / "c", "train")).look()
