"""From a dirty table of 55 rows to a corpus, as a new user would: check, leave out, build, read."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from dirty_pictures import bad_files, good_files, write_files

from rime_pl.__main__ import main
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split

CAPTION = " ".join(["a quiet picture of a harbour in the evening"] * 25)  # 225 words
COLUMNS = ("query_text", "target_image", "target_content_id", "query_rewrite", "target_rewrite", "split")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The options that name a table with semicolons, in Windows-1252, and its folder of pictures."""
    good, bad = good_files(), bad_files()
    write_files(tmp_path / "pictures", {**good, **bad})
    names = [*good, *bad, "gone.jpg"]  # 25
    small = [name for name in good if name != "large.png"]
    rows = []
    for number in range(55):
        name = names[number] if number < len(names) else small[number % len(small)]
        rewrites = [f"Das Bild {number}.", f"Zu sehen: {number}, sch\u00f6n."]
        if 30 <= number < 36:
            rewrites[number % 2] = ""  # half annotated
        text = CAPTION if number in (40, 41) else f"Bild {number},\nein zweiter Satz"
        split = "val" if number % 7 == 5 else "test" if number % 7 == 6 else "train"
        rows.append([text, name, f"content {number}", *rewrites, split])
    rows[44][5] = "dev"
    rows[45][0] = ""
    rows[46] = [""] * len(COLUMNS)
    rows[47][3] = CAPTION
    rows[48][2] = "content 49"  # rows[48] is for test, rows[49] for train
    rows[48][5] = "test"
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="cp1252") as file:
        csv.writer(file, delimiter=";").writerows([COLUMNS, *rows])
    return ["--table", str(tmp_path / "pairs.csv"), "--media", str(tmp_path / "pictures")]


def line(number: int) -> str:
    """The name of a row: most have a text of two lines, so row n begins below the lines before it."""
    one_line = [each for each in (40, 41, 45, 46) if each < number]
    first = 2 + 2 * number - len(one_line)
    return f"line {first}" if number in (40, 41, 45, 46) else f"lines {first} to {first + 1}"


def test_one_check_lists_every_fault_and_what_is_left_can_be_read(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["shards", "check", "--batch-size", "16", "--max-text-tokens", "256"]
    assert main([*check, *words]) == 1
    told = capsys.readouterr().out
    faults = re.findall(r"^pairs.csv (lines? .*?): ", told, re.M)
    bad = [*range(18, 25), 44, 45, 46]
    assert sorted(set(faults)) == sorted(line(n) for n in (*bad, 17, *range(30, 36), 40, 41, 47, 48, 50))
    assert sorted(", ".join(re.findall(r"By kind: (.*)\.", told)).split(", ")) == [
        "1 x content in two splits",
        "1 x empty row",
        "1 x few annotations",
        "1 x missing file",
        "1 x no query",
        "1 x over-long rewrite",
        "1 x unknown split",
        "2 x over-long text",
        "3 x tiny picture",
        "6 x half annotated",
        "6 x unusable picture",
    ]
    assert "read as Windows-1252" in told and "pip install pillow-heif" in told

    output = tmp_path / "mine"
    build = ["shards", "folder", *words, "--output", str(output)]
    assert main(build) == 2 and not output.exists()
    assert "10 rows of" in capsys.readouterr().err
    assert main([*build, "--skip_broken"]) == 0
    assert "10 rows were left out" in capsys.readouterr().out
    listed = (output / "broken.txt").read_text().splitlines()
    assert sorted(each.split(":")[0] for each in listed) == sorted(f"pairs.csv {line(n)}" for n in bad)

    sizes = set()
    for split, about in read_corpus(output)["splits"].items():
        reader = ShardReader(read_split(output, split))
        for number in range(about["samples"]):
            image = reader.read(number).target.media[0]
            assert image.mode == "RGB"
            sizes.add(image.size)
    assert {(1, 1), (8000, 6000), (20, 40), (24, 36)} <= sizes
    assert sum(about["samples"] for about in read_corpus(output)["splits"].values()) == 45

    assert main([*check, "--path", str(output)]) == 1  # the texts and the split are still to be repaired
    told = capsys.readouterr().out
    assert "4 problems" in told and "unusable" not in told and "broken" not in told
