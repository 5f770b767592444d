"""The measured gain: with a function in the place of a model, and pictures that keep their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from rime_pl.teacher.cache import Answer
from rime_pl.teacher.gains import Gains, decoded
from rime_pl.teacher.jobs import Jobs
from rime_pl.teacher.request import file_of
from rime_pl.types import Item, Pair
from tests.teacher.pairs import Listed, make_jobs, pair, picture


def answered(folder: Path, *pairs: Pair | None, query: str = "A town.", target: str = "A place.") -> Jobs:
    """Jobs whose answers are there already."""
    jobs = make_jobs(Listed(*pairs), folder, max_failed_share=1.0)
    jobs.look()
    for key, job in jobs.jobs.items():
        jobs.answers.known[key] = Answer(f"{query if job.side == 'query' else target} {job.number} there.")
    jobs.answers.close()
    known = jobs.answers
    jobs = Jobs(jobs.order, jobs.source, known)
    jobs.look()
    return jobs


def scores(pairs: Sequence[tuple[Item, Item]]) -> list[float]:
    """0.5 without a rewrite; a query's raises it by its number, a target's lowers it."""
    found = []
    for query, target in pairs:
        assert all(image.mode == "RGB" and not getattr(image, "fp", None) for image in query.media)
        assert not (query.rewrite and target.rewrite), "one side at a time"
        up = 0.01 * int(query.rewrite.split()[-2]) if query.rewrite else 0.0
        found.append(0.5 + up - (0.1 if target.rewrite else 0.0))
    return found


def ends(gains: Gains) -> dict[str, dict[str, int]]:
    return {side: dict(each) for side, each in gains.counts().items()}


def test_rewrites_that_do_not_gain_are_dropped(tmp_path: Path) -> None:
    gains = Gains(answered(tmp_path, *map(pair, range(4))), scores, min_gain=0.015)
    written = list(gains.pairs(range(4)))
    assert [each.query.rewrite for each in written if each and each.query] == [
        None,
        None,
        "A town. 2 there.",
        "A town. 3 there.",
    ]
    assert all(each and each.target.rewrite is None for each in written)
    assert ends(gains) == {"query": {"dropped: gain": 2, "new rewrite": 2}, "target": {"dropped: gain": 4}}
    assert gains.outcome(1, "query")[1].startswith("gain +0.0100, at least 0.015 (--gain.min_gain): 'A town.")
    assert gains.found[3, "query"] == pytest.approx(0.03) and gains.found[3, "target"] == pytest.approx(-0.1)


def test_or_they_are_only_counted(tmp_path: Path) -> None:
    gains = Gains(answered(tmp_path, *map(pair, range(4))), scores, min_gain=0.015, drop=False)
    assert all(each and each.target.rewrite for each in gains.pairs(range(4)))
    assert (
        ends(gains) == {"query": {"new rewrite": 4}, "target": {"new rewrite": 4}} and len(gains.found) == 8
    )


def test_a_gain_that_cannot_be_measured_drops_nothing(tmp_path: Path) -> None:
    gains = Gains(answered(tmp_path, pair(0)), lambda pairs: [math.nan for _ in pairs])
    (written,) = gains.pairs([0])
    assert written and written.target.rewrite and all(map(math.isnan, gains.found.values()))


def test_equal_content_is_measured_for_each_of_its_pairs(tmp_path: Path) -> None:
    one, two = pair(5), pair(6)
    both = (one, Pair(two.key, two.dataset, two.gallery, one.query, two.target))

    def similarity(pairs: Sequence[tuple[Item, Item]]) -> list[float]:
        return [0.1 if query.rewrite and target.text.endswith("6") else 0.2 for query, target in pairs]

    gains = Gains(answered(tmp_path, *both), similarity)
    written = list(gains.pairs(range(2)))
    assert [bool(each and each.query and each.query.rewrite) for each in written] == [True, False]


def test_pairs_are_measured_in_parts_and_come_in_order(tmp_path: Path) -> None:
    sizes = []

    def similarity(pairs: Sequence[tuple[Item, Item]]) -> list[float]:
        sizes.append(len(pairs))
        return [0.5] * len(pairs)

    gains = Gains(answered(tmp_path, *map(pair, range(40)), None), similarity)
    written = list(gains.pairs(range(41)))
    assert [each and each.key for each in written] == [*(f"pair-{n:04d}" for n in range(40)), None]
    assert sizes == [96, 24], "each pair without a rewrite, with the query's and with the target's"


def test_a_gallery_item_is_not_measured(tmp_path: Path) -> None:
    gallery = Pair("k", "t", "g", None, pair(0).target)
    gains = Gains(answered(tmp_path, gallery), lambda pairs: pytest.fail("nothing to compare"))
    (written,) = gains.pairs([0])
    assert written and written.target.rewrite and not gains.found


def test_measuring_leaves_the_bytes_of_a_picture_alone() -> None:
    stored = picture(3, "JPEG")
    before = file_of(stored)
    opened = decoded(Item("", (stored,), rewrite="A town."))
    opened.media[0].load()
    assert opened.rewrite is None and file_of(stored) == before and before.startswith(b"\xff\xd8")
