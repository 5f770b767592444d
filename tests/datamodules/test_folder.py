"""Your own data: a table and pictures become a corpus; all faults are told at once, with line and field."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colour_corpus import colour
from dirty_pictures import bad_files, good_files, write_files

from rime_pl.__main__ import main
from rime_pl.commands import shards
from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.builders.table import COLUMNS, read_table
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.media import open_picture
from rime_pl.options.parser import options_of
from rime_pl.types import Item, Pair

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Twelve pairs in three splits, two of them with the same target picture."""
    (tmp_path / "media").mkdir()
    for number in range(12):
        colour(number * 20).save(tmp_path / "media" / f"{number}.{'jpg' if number % 2 else 'png'}")
    return [
        {
            "query_text": f"colour {number}",
            "query_rewrite": f"It is {number}.",
            "target_image": f"{number}.{'jpg' if number % 2 else 'png'}",
            "target_rewrite": f"One sees {number}.",
            "split": ("train", "val", "test")[number % 3],
        }
        for number in range(12)
    ]


def write_table(tmp_path: Path, rows: Rows, kind: str = "jsonl") -> Path:
    table = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(json.dumps(row) for row in rows))
        return table
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
    return table


def build(tmp_path: Path, rows: Rows, kind: str = "jsonl", **settings: Any) -> dict[str, list[Pair]]:
    folder.build(
        tmp_path / "corpus", table=write_table(tmp_path, rows, kind), media=tmp_path / "media", **settings
    )
    found = {}
    for split in read_corpus(tmp_path / "corpus")["splits"]:
        reader = ShardReader(read_split(tmp_path / "corpus", split))
        found[split] = [reader.read(index) for index in range(len(reader))]
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_becomes_a_corpus(tmp_path: Path, rows: Rows, kind: str) -> None:
    found = build(tmp_path, rows, kind)
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 4, "val": 4, "test": 4}
    pair = found["val"][0]
    assert pair.dataset == "pairs" and pair.gallery == "pictures"
    assert pair.query is not None and pair.query.text == "colour 1" and pair.query.rewrite == "It is 1."
    assert pair.target.rewrite == "One sees 1." and pair.target.media[0].size == colour(20).size
    assert pair.query.content_id == pair.target.content_id


def test_all_columns(tmp_path: Path, rows: Rows) -> None:
    rows[0] |= {
        "query_image": ["1.jpg", "2.png"],
        "query_instruction": "Find.",
        "query_cot": "Think. It is 0.",
        "query_content_id": "q",
        "target_text": "words",
        "target_instruction": "Show.",
        "target_content_id": "t",
        "task": "mixed",
        "gallery": "all",
    }
    pair = build(tmp_path, rows)["train"][0]
    assert pair.query is not None and len(pair.query.media) == 2
    assert (pair.dataset, pair.gallery, pair.query.content_id, pair.target.content_id) == (
        "mixed",
        "all",
        "q",
        "t",
    )
    assert pair.query.cot == "Think. It is 0." and pair.target == Item(
        "words", pair.target.media, "t", "Show.", "One sees 0."
    )


def test_several_pictures_in_a_csv_cell(tmp_path: Path, rows: Rows) -> None:
    rows[0]["query_image"] = "1.jpg; 2.png"
    query = build(tmp_path, rows, "csv")["train"][0].query
    assert query is not None and len(query.media) == 2


def test_rows_without_query_are_distractors(tmp_path: Path, rows: Rows) -> None:
    found = build(tmp_path, [*rows, {"target_image": "0.png", "split": "distractors"}])
    assert [pair.query for pair in found["distractors"]] == [None]


