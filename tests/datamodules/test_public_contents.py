"""What the builders of public data sets make of a row, and what of it they refuse."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sources as tiny

from rime_pl.commands.shards import SUBCOMMANDS
from rime_pl.datamodules.builders.public import llava_hound
from rime_pl.datamodules.builders.public.frames import frames_of_list
from rime_pl.datamodules.builders.public.instructions import split_instruction
from rime_pl.datamodules.builders.public.placeholders import without_placeholders
from rime_pl.datamodules.builders.public.responses import read_response
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.options.parser import arguments
from rime_pl.types import Clip, Page, Pair, frames_of

Splits = dict[str, dict[str, Pair]]


def run(name: str, options: dict[str, Any], output: Path) -> None:
    """Build with the options of the command line; one that is None is not given."""
    given = {"output": output, **{option: value for option, value in options.items() if value is not None}}
    SUBCOMMANDS[name](**arguments(SUBCOMMANDS[name], given))


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Splits]:
    """Builds a corpus and returns its pairs: split -> source of a pair and its task -> pair."""

    def build(name: str, options: dict[str, Any], **more: Any) -> Splits:
        run(name, {**tiny.SHARES, "workers": 1, **options, **more}, tmp_path / "corpus")
        splits: Splits = {}
        for split in read_corpus(tmp_path / "corpus")["splits"]:
            reader = ShardReader(read_split(tmp_path / "corpus", split))
            splits[split] = {
                pair.key.partition("/")[2]: pair for pair in map(reader.read, range(len(reader)))
            }
        return splits

    return build


def refused(tmp_path: Path) -> dict[str, int]:
    counts: dict[str, int] = read_corpus(tmp_path / "corpus")["refused"]
    return counts


def everything(splits: Splits) -> dict[str, Pair]:
    return {key: pair for pairs in splits.values() for key, pair in pairs.items()}


def changed(path: Path, number: int, **values: Any) -> None:
    """Change a record of a JSON file, or of JSON lines."""
    lines = path.suffix == ".jsonl"
    rows = tiny.read_lines(path) if lines else json.loads(path.read_text())
    (rows["images"] if isinstance(rows, dict) else rows)[number].update(values)
    tiny.write_lines(path, rows) if lines else tiny.write_json(path, rows)


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


def test_ume_for_sft(
    built: Callable[..., Splits], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = everything(built("ume-r1", tiny.ume_sft(tmp_path / "source")))
    question, find, document = (pairs[f"UME-sft-train-{row:08d}"] for row in (1, 2, 3))
    assert [pair.dataset for pair in (question, find, document)] == [
        "A-OKVQA",
        "video_caption_300k-v2t",
        "visrag",
    ]
    assert (
        question.query is not None and question.query.text == "What is it?" and len(question.query.media) == 1
    )
    assert question.query.rewrite == "It is 0." and question.query.cot == "One sees 0.\nIt is 0."
    assert question.target.text == "thing 0" and not question.target.media
    (clip,) = find.target.media
    assert isinstance(clip, Clip) and clip.times == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert document.query is not None and not document.query.media and len(document.target.media) == 1
    assert not any(str(tmp_path) in pair.target.content_id for pair in pairs.values())
    said = capsys.readouterr().out
    assert "30 x blank picture of a text, dropped" in said and "placeholder" not in said
    assert "all rows: 30 rows, but about 1,460,000 expected" in said


def test_rime_for_sft(built: Callable[..., Splits], tmp_path: Path) -> None:
    pairs = everything(built("rime-json", tiny.rime_sft(tmp_path / "source")))
    assert {pair.dataset for pair in pairs.values()} == {"CIRR", "CIRR2"}
    for number in range(3):
        pair = pairs[f"CIRR-{number + 1:08d}"]
        assert (
            pair.query is not None
            and pair.query.rewrite == pair.target.rewrite == f"A car by night {number}."
        )
        assert (pair.query.cot is not None) == (number == 2)
    assert all(all(entry.has_rewrite) for entry in read_split(tmp_path / "corpus", "train"))


def test_rl_files(built: Callable[..., Splits], tmp_path: Path) -> None:
    pairs = everything(built("ume-r1", tiny.rl(tmp_path / "source")))
    assert len(pairs) == 24 and {pair.dataset for pair in pairs.values()} == {"A-OKVQA", "llavahound"}
    picture, clip = pairs["UME-rl-train-00000001"].query, pairs["UME-rl-train-00000002"].query
    assert picture is not None and clip is not None and picture.rewrite is None
    assert picture.text == "What is 0?" and not isinstance(picture.media[0], Clip)
    assert isinstance(clip.media[0], Clip) and clip.media[0].times == (0.0, 0.5, 1.0, 1.5, 2.5, 3.0, 3.5, 4.5)


HUMAN = {"from": "human", "value": "<image>\nWhat?"}
GPT = {"from": "gpt", "value": "It is so."}


@pytest.mark.parametrize(
    ("side", "kind"),
    [
        ("no object", "unknown form of a record"),
        ({"conversations": []}, "unknown form of a record"),
        ({"conversations": [GPT]}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "unknown form of a record"),
        ({"conversations": [HUMAN, {"from": "bird", "value": "x"}]}, "unknown form of a record"),
        ({"conversations": [HUMAN, {"from": [], "value": "x"}]}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT], "image": 7}, "unknown form of a record"),
        ({"conversations": [HUMAN, GPT], "image": [7]}, "not a string"),
        ({"conversations": [HUMAN, GPT], "image": "images/none.jpg"}, "missing file"),
        ({"conversations": [HUMAN, GPT], "image": "../../etc/passwd"}, "path outside the folder"),
        ({"conversations": [HUMAN, GPT], "video": ["none/1.jpg"]}, "missing file"),
        ({"conversations": [{"from": "human", "value": "<image>\n"}, GPT]}, "empty side"),
        ({"conversations": [{"from": "human", "value": "a <|im_end|>"}, GPT]}, "special token"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "<think>only"}]}, "unknown form of a response"),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": "<think>a</think><answer>"}]},
            "no rewrite in a response",
        ),
    ],
)
def test_records_of_ume_that_are_refused(
    built: Callable[..., Splits], tmp_path: Path, side: Any, kind: str
) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    changed(options["source"], 5, qry=side)
    built("ume-r1", options)
    assert refused(tmp_path) == {kind: 1}


def test_other_names_of_turns_and_data_sets_are_taken(built: Callable[..., Splits], tmp_path: Path) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    rows = json.loads(options["source"].read_text())
    turns = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "What is 0?"},
        {"role": "assistant", "content": "It is."},
    ]
    rows[0] = {"task_name": "other", "qry": {"messages": turns, "image": None}, "pos": rows[0]["pos"]}
    tiny.write_lines(options["source"], rows)  # JSON lines in a file that ends in .json
    pair = everything(built("ume-r1", options))["UME-sft-train-00000001"]
    assert pair.dataset == "other" and pair.query is not None
    assert pair.query.text == "What is 0?" and pair.query.rewrite == "It is."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cup.", ("A cup.", None)),
        (" A cup. <gen_emb>\n", ("A cup.", None)),
        ("<answer>A cup.</answer>", ("A cup.", None)),
        ("<think>\nRed.\n</think>\n<answer>A cup.<gen_emb></answer>", ("A cup.", "Red.\nA cup.")),
        ("<think></think>A cup.", ("A cup.", None)),
        ("<think>a</think><rewrite>A cup.</rewrite><gen_emb>", ("A cup.", "a\nA cup.")),
    ],
)
def test_forms_of_a_response(text: str, expected: tuple[str, str | None]) -> None:
    assert read_response(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<gen_emb>",
        "a<gen_emb>b",
        "<think>a",
        "a</think>b",
        "<rewrite>a</rewrite> b",
        "<answer>a</answer><answer>b",
    ],
)
def test_forms_of_a_response_that_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        read_response(text)


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


def test_a_data_set_whose_name_is_half_a_character(built: Callable[..., Splits], tmp_path: Path) -> None:
    options = tiny.ume_sft(tmp_path / "source")
    changed(options["source"], 0, dataset_name="\ud800")
    built("ume-r1", options)
    assert refused(tmp_path) == {"half a character": 1}
