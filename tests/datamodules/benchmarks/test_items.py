"""Items are made when they are asked for, and pictures in Parquet are read once by whoever reads in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems, StoredPictures
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.records import Place, Record
from rime_pl.errors import DataError
from rime_pl.types import Item
from tests.datamodules.benchmarks.official_copies import colour, picture, write_parquet

ROWS, GROUP = 12, 3


class Counted(ParquetFile):
    """A file that notes which rows it gives."""

    given: list[int]

    def read(self, places: Sequence[Place]) -> Iterator[Record]:
        for record in super().read(places):
            self.given.append(record.place.row)
            yield record


@pytest.fixture
def stored(tmp_path: Path) -> tuple[StoredPictures, list[Place], list[int]]:
    write_parquet(
        tmp_path / "a.parquet",
        [{"id": n, "image": {"bytes": picture(n), "path": None}} for n in range(ROWS)],
        GROUP,
    )
    file = Counted(tmp_path / "a.parquet", "a.parquet", ["id"], ["image"])
    file.given = []
    pictures = StoredPictures([file], "image")
    places = [record.place for record in file.records()]
    for place in places:
        pictures.add(0, place)
    return pictures, places, file.given


def shown(pictures: StoredPictures, place: Place) -> Any:
    return pictures(0, place).getpixel((0, 0))


def test_in_order_each_row_is_read_once(stored: Any) -> None:
    pictures, places, given = stored
    assert [shown(pictures, place) for place in places] == [colour(n) for n in range(ROWS)]
    assert given == list(range(1, ROWS + 1))


def test_groups_that_are_passed_over_are_not_read(stored: Any) -> None:
    pictures, places, given = stored
    assert shown(pictures, places[0]) == colour(0)
    assert shown(pictures, places[11]) == colour(11)
    assert given == [1, 12]
    assert shown(pictures, places[4]) == colour(4)  # a step back
    assert shown(pictures, places[6]) == colour(6)  # the next group
    assert given == [1, 12, 5, 6, 7]


def test_a_row_that_nobody_told_of(stored: Any) -> None:
    pictures, places, _ = stored
    with pytest.raises(DataError, match=r"a.parquet row 99 is not there any more: the file has changed"):
        pictures(0, Place(99, 3))
    assert shown(pictures, places[1]) == colour(1)


def test_an_item_is_made_when_it_is_asked_for() -> None:
    made = []

    def make(row: int) -> Item:
        made.append(row)
        return Item(str(row))

    items = LazyItems(range(1_000_000), make)
    assert len(items) == 1_000_000
    assert made == []
    assert (items[7].text, items[-1].text) == ("7", "999999")
    assert [item.text for item in items[2:4]] == ["2", "3"]
    assert made == [7, 999_999, 2, 3]
    with pytest.raises(IndexError):
        items[1_000_000]


def test_the_first_content_of_a_name_wins() -> None:
    candidates: Candidates[str] = Candidates()
    assert [candidates.add(name, row) for name, row in [("a", "1"), (1, "2"), ("a", "3"), ("1", "4")]] == [
        0,
        1,
        0,
        2,
    ]
    assert (candidates.names, candidates.rows) == (["a", 1, "1"], ["1", "2", "4"])
    assert candidates.notes == ["1 rows of the corpus repeat an id, and are left out"]
