"""`rime shards inspect`: its counts are those of the samples, and its sheet holds what it says."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from rime_pl.__main__ import main
from rime_pl.datamodules.inspection import inspect_corpus, shown_pairs
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.report.contact_sheet import Section, contact_sheet, what
from rime_pl.report.drawing import font, missing_letters, wrapped
from rime_pl.types import Clip, Item, Page, Pair
from tests.micro import read_pairs


def picture(width: int = 40, height: int = 30, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


CLIP = Clip((picture(16, 8), picture(16, 8), picture(16, 8)), (0.0, 0.5, 1.5))
#: One pair of each kind: texts, several pictures, a clip, a page with text, a picture and a page, no query.
PAIRS = {
    "text": (Item("what?", content_id="a"), Item("that", content_id="b", rewrite="It is that.")),
    "several": (
        Item("", (picture(), picture(80, 20)), "c", rewrite="two"),
        Item("two", content_id="d", rewrite="2"),
    ),
    "clip": (Item("walk", content_id="e"), Item("", (CLIP,), "f")),
    "page": (Item("which page?", content_id="g"), Item("page two", (Page(picture(30, 60)),), "h")),
    "mixed": (Item("", (picture(), Page(picture())), "i"), Item("both", content_id="j")),
    "nobody asks": (None, Item("", (picture(),), "k")),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    pairs = [
        Pair(
            name.replace(" ", "-"),
            "all kinds",
            "items",
            query,
            target,
            (Item("no", content_id="x"),) * (name == "clip"),
        )
        for name, (query, target) in PAIRS.items()
    ]
    write_corpus(tmp_path / "kinds", "kinds", "none", {"train": pairs}, {"train": len(pairs)}, seed=0)
    return tmp_path / "kinds"


def test_counts_and_lengths_are_those_of_the_samples(corpus: Path) -> None:
    (task,) = inspect_corpus(corpus, count_tokens=lambda text: len(text.split()))["train"].values()
    assert (task.pairs, task.queries, task.contents, task.annotated, task.read) == (6, 5, 6, 1, 6)
    query, target = task.counts["query"], task.counts["target"]
    assert query.kinds == {"text": 3, "picture": 1, "clip": 0, "page": 0, "mixed": 1} and query.items == 5
    assert target.kinds == {"text": 3, "picture": 1, "clip": 1, "page": 1, "mixed": 0}
    assert (query.with_text, target.with_text, query.rewrites, target.rewrites) == (0, 1, 1, 2)
    asked, found = task.lengths["query"], task.lengths["target"]
    assert sorted(asked.letters) == [4, 5, 11] and sorted(asked.tokens) == [1, 1, 2]
    assert sorted(asked.media) == [2, 2] and sorted(asked.widths) == [40, 40, 40, 80]
    assert found.frames == [3] and found.seconds == [1.5] and sorted(found.heights) == [8, 30, 60]
    assert sorted(found.rewrite_letters) == [1, 11] and sorted(task.hard_negatives) == [0, 0, 0, 0, 0, 1]


def test_a_sample_of_the_pairs_is_chosen_by_the_seed(scenes_corpus: Path) -> None:
    first, same, other = (inspect_corpus(scenes_corpus, ["train"], 3, 3, seed)["train"] for seed in (0, 0, 1))
    keys = [[pair.key for pair in shown_pairs(tasks, 4)] for tasks in (first, same, other)]
    assert keys[0] == keys[1] != keys[2] and len(keys[0]) == 4
    assert len({pair.dataset for pair in shown_pairs(first, 4)}) == min(4, len(first))  # by turns
    assert all(task.read == min(3, task.pairs) for task in first.values())
    everything = read_pairs(scenes_corpus, "train")
    assert sum(task.pairs for task in first.values()) == len(everything)
    for name, task in first.items():
        assert task.contents == len({pair.target.content_id for pair in everything if pair.dataset == name})


def test_broken_samples_are_counted_by_name(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = corpus / "train" / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = opened.getmember("several.q1.png")
        data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(data)
    words = ["shards", "inspect", "--corpus", str(corpus), "--output", str(tmp_path / "sheet.png")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "1 of 6 pairs that were read is broken" in said
        and "train-000000.tar/several: field 'query.media'" in said
    )


def test_the_tables_and_the_sheet(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "inspect", "--corpus", str(corpus), "--pairs", "4", "--samples", "5", "--seed", "3"]
    assert main([*words, "--output", str(tmp_path / "sheet.png")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Read were 5 pairs of each task and split, or all if there are fewer; seed 3." in said
    assert f"contact sheet: {tmp_path / 'sheet.png'}" in said
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.mode == "RGB" and sheet.height > 4 * 40
    assert main([*words, "--output", str(tmp_path / "sheets")]) == 0
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["train.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "trian"), "--split trian: .* has only train"),
        (("--samples", "0"), "--samples must be 1 or more, but is 0"),
        (("--pairs", "-1"), "--pairs must be 1 or more, but is -1"),
        (("--output", "sheet.txt"), "--output must be a picture, such as inspect.png, or a folder"),
    ],
)
def test_what_is_refused(
    corpus: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "inspect", "--corpus", str(corpus), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_tokens_are_those_of_the_base_model(
    corpus: Path, micro_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "inspect", "--corpus", str(corpus), "--output", str(tmp_path / "sheet.png")]
    assert main([*words, "--base", str(micro_base)]) == 0
    assert "tokens:" in capsys.readouterr().out


def test_nothing_leaves_its_frame() -> None:
    """Long texts, wide and tall pictures: beside the frames, a sheet is as empty as with short texts."""

    def sheet(text: str, media: tuple[Image.Image, ...]) -> Image.Image:
        item = Item(text, media, "a", text, text)
        return contact_sheet([Section("split train", [Pair("k", "t", "g", item, item)])], "corpus")

    long = sheet("wwwwwwwwww" * 90, (picture(900, 5), picture(5, 900), picture()))
    width = long.width
    edges = [*range(0, 14), *range(14 + 621, 28 + 620), *range(width - 13, width)]
    columns = [long.crop((x, 100, x + 1, long.height)).getcolors() for x in edges]
    assert all(
        colours is not None and {colour for _, colour in colours} == {(255, 255, 255)} for colours in columns
    )


def test_media_in_words() -> None:
    assert what([CLIP]) == "clip, 0.0 to 1.5 s"
    assert what([picture(), Page(picture()), Page(picture())]) == "picture + 2 pages"
    assert what([]) == ""


def test_a_text_without_spaces_is_broken_into_lines() -> None:
    used = font(13)
    lines = wrapped("x" * 200, used, 100, 50)
    assert "".join(lines) == "x" * 200 and all(used.getlength(line) <= 100 for line in lines)
    assert len(wrapped("x" * 200, used, 100, 2)) == 2 and wrapped("x" * 200, used, 100, 2)[1].endswith("…")


def test_letters_that_no_font_has_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rime_pl.report.drawing._other_fonts", lambda: [])
    assert missing_letters(["plain", "Ünïcödé", "Кот", "line\nbreak"]) == ""
    assert missing_letters(["赤い circle", "赤"]) == "い赤"
