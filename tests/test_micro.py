"""The corpus of the test suite is as mixed as a real one, so that no fault hides behind equal pictures."""

from __future__ import annotations

from pathlib import Path

from tests.micro import RAGGED, read_pairs


def test_pictures_of_the_suite_differ_in_size_and_number(scenes_corpus: Path) -> None:
    pairs = read_pairs(scenes_corpus, "train")
    sides = [item for pair in pairs for item in (pair.query, pair.target) if item]
    assert {image.size for item in sides for image in item.media} == {(w, h) for w, h, _ in RAGGED}
    assert len({size[:2] for size in RAGGED}) >= 5
    assert {len(pair.query.media) for pair in pairs if pair.query} == {0, 1, 2}