def test_split_by_hash_keeps_a_content_in_one_split(tmp_path: Path) -> None:
    rows = [
        {"query_text": f"question {n}", "target_text": "-", "target_content_id": f"answer {n % 40}"}
        for n in range(200)
    ]
    found = build(tmp_path, rows, val_share=0.2, test_share=0.2)
    contents = {split: {pair.target.content_id for pair in pairs} for split, pairs in found.items()}
    assert sum(map(len, contents.values())) == 40
    assert all(2 <= len(contents[split]) <= 16 for split in ("val", "test"))
    again = build(tmp_path, rows, val_share=0.2, test_share=0.2, seed=1)
    assert {pair.target.content_id for pair in again["test"]} != contents["test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_image": "gone.png"}, r"line 3: field 'target_image': file .*gone.png does not exist"),
        (
            {"target_image": None},
            r"line 3: field 'target_text' or 'target_image' must have a value, but both are empty",
        ),
        ({"query_text": ""}, r"line 3: field 'query_text' or 'query_image' must have a value"),
        ({"query_rewrite": 7}, r"line 3: field 'query_rewrite' must be a string, but is 7"),
        (
            {"split": "dev"},
            r"line 3: field 'split' must be one of \['train', 'val', 'test', 'distractors'\], but is 'dev'",
        ),
        (
            {"querytext": "typo"},
            r"line 3: columns \['querytext'\] are unknown. Known are \['query_text'",
        ),
        (
            {"target_image": "text.png"},
            r"line 3: field 'target_image': .*text.png must be a picture, but its format is not known",
        ),
    ],
)
def test_faulty_line(tmp_path: Path, rows: Rows, change: dict[str, Any], message: str) -> None:
    (tmp_path / "media" / "text.png").write_text("not a picture")
    rows[2] |= change
    with pytest.raises(DataError, match=rf"pairs.jsonl {message}"):
        build(tmp_path, rows)
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def test_missing_column_of_a_csv_names_the_first_line(tmp_path: Path, rows: Rows) -> None:
    for row in rows:
        del row["target_image"]
    with pytest.raises(DataError, match=r"pairs.csv line 2: field 'target_text' or 'target_image'"):
        build(tmp_path, rows, "csv")


def test_malformed_jsonl(tmp_path: Path) -> None:
    table = tmp_path / "pairs.jsonl"
    table.write_text('{"query_text": "a", "target_text": "b"}\n{"query_text"')
    with pytest.raises(DataError, match=r"pairs.jsonl line 2: malformed JSON"):
        folder.build(tmp_path / "corpus", table=table)


