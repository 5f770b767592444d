"""Your own data with little effort: captions alone, videos, pages of documents, TSV and Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny_sources as tiny

from rime_pl.__main__ import main
from rime_pl.clips import MAX_PAGE_POINTS, count_pages
from rime_pl.datamodules.builders import building, folder
from rime_pl.datamodules.builders.table import read_table
from rime_pl.datamodules.checking import check_table
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.errors import DataError, StoppedError
from rime_pl.types import Clip, Page, Pair

TEN_METRES = 10 / 0.0254 * 72  # points


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Pictures, a video, a document of three pages, and a table of captions named captions.csv."""
    path = tmp_path / "media"
    for number in range(12):
        tiny.save(path / "pictures" / f"{number}.png", number)
    tiny.write_video(path / "walk.mp4")
    tiny.write_pdf(path / "manual.pdf", (200, 300), (300, 200), (100, 100))
    rows = [{"image": f"pictures/{n}.png", "caption": f"thing {n}"} for n in range(12)]
    write(tmp_path / "captions.csv", rows)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        return tiny.write_parquet(path, rows)
    if path.suffix == ".jsonl":
        return tiny.write_lines(path, rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def build(tmp_path: Path, table: Path, media: Path, **settings: Any) -> dict[str, list[Pair]]:
    settings = {"val_share": 0.3, "test_share": 0.3, "workers": 2, **settings}
    folder.build(tmp_path / "corpus", table=table, media=media, **settings)
    splits = {}
    for split in read_corpus(tmp_path / "corpus")["splits"]:
        reader = ShardReader(read_split(tmp_path / "corpus", split))
        splits[split] = [reader.read(number) for number in range(len(reader))]
    return splits


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_images_and_captions_is_enough(tmp_path: Path, media: Path, kind: str) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption": f"thing {n}"} for n in range(12)]
    splits = build(tmp_path, write(tmp_path / f"mine.{kind}", rows), media)
    pairs = [pair for split in splits.values() for pair in split]
    tasks = [pair.dataset for pair in pairs]
    assert {task: tasks.count(task) for task in tasks} == {"caption_to_picture": 12, "picture_to_caption": 12}
    contents = {split: {pair.target.content_id for pair in pairs} for split, pairs in splits.items()}
    assert sum(map(len, contents.values())) == len(set().union(*contents.values())) == 12
    first, second = sorted((pair for pair in pairs if pair.source.endswith(" 3")), key=lambda pair: pair.key)
    assert first.query is not None and second.query is not None
    assert first.query.text == second.target.text and len(first.target.media) == len(second.query.media) == 1
    assert first.key.endswith("row-00000003") and second.key.endswith("row-00000003-1")
    assert first.source == f"mine.{kind} {'row' if kind == 'parquet' else 'line'} 3"


def test_videos_and_pages(tmp_path: Path, media: Path) -> None:
    rows = [
        {"query_text": "who walks?", "target_video": "walk.mp4", "split": "train"},
        {"query_text": "which page?", "target_page": "manual.pdf#2", "split": "val"},
        {"query_text": "which pages?", "target_page": "manual.pdf#2-3", "split": "val"},
        {"query_page": "manual.pdf", "target_text": "the whole manual", "split": "test"},
        {
            "query_page": "pictures/1.png",
            "query_image": "pictures/2.png",
            "target_text": "b",
            "split": "test",
        },
    ]
    splits = build(
        tmp_path, write(tmp_path / "mine.jsonl", rows), media, frames=3, frame_side=32, page_side=64
    )
    (clip,) = splits["train"][0].target.media
    assert isinstance(clip, Clip) and len(clip.frames) == 3 and clip.frames[0].size == (32, 24)
    one, several = splits["val"]
    (page,) = one.target.media
    assert isinstance(page, Page) and page.image.size == (64, 43)
    assert [medium.image.size for medium in several.target.media] == [(64, 43), (64, 64)]  # type: ignore[union-attr]
    whole, mixed = (pair.query for pair in splits["test"])
    assert whole is not None and mixed is not None and len(whole.media) == 3
    assert [isinstance(medium, Page) for medium in mixed.media] == [False, True]
    assert len({pair.target.content_id for split in splits.values() for pair in split}) == 5


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ({"video": "torn.mp4"}, "unusable clip", "field 'video': .*torn.mp4 must be a video, but cannot be"),
        ({"video": "text.mp4"}, "unusable clip", "field 'video': .*text.mp4 must be a video"),
        ({"page": "wide.pdf#1"}, "unusable page", "field 'page': .*must have sides of at most .* metres"),
        ({"page": "text.pdf#1"}, "unusable page", "must be a PDF that can be read"),
        ({"page": "text.pdf"}, "unusable page", "must be a PDF that can be read"),
        ({"page": "manual.pdf#4"}, "unusable page", "has 3 pages, so there is no page 4"),
        ({"page": "manual.pdf#0"}, "unusable page", "must name 1 to 256 pages"),
        ({"page": "manual.pdf#3-2"}, "unusable page", "must name 1 to 256 pages"),
        ({"page": "manual.pdf#1-999999999"}, "unusable page", "must name 1 to 256 pages"),
        ({"image": "bomb.png"}, "unusable picture", "field 'image': .*1600000000 pixels. exceeds limit"),
        ({"image": "none.png"}, "missing file", "field 'image': file .*none.png does not exist"),
        ({"image": "../captions.csv"}, "path outside the folder", "field 'image': .*must not contain '..'"),
        (
            {"image": "/etc/passwd"},
            "path outside the folder",
            "Give the folder that holds all files as --media",
        ),
        ({"image": "link.png"}, "path outside the folder", "is a link that leaves"),
        ({"image": ""}, "no target", "field 'caption' or 'image' must have a value"),
        (
            {"image": "pictures/1.png", "caption": ""},
            "no query",
            "field 'caption' or 'image' must have a value",
        ),
    ],
)
def test_rows_that_are_refused(
    tmp_path: Path, media: Path, row: dict[str, str], kind: str, says: str
) -> None:
    video = (media / "walk.mp4").read_bytes()
    (media / "torn.mp4").write_bytes(video[: len(video) // 2])
    for name in ("text.mp4", "text.pdf"):
        (media / name).write_text("neither a video nor a document")
    tiny.write_pdf(media / "wide.pdf", (TEN_METRES, 500))
    assert TEN_METRES > MAX_PAGE_POINTS
    tiny.write_bomb(media / "bomb.png")
    (media / "link.png").symlink_to(tmp_path / "captions.csv")
    good = [{"image": f"pictures/{n}.png", "caption": f"thing {n}"} for n in range(12)]
    table = write(tmp_path / "mine.jsonl", [*good, {"caption": "what?", **row}])
    with pytest.raises(DataError, match=rf"^mine.jsonl line 13: .*{says}|line 13: .*{says}") as error:
        build(tmp_path, table, media)
    assert "captions.csv" not in str(error.value) or "link" in says or ".." in says
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "media", "mine.jsonl"]
    assert str(error.value).count("line 13") == 1  # both directions, told once
    found = check_table(table, media)
    assert {fault.kind for fault in found.faults if fault.where == "mine.jsonl line 13"} == {kind}
    splits = build(tmp_path, table, media, skip_broken=True)
    assert sum(map(len, splits.values())) == 24
    assert (tmp_path / "corpus" / "broken.txt").read_text().startswith("mine.jsonl line 13: ")


def test_a_key_that_is_named_twice_is_told(tmp_path: Path) -> None:
    table = tmp_path / "a.jsonl"
    table.write_text('{"query_text": "a", "query_text": "b", "target_text": "c"}\n')
    (fault,) = read_table(table).faults
    assert fault.kind == "duplicate key" and "'query_text'" in fault.says


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("image", r"columns \['image'\] need a column 'caption'"),
        ("image,caption,query_text", r"column 'caption' goes with .*, but there are \['query_text'\]"),
        ("image,caption,score", r"columns \['score'\] are unknown"),
    ],
)
def test_columns_that_do_not_go_together(tmp_path: Path, columns: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(columns + "\n" + "," * columns.count(",") + "x\n")
    with pytest.raises(DataError, match=says):
        read_table(tmp_path / "a.csv")
    rows = [dict.fromkeys(columns.split(","), "x")]
    with pytest.raises(DataError, match=says):
        read_table(tiny.write_parquet(tmp_path / "a.parquet", rows))


def test_absolute_paths_below_the_folder_are_taken(tmp_path: Path, media: Path) -> None:
    rows = [{"image": str(media / "pictures" / f"{n}.png"), "caption": f"thing {n}"} for n in range(12)]
    assert sum(map(len, build(tmp_path, write(tmp_path / "mine.csv", rows), media).values())) == 24


def test_captions_with_a_split_and_a_content(tmp_path: Path, media: Path) -> None:
    splits = ["train", "val", "test"]
    rows = [
        {"image": f"pictures/{n}.png", "caption": f"{n}", "split": splits[n % 3], "content_id": f"c{n % 6}"}
        for n in range(12)
    ]
    found = build(tmp_path, write(tmp_path / "mine.csv", rows), media)
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 8, "val": 8, "test": 8}
    items = [item for pair in found["train"] for item in (pair.query, pair.target) if item]
    assert {item.content_id for item in items} == {"c0", "c3"}


