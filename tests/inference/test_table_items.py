"""Tables as a source of an index: pages in files of their own, absolute paths, rows that repeat others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rime_pl.errors import DataError
from rime_pl.inference.collection import Scan, scan_folder
from rime_pl.inference.index_folder import Record
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.sources import to_item
from rime_pl.inference.table_items import scan_table
from rime_pl.types import Item


@pytest.fixture
def media(tmp_path: Path) -> Path:
    (tmp_path / "media" / "below").mkdir(parents=True)
    Image.new("RGB", (30, 40), "white").save(tmp_path / "media" / "below" / "scan.png")
    Image.new("RGB", (30, 40), "red").save(tmp_path / "outside.png")
    return tmp_path / "media"


def scanned(folder: Path, *rows: dict[str, Any], media: Path | None = None) -> Scan:
    (folder / "table.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return scan_table(folder / "table.jsonl", media)


def opened(scan: Scan, number: int) -> Item:
    return to_item(Files(scan.root).source(scan.records[number]))


def test_a_picture_in_the_column_page_is_a_page(media: Path) -> None:
    name = "below/scan.png"
    scan = scanned(media, {"page": name}, {"image": name}, {"page": name, "text": "a form"})
    assert [opened(scan, number).kinds for number in range(3)] == ["page", "picture", "page + text"]
    assert [record.media for record in scan.records] == [(f"{name}#1",), (name,), (f"{name}#1",)]
    assert len({record.digest for record in scan.records}) == 3  # limits of a page give other vectors
    assert scan.records[1].digest == scan_folder(media).records[0].digest
    assert [Files(media).is_file(record) for record in scan.records] == [False, True, False]
    for number in (0, 2):
        with pytest.raises(
            DataError, match=rf"scan.png#{number}: pages count from 1, and a picture has only"
        ):
            Files(media).source(Record("x", b"", (f"{name}#{number}",)))


def test_a_picture_whose_name_looks_like_a_page_is_refused(media: Path) -> None:
    Image.new("RGB", (30, 40)).save(media / "scan#1", "PNG")
    scan = scanned(media, {"id": "odd", "image": "scan#1"})
    assert not scan.records and "'scan#1' ends like the number of a page" in scan.unusable["row 1"]


def test_absolute_paths_below_the_folder_of_the_media_are_used_and_others_are_refused(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(media)
    inside, outside = media / "below" / "scan.png", tmp_path / "outside.png"
    bad = [str(outside), f"{media}/../outside.png", "/etc/passwd", str(media)]
    monkeypatch.chdir(tmp_path)
    for root in (media, link, Path("media")):
        rows = [{"image": str(inside)}, {"page": str(inside)}, *({"image": name} for name in bad)]
        scan = scanned(tmp_path, *rows, media=root)
        assert [record.media for record in scan.records] == [("below/scan.png",), ("below/scan.png#1",)]
        assert opened(scan, 0).media and opened(scan, 1).kinds == "page"
        assert set(scan.unusable) == {f"row {number}" for number in range(3, 7)}
        assert f"field 'image': '{outside}' must be a path below {root.absolute()}" in scan.unusable["row 3"]
        assert "must not contain '..'" in scan.unusable["row 4"]
    scan = scanned(tmp_path, {"image": str(link / "below" / "scan.png")}, media=link)
    assert [record.media for record in scan.records] == [("below/scan.png",)]


def test_rows_that_repeat_others_are_counted(media: Path) -> None:
    row = {"id": "a", "text": "a red mug"}
    scan = scanned(media, row, row, {"id": "b", "text": "a red mug"}, row, {"id": "a", "text": "other"})
    assert [record.id for record in scan.records] == ["a", "b"]
    assert scan.notes == ["2 rows repeat an earlier one, id and content, and are indexed once."]
    assert list(scan.unusable) == ["a (row 5)"]
    assert scanned(media, row, row).notes == [
        "1 row repeats an earlier one, id and content, and is indexed once."
    ]


def test_a_medium_in_the_column_of_another_kind_is_refused(media: Path) -> None:
    for name in ("manual.pdf", "clip.mp4", "moving.gif"):
        (media / name).write_bytes(b"some bytes")
    rows = [{"image": "manual.pdf"}, {"text": "a", "image": "clip.mp4"}, {"video": "moving.gif"}]
    scan = scanned(media, *rows, {"video": "clip.mp4"}, {"image": "moving.gif"})
    assert [record.media for record in scan.records] == [("clip.mp4",), ("moving.gif",)]
    assert scan.unusable == {
        "row 1": "field 'image': 'manual.pdf' is a document, by its ending.",
        "row 2": "field 'image': 'clip.mp4' is no image, by its ending.",
        "row 3": "field 'video': 'moving.gif' is no video, by its ending.",
    }


def test_columns_that_no_item_has_are_told(media: Path) -> None:
    picture = {"caption": "a form", "image": "below/scan.png", "price": 3}
    assert scanned(media, picture).notes == ["columns that are not part of an item: caption, price."]
    assert scanned(media, picture, {"caption": "a mug"}).notes == [
        "columns that are not part of an item: price."
    ]


def test_a_value_under_both_names_of_a_column_is_refused(media: Path) -> None:
    scan = scanned(media, {"text": "a mug", "target_text": "a cup"}, {"text": "a mug", "target_text": ""})
    assert [record.text for record in scan.records] == ["a mug"]
    assert "fields 'text' and 'target_text' mean the same" in scan.unusable["row 1"]