def test_missing_empty_and_unknown_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a CSV or JSONL file, but .*none.csv does not exist"):
        folder.build(tmp_path / "corpus", table=tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("query_text,target_text\n")
    with pytest.raises(DataError, match=r"--table must have rows, but .*empty.csv has none"):
        folder.build(tmp_path / "corpus", table=tmp_path / "empty.csv")
    (tmp_path / "pairs.xlsx").write_text("")
    with pytest.raises(DataError, match=r"must end in .csv or .jsonl, but .*pairs.xlsx ends in '.xlsx'"):
        folder.build(tmp_path / "corpus", table=tmp_path / "pairs.xlsx")


def test_a_split_without_rows(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(RimeError, match=r"split 'val' must have rows, but has none"):
        build(tmp_path, [row for row in rows if row["split"] != "val"])


def test_a_corpus_for_evaluation_only(tmp_path: Path, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    found = build(tmp_path, [row for row in rows if row["split"] == "test"])
    assert {split: len(pairs) for split, pairs in found.items()} == {"test": 4}
    told = capsys.readouterr().out
    assert told.count("pairs.jsonl has no rows for train and val: the corpus can be evaluated") == 1
    bare = [{name: value for name, value in row.items() if name != "split"} for row in rows]
    assert list(build(tmp_path, bare, val_share=0, test_share=1)) == ["test"]


def test_shares_beyond_one(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(RimeError, match=r"add up to at most 1, but are 0.5 and 0.6"):
        build(tmp_path, rows, val_share=0.5, test_share=0.6)


# -- several faults ------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path, rows: Rows) -> Rows:
    """Four faults in three of twelve rows: lines 2, 5 and 10."""
    (tmp_path / "media" / "0.png").write_bytes(bad_files()["half.png"])
    rows[3] |= {"target_image": "gone.png", "split": "dev"}
    rows[8] |= {"query_text": " "}
    return rows


def test_all_faults_are_told_at_once(tmp_path: Path, faulty: Rows) -> None:
    with pytest.raises(DataError) as caught:
        build(tmp_path, faulty)
    told = str(caught.value)
    assert re.search(r"3 rows of .*pairs.jsonl cannot be used, so nothing was built:\n", told)
    assert re.search(r"pairs.jsonl line 1: field 'target_image': .*0.png is cut off", told)
    assert re.search(r"pairs.jsonl line 4: field 'target_image': file .*gone.png does not exist", told)
    assert "pairs.jsonl line 4: field 'split' must be one of" in told
    assert "pairs.jsonl line 9: field 'query_text' or 'query_image' must have a value" in told
    assert "By kind: 1 x missing file, 1 x unknown split, 1 x no query, 1 x unusable picture." in told
    assert "--skip_broken" in told
    assert [path.name for path in tmp_path.iterdir() if "corpus" in path.name] == []


def test_many_faults_are_counted_and_not_all_shown(tmp_path: Path, rows: Rows) -> None:
    more = [{"query_text": "q", "target_image": f"gone{n}.png"} for n in range(40)]
    with pytest.raises(DataError, match=r"\.\.\. and 20 more\nBy kind: 40 x missing file\.") as caught:
        build(tmp_path, [*rows, *more])
    assert len(str(caught.value).splitlines()) == 24


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("A.PNG", "does not exist, but 'a.png' does"),
        ("pictures", "is a folder. Name a picture in it."),
        ("https://example.org/a.png", "is an address. Download the picture."),
        ("gone.png", "does not exist. Check --media."),
    ],
)
def test_why_a_name_leads_to_no_file(name: str, says: str, tmp_path: Path, rows: Rows) -> None:
    (tmp_path / "media" / "pictures").mkdir()
    colour(1).save(tmp_path / "media" / "a.png")
    with pytest.raises(DataError, match=re.escape(says)):
        build(tmp_path, [*rows, {"query_text": "q", "target_image": name}])


def test_if_no_good_row_is_left_the_others_are_listed(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    rows = [{"query_text": "q", "target_image": f"gone{number}.png"} for number in range(3)]
    with pytest.raises(RimeError, match=r"none \(train 0, val 0, (.*\n)+.*gone0.*\n.*gone1.*\n.*gone2"):
        build(tmp_path, rows, skip_broken=True)


def test_broken_rows_are_left_out_and_listed(
    tmp_path: Path, faulty: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    found = build(tmp_path, faulty, skip_broken=True)
    assert {split: len(pairs) for split, pairs in found.items()} == {"train": 2, "val": 4, "test": 3}
    lines = (tmp_path / "corpus" / "broken.txt").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith("pairs.jsonl line ") for line in lines)
    numbers = [int(line.split(":")[0].removeprefix("pairs.jsonl line ")) for line in lines]
    assert numbers == sorted(numbers)
    told = capsys.readouterr().out
    assert "3 rows were left out" in told and lines[0] in told
    assert build(tmp_path, faulty, skip_broken=True)  # broken.txt is ours: the corpus can be replaced


def test_a_split_may_lose_all_its_rows_only_if_it_is_not_needed(tmp_path: Path, rows: Rows) -> None:
    for row in rows:
        if row["split"] == "val":
            row["target_image"] = "words.png"
    (tmp_path / "media" / "words.png").write_text("no picture")
    with pytest.raises(RimeError, match=r"split 'val' must have rows, but has none"):
        build(tmp_path, rows, skip_broken=True)
    assert not (tmp_path / "corpus").exists()
    distractor = {"target_image": "words.png", "split": "distractors"}
    rest = [row for row in rows if row["split"] != "val"]
    rest += [{**row, "split": "val", "query_text": "other"} for row in rest[:2]]
    assert "distractors" not in build(tmp_path, [*rest, distractor], skip_broken=True)


def test_a_faulty_table_leaves_the_corpus_that_was_there(tmp_path: Path, rows: Rows) -> None:
    build(tmp_path, rows)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "corpus").rglob("*")) if path.is_file()}
    rows[5]["target_image"] = "gone.png"
    with pytest.raises(DataError):
        build(tmp_path, rows)
    assert before == {
        path: path.read_bytes() for path in sorted((tmp_path / "corpus").rglob("*")) if path.is_file()
    }
    assert not list(tmp_path.glob(".corpus*"))