def test_a_stopped_build_goes_on(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PER_SHARD", 4)
    monkeypatch.setattr(building, "PER_SHARD", 4)
    build(tmp_path, tmp_path / "captions.csv", media, workers=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "corpus").rglob("*") if path.is_file()}
    (tmp_path / "corpus").rename(tmp_path / "whole")
    write_one, written = building.write_shard, []

    def stop(path: Path, *more: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write_one(path, *more))

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_shard", stop)
        with pytest.raises(StoppedError, match=r"2 of \d+ parts .* The same command goes on"):
            build(tmp_path, tmp_path / "captions.csv", media, workers=1)
    build(tmp_path, tmp_path / "captions.csv", media, workers=1)
    after = {path.name: path.read_bytes() for path in (tmp_path / "corpus").rglob("*") if path.is_file()}
    assert after == before and not list(tmp_path.glob(".corpus*"))


def test_settings_of_media(tmp_path: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "shards",
        "folder",
        "--table",
        str(tmp_path / "captions.csv"),
        "--output",
        str(tmp_path / "corpus"),
    ]
    assert main([*words, "--frames", "0"]) == 2
    assert "--frames must be at least 1, but is 0" in capsys.readouterr().err
    assert count_pages(media / "manual.pdf") == 3


def test_no_rows_of_parquet(tmp_path: Path) -> None:
    table = tiny.write_parquet(tmp_path / "a.parquet", [{"query_text": "a", "target_text": None, "task": 3}])
    kinds = [fault.kind for fault in read_table(table).faults]
    assert kinds == ["not a string", "no target"]
