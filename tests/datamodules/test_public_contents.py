"""What the builders of public data sets make of a row, and what of it they refuse."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources as tiny
from built_corpora import Splits, changed, everything, refused, run

from rime_pl.datamodules.builders.public import llava_hound
from rime_pl.datamodules.builders.public.frames import frames_of_list
from rime_pl.datamodules.builders.public.instructions import split_instruction
from rime_pl.datamodules.builders.public.placeholders import without_placeholders
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.shards import read_corpus
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Clip, Page, frames_of


def test_karpathy(built: Callable[..., Splits], tmp_path: Path) -> None:
    splits = built("coco", tiny.karpathy(tmp_path / "source"))
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 100, "val": 40, "test": 42}
    pairs = splits["test"]  # picture 3 has six captions
    find, tell = pairs["dataset_coco-00000004-10"], pairs["dataset_coco-00000004-11"]
    assert find.dataset == "caption_to_picture" and tell.dataset == "picture_to_caption"
    assert find.query is not None and tell.query is not None
    assert find.query.text == tell.target.text == "A dog 5 at 3."
    assert {item.content_id for pair in (find, tell) for item in (pair.query, pair.target) if item} == {
        "coco-3"
    }
    assert len(find.target.media) == len(tell.query.media) == 1 and not tell.target.media
    assert find.source == "dataset_coco.json row 4"
    contents = [{pair.target.content_id for pair in of_split.values()} for of_split in splits.values()]
    assert sum(map(len, contents)) == len(set().union(*contents)) == 18


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"filename": "none.jpg"}, {"missing file": 10}),
        ({"filepath": "../pictures/val2014"}, {"path outside the folder": 10}),
        ({"split": "extra"}, {"unknown split": 1}),
        ({"imgid": None}, {"no picture id": 1}),
        ({"sentences": []}, {"no captions": 1}),
        ({"sentences": [{"raw": 3}]}, {"not a string": 2}),
        (
            {"sentences": [{"raw": " "}, {"raw": "A cat."}, {"raw": "A cat."}]},
            {"duplicate pair": 2, "empty side": 2},
        ),
    ],
)
def test_rows_of_karpathy_that_are_refused(
    built: Callable[..., Splits], tmp_path: Path, change: dict[str, Any], expected: dict[str, int]
) -> None:
    options = tiny.karpathy(tmp_path / "source")
    changed(options["source"], 0, **change)
    built("coco", options)
    assert refused(tmp_path) == expected


def test_colpali(built: Callable[..., Splits], tmp_path: Path) -> None:
    splits = built("colpali", tiny.colpali(tmp_path / "source"))
    assert len(splits["test"]) == 6 and len(splits["train"]) + len(splits["val"]) == 32
    pair = splits["test"]["test-00000-of-00001-00000002"]
    assert pair.query is not None and pair.query.text == "What is the total of 101?" and not pair.query.media
    (page,) = pair.target.media
    assert isinstance(page, Page) and page.image.size == (40, 56)
    assert np.array_equal(np.asarray(page.image), np.asarray(tiny.picture(50, (40, 56))))
    assert pair.target.content_id == f"images/{50:08x}.jpg"


def test_colpali_as_questions(built: Callable[..., Splits], tmp_path: Path) -> None:
    pair = built("colpali", tiny.colpali(tmp_path / "source", task="qa"))["test"][
        "test-00000-of-00001-00000001"
    ]
    assert pair.query is not None and isinstance(pair.query.media[0], Page)
    assert pair.target.text == "['100 tons']" and not pair.target.media and pair.dataset == "colpali_qa"


def test_rows_of_colpali_that_are_refused(built: Callable[..., Splits], tmp_path: Path) -> None:
    options = tiny.colpali(tmp_path / "source")
    row = {"image_filename": "a.jpg", "query": "Why?", "answer": "So."}
    image = {"bytes": tiny.page(7), "path": None}
    rows = [
        {**row, "image": image},
        {**row, "query": None, "image": image},
        {**row, "image_filename": None, "image": image},
        {**row, "query": "Who?", "image": None},
        {**row, "query": "When?", "image": {"bytes": b"no picture", "path": None}},
    ]
    tiny.write_parquet(tmp_path / "source" / "data" / "train-00002-of-00082.parquet", rows)
    built("colpali", options, max_refused=0.2)
    assert refused(tmp_path) == {"empty side": 1, "no page name": 1, "unusable picture": 2}


def test_visrag(built: Callable[..., Splits], tmp_path: Path) -> None:
    pairs = everything(built("visrag", tiny.visrag(tmp_path / "source")))
    assert len(pairs) == 32 and {pair.dataset for pair in pairs.values()} == {
        "visrag_ArxivQA",
        "visrag_PlotQA",
    }
    contents = [pairs[f"train-00000-of-00029-{row:08d}"].target.content_id for row in range(1, 33)]
    assert contents[::2] == contents[1::2] and len(set(contents)) == 16
    assert {frames_of(pair.target.media[0])[0].mode for pair in pairs.values()} == {"RGB"}
    assert read_corpus(tmp_path / "corpus")["rows"]["PlotQA"] == {"read": 16, "expected": 56_192}


def test_llava_hound(built: Callable[..., Splits], tmp_path: Path) -> None:
    splits = built("llava-hound", tiny.llava_hound(tmp_path / "source"))
    pairs = everything(splits)
    tasks = [pair.dataset for pair in pairs.values()]
    assert {task: tasks.count(task) for task in tasks} == {
        "video_to_caption": 32,
        "caption_to_video": 32,
        "video_qa": 16,
    }
    tell, find = (pairs[f"video_caption_300k-00000003{part}"] for part in ("", "-1"))
    assert tell.query is not None and find.query is not None
    assert tell.query.text == "What happens?" and tell.target.text == find.query.text == "A man 1 walks 0."
    (clip,) = tell.query.media
    assert isinstance(clip, Clip)
    numbers = [1, 2, 4, 5, 7, 8, 10, 12]  # of 12 frames in the order of their numbers: c01_10 after c01_9
    assert clip.times == tuple((number - 1) / 2 for number in numbers)
    for frame, number in zip(clip.frames, numbers, strict=True):
        wanted = np.asarray(tiny.picture(20 + number), int)
        assert np.abs(np.asarray(frame, int) - wanted).mean() < 8
    (short,) = pairs["video_caption_300k-00000001-1"].target.media
    assert isinstance(short, Clip) and short.times == (0.0, 0.5, 1.0)
    clips = [
        {pair.query.content_id for pair in of.values() if pair.dataset != "video_qa"}
        for of in splits.values()
        if of
    ]  # type: ignore[union-attr]
    assert sum(map(len, clips)) == len(set().union(*clips)) == 16


def test_chosen_tasks_of_llava_hound(
    built: Callable[..., Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_hound, "_NUM_QUESTIONS", 14)
    pairs = everything(built("llava-hound", tiny.llava_hound(tmp_path / "source"), tasks=["qa"], frames=2))
    assert len(pairs) == 14 and {pair.dataset for pair in pairs.values()} == {"video_qa"}
    assert read_corpus(tmp_path / "corpus")["rows"] == {
        "video_240k_caption_15k": {"read": 16, "expected": 255_000}
    }


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"video": "v_none"}, "missing folder"),
        ({"video": ".."}, "path outside the folder"),
        ({"video": "empty"}, "missing frames"),
        ({"video": "torn"}, "unusable clip"),
        ({"video": "ragged"}, "unusable clip"),
        ({"video": None}, "malformed path"),
        ({"conversations": []}, "unknown form of a record"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "unknown form of a record",
        ),
    ],
)
def test_lines_of_llava_hound_that_are_refused(
    built: Callable[..., Splits], tmp_path: Path, change: dict[str, Any], kind: str
) -> None:
    options = tiny.llava_hound(tmp_path / "source", tasks=["video"])
    (options["media"] / "empty").mkdir()
    for name in ("torn", "ragged"):
        tiny.save(options["media"] / name / "c01_1.jpeg", 1)
    data = tiny.encoded(tiny.picture(2), "JPEG")
    (options["media"] / "torn" / "c01_2.jpeg").write_bytes(data[: len(data) // 2])
    (options["media"] / "ragged" / "c01_2.jpeg").write_bytes(tiny.encoded(tiny.picture(2, (64, 48)), "JPEG"))
    changed(options["source"] / "video_caption_300k.jsonl", 4, **change)
    built("llava-hound", options)
    assert refused(tmp_path) == {kind: 1}


def test_frames_of_a_list(tmp_path: Path) -> None:
    names = [f"v/f{n}.jpg" for n in range(1, 10)]
    for number, name in enumerate(names):
        tiny.save(tmp_path / name, number)
    assert frames_of_list(tmp_path, names, 1).times == (0.0,)
    assert frames_of_list(tmp_path, names, 3).times == (0.0, 2.0, 4.0)
    assert frames_of_list(tmp_path, names[::-1], 9).times == tuple(n / 2 for n in range(9))
    with pytest.raises(Refused, match="must have frames"):
        frames_of_list(tmp_path, [], 3)
    with pytest.raises(Refused, match="does not exist"):
        frames_of_list(tmp_path, ["v/none.jpg"], 3)


def test_placeholders_and_instructions() -> None:
    assert without_placeholders("<|image_1|>\na <image> b", 2) == ("a b", ())
    assert without_placeholders("a", 1) == ("a", ("medium without a placeholder, put first",))
    with pytest.raises(Refused, match="2 placeholders stand for 1 media"):
        without_placeholders("<image><image>", 1)
    assert split_instruction("Represent the given image showing a cat", False) == (
        "",
        "Represent the given image showing a cat",
    )
    assert split_instruction("Identify the scene shown in the image", False)[0] == ""
    assert split_instruction('Crop the image to to isolate the object labeled as "a"', True)[1] == '"a"'


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mmeb-train", {}, "--source must hold folders with Parquet files"),
        ("coco", {"media": Path("x")}, "must be a JSON file, but there is none"),
        ("colpali", {}, "--source must be a folder with data/train-"),
        ("visrag", {}, "--source must be a folder with data/train-"),
        ("ume-r1", {"media": Path("x")}, "--source must be a JSON file or a folder of JSON files"),
        (
            "llava-hound",
            {"media": Path("x")},
            "video_caption_300k.jsonl must be a JSON file, but there is none",
        ),
        ("llava-hound", {"media": Path("x"), "frames": 0}, "--frames must be at least 1"),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        run(name, {"source": tmp_path, **options}, tmp_path / "corpus")
    assert not list(tmp_path.iterdir())


VALUES = (
    b"null",
    b"7",
    b"-1e400",
    b'"\\ud800"',
    b"[]",
    b"{}",
    b'"a\\u0000b"',
    b'["x", ["y"]]',
    b'"../../x"',
    b"NaN",
)


def damaged(data: bytes, text: bool, rng: random.Random) -> bytes:
    """The file with another JSON value, or with changed, lost or additional bytes."""
    new = bytearray(data)
    values = [match.span() for match in re.finditer(rb'"(?:[^"\\]|\\.)*"|\d+|\[[^\[\]]*\]', data)]
    if text and rng.random() < 0.7:
        start, end = rng.choice(values)
        new[start:end] = rng.choice(VALUES)
        return bytes(new)
    for _ in range(rng.choice([1, 3, 20])):
        at = rng.randrange(len(new))
        new[at : at + rng.choice([0, 1, 30])] = rng.randbytes(rng.choice([0, 1, 5]))
    return bytes(new)


@pytest.mark.parametrize("name", ["coco", "visrag", "ume-r1", "rime-json", "llava-hound"])
def test_a_damaged_source_is_built_or_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    writers = {"coco": tiny.karpathy, "visrag": tiny.visrag, "ume-r1": tiny.ume_sft, "rime-json": tiny.rl}
    options = writers.get(name, tiny.llava_hound)(tmp_path / "source")
    settings = {**tiny.SHARES, "workers": 2, "max_refused": 1.0, **options}
    files = [p for p in (tmp_path / "source").rglob("*") if p.suffix in (".json", ".jsonl", ".parquet")]
    rng, ends = random.Random(name), set()
    for _ in range(12):
        file = rng.choice(files)
        data = file.read_bytes()
        file.write_bytes(damaged(data, file.suffix != ".parquet", rng))
        try:
            run(name, settings, tmp_path / "corpus")
            ends.add("built")
        except RimeError:
            ends.add("refused")
        file.write_bytes(data)
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "corpus"}
    assert "built" in ends or name == "visrag"  # a damaged byte of Parquet makes the file unreadable