# -- pictures ------------------------------------------------------------------------------------------


def test_the_corpus_holds_what_a_person_sees(tmp_path: Path, rows: Rows) -> None:
    files = {name: data for name, data in good_files().items() if name != "large.png"}
    write_files(tmp_path / "media", files)
    rows += [
        {"query_text": name, "target_image": name, "target_content_id": name, "split": "train"}
        for name in files
    ]
    build(tmp_path, rows)
    reader = ShardReader(read_split(tmp_path / "corpus", "train"))
    kept = []
    for number, entry in enumerate(reader.entries[4:], 4):
        pair = reader.read(number)
        assert pair.query is not None
        name = pair.query.text
        member = next(member for member in entry.members if member.startswith("t0"))
        offset, size = entry.members[member]
        stored = entry.shard.read_bytes()[offset : offset + size]
        if stored == files[name]:
            kept.append(name)
        seen = open_picture(files[name])
        assert pair.target.media[0].size == seen.size
        difference = np.abs(np.asarray(pair.target.media[0], int) - np.asarray(seen, int))
        assert difference.mean() < 2, name
        lossless = member.endswith("png") or stored == files[name]
        assert difference.max() == 0 or not lossless, name
    assert sorted(kept) == ["grey.jpg", "pixel.png", "plain.jpg", "plain.png"]


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_a_picture_that_cannot_be_used_is_refused_by_line(tmp_path: Path, rows: Rows, name: str) -> None:
    write_files(tmp_path / "media", {name: bad_files()[name]})
    rows[2]["target_image"] = name
    hint = {"phone.heic": "pip install pillow-heif", "line.png": "Crop it", "empty.jpg": "file is empty"}
    expected = rf"^pairs.csv line 4: field 'target_image': .*{name}.*{hint.get(name, '')}"
    with pytest.raises(DataError, match=expected):
        build(tmp_path, rows, "csv")


def test_command_line(tmp_path: Path, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, rows)
    options = ["--table", str(table), "--media", str(tmp_path / "media"), "--output", str(tmp_path / "out")]
    assert main(["shards", "folder", *options, "--licence", "mine"]) == 0
    assert read_corpus(tmp_path / "out")["licence"] == "mine"
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("builder", sorted(shards.SUBCOMMANDS))
def test_help_of_every_builder_explains_every_option(
    builder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["shards", builder, "--help"])
    told = capsys.readouterr().out
    for name in options_of(shards.SUBCOMMANDS[builder]):
        assert re.search(rf"--{name} .*\n? +\w", told), name


def test_the_how_to_names_every_column_and_its_example_is_a_valid_table(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "your-own-data.md").read_text()
    assert all(f"`{column}`" in page for column in COLUMNS)
    example = page.split("```csv\n")[1].split("```")[0]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(line.strip() for line in example.strip().splitlines()))
    (tmp_path / "mugs").mkdir()
    colour(1).save(tmp_path / "mugs" / "017.jpg")
    (row,) = read_table(table).rows
    assert row.pair.query is not None and row.pair.query.rewrite == "A red mug, its rim chipped."
    assert row.where == "pairs.csv line 2" and row.pair.target.content_id == "mug 17"
