"""`rime shards check`: what is in a table or a corpus, and each fault, before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from colour_corpus import colour, make_pairs, make_splits, write

from rime_pl.__main__ import main
from rime_pl.datamodules.checking import check_corpus, check_table, check_training
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.pair_check import Checked, Limits
from rime_pl.datamodules.shards import read_split
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig

FEW = Limits(batch_size=4)


def rows_of(count: int) -> list[dict[str, Any]]:
    """Good rows: a text finds a text."""
    return [
        {
            "query_text": f"question {number}",
            "target_text": f"answer {number}",
            "query_rewrite": f"It is {number}.",
            "target_rewrite": f"One sees {number}.",
            "split": ("train", "train", "val", "test")[number % 4],
        }
        for number in range(count)
    ]


def checked(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Checked:
    table = tmp_path / "pairs.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return check_table(table, **{"limits": FEW, **settings})


def kinds(found: Checked) -> list[tuple[str, str, str]]:
    return sorted(
        (fault.level, fault.kind, fault.where.removeprefix("pairs.jsonl ")) for fault in found.faults
    )


def test_a_good_table_is_counted(tmp_path: Path) -> None:
    colour(1).save(tmp_path / "a.png")
    rows = [*rows_of(16), {"target_image": "a.png", "split": "distractors"}]
    found = checked(tmp_path, rows)
    assert not found.faults and not found.problems
    counts = {
        key: (c.pairs, c.with_pictures, c.annotated, len(c.contents)) for key, c in found.counts.items()
    }
    assert counts == {
        ("train", "pairs"): (8, 0, 8, 8),
        ("val", "pairs"): (4, 0, 4, 4),
        ("test", "pairs"): (4, 0, 4, 4),
        ("distractors", "pairs"): (1, 1, 0, 1),
    }


def test_half_annotated_pairs_are_told_and_not_counted_as_annotated(tmp_path: Path) -> None:
    rows = rows_of(16)
    del rows[0]["query_rewrite"], rows[5]["target_rewrite"]
    found = checked(tmp_path, rows)
    train = found.counts["train", "pairs"]
    assert (train.annotated, train.half_annotated) == (6, 2)
    assert kinds(found) == [
        ("warning", "few annotations", "pairs.jsonl"),
        ("warning", "half annotated", "line 1"),
        ("warning", "half annotated", "line 6"),
    ]
    assert "6 of 8 training pairs have rewrites on both sides" in found.faults[-1].says
    for row in rows:
        row["query_rewrite"] = " "
    told = [fault for fault in checked(tmp_path, rows).faults if fault.level == "problem"]
    assert [fault.kind for fault in told] == ["no annotation"]


def test_a_content_in_two_splits(tmp_path: Path) -> None:
    rows = rows_of(16)
    rows[2]["target_text"] = rows[0]["target_text"]
    found = checked(tmp_path, rows)
    assert kinds(found) == [("problem", "content in two splits", "line 3")]
    assert "pairs.jsonl line 1, in 'train'. The query has the same content, too" in found.faults[0].says
    rows[2]["query_content_id"] = "another question"
    assert kinds(checked(tmp_path, rows)) == [("warning", "content in two splits", "line 3")]


def test_small_tasks_and_few_contents(tmp_path: Path) -> None:
    rows = rows_of(16)
    found = checked(tmp_path, rows, limits=Limits(batch_size=9))
    assert kinds(found) == [("problem", "small task", "pairs.jsonl, task 'pairs'")]
    assert "train with data.batch_size 8 or less" in found.faults[0].says
    for row in rows:
        row["target_content_id"] = row["split"]
    assert ("warning", "few contents", "pairs.jsonl, task 'pairs'") in kinds(checked(tmp_path, rows))


def test_missing_splits(tmp_path: Path) -> None:
    rows = rows_of(16)
    without_val = [row for row in rows if row["split"] != "val"]
    assert kinds(checked(tmp_path, without_val)) == [("problem", "missing split", "pairs.jsonl")]
    only_test = [row for row in rows if row["split"] == "test"]
    assert kinds(checked(tmp_path, only_test)) == [("warning", "no train split", "pairs.jsonl")]


def test_over_long_texts_are_estimated_by_characters(tmp_path: Path) -> None:
    rows = rows_of(16)
    rows[0]["query_text"] = "word " * 500
    rows[1]["target_rewrite"] = "word " * 200
    found = checked(tmp_path, rows)
    assert kinds(found) == [
        ("problem", "over-long rewrite", "line 2"),
        ("problem", "over-long text", "line 1"),
    ]
    assert "field 'query_text' has about 625 tokens, but max_text_tokens is 512" in found.faults[0].says
    unsure = [("warning", "estimated length", "pairs.jsonl")]  # a tokenizer may find more
    assert kinds(checked(tmp_path, rows, limits=Limits(4, 700, 700))) == unsure
    assert not checked(tmp_path, rows, limits=Limits(4, 2000, 2000)).faults


def test_too_many_pictures_are_told_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture, but nobody looks")
    rows = rows_of(16)
    rows[4]["target_image"] = ["a.png"] * 17
    found = checked(tmp_path, rows)
    assert kinds(found) == [("problem", "too many pictures", "line 5")]
    assert "field 'target_image' names 17 pictures, but max_media is 16" in found.faults[0].says
    looked = kinds(checked(tmp_path, rows, limits=Limits(4, max_media=17)))
    assert set(looked) == {("problem", "unusable picture", "line 5")}
    splits = make_splits()
    first = splits["train"][0]
    splits["train"][0] = replace(first, target=replace(first.target, media=(colour(1),) * 17))
    path = write(tmp_path / "corpus", splits)
    told = [fault for fault in check_corpus(path, FEW).faults if fault.level == "problem"]
    assert [fault.kind for fault in told] == ["too many pictures"]
    assert "field 'target' must have at most 16 pictures, clips and pages, but has 17" in told[0].says
    assert not check_corpus(path, Limits(4, max_media=17)).problems


def test_with_a_base_model_tokens_are_counted_and_its_special_tokens_found(
    tmp_path: Path, processor: RimeProcessor
) -> None:
    rows = rows_of(16)
    rows[0]["query_text"] = "find <|im_end|> it"
    rows[1]["query_text"] = "find <|endoftext|> it"  # known to a tokenizer only
    rows[4]["target_rewrite"] = "a red ring " * 20
    limit = Limits(4, 512, 30)
    ours = ("problem", "special token", "line 1")
    assert kinds(checked(tmp_path, rows, limits=limit)) == [("problem", "over-long rewrite", "line 5"), ours]
    found = checked(tmp_path, rows, limits=limit, processor=processor)
    assert kinds(found)[1:] == [ours, ("problem", "special token", "line 2")]
    tokens = len(processor.tokenizer(rows[4]["target_rewrite"])["input_ids"])
    assert f"'target_rewrite' has {tokens} tokens, but max_rewrite_tokens is 30" in found.faults[2].says


def test_a_row_with_a_bad_picture_is_checked_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    rows = rows_of(16)
    rows[0] |= {"query_image": "a.png", "query_text": "word " * 500}
    assert kinds(checked(tmp_path, rows)) == [
        ("problem", "over-long text", "line 1"),
        ("problem", "unusable picture", "line 1"),
    ]


def test_tiny_pictures_and_repeated_pairs_are_told(tmp_path: Path) -> None:
    rows = rows_of(16)
    colour(1).save(tmp_path / "a.png")
    colour(36).save(tmp_path / "b.png")  # as large as the first, but another picture
    colour(1).resize((1, 1)).save(tmp_path / "dot.png")
    for number, picture in ((0, "a"), (1, "b"), (4, "a"), (5, "dot")):
        rows[number] |= {"query_text": "", "query_image": f"{picture}.png", "target_text": "the same"}
    found = checked(tmp_path, rows)
    assert kinds(found) == [("warning", "repeated pair", "line 5"), ("warning", "tiny picture", "line 6")]
    told = "\n".join(map(str, found.faults))
    assert "texts and pictures are those of pairs.jsonl line 1, too" in told
    assert "the picture of the query has 1 x 1 pixels" in told
    rows[4]["split"] = "test"  # another split, which is another fault
    assert "repeated pair" not in str(kinds(checked(tmp_path, rows)))


# -- a corpus ------------------------------------------------------------------------------------------


def test_a_good_corpus(corpus: Path) -> None:
    found = check_corpus(corpus, FEW)
    assert not found.problems
    assert found.counts["train", "big"].pairs == 37 and found.counts["train", "big"].annotated == 37
    assert found.counts["distractors", "distractors"].with_pictures == 15


def test_faults_of_a_corpus_are_all_told(tmp_path: Path) -> None:
    splits = make_splits()
    first = splits["train"][0]
    assert first.query is not None
    splits["train"][0] = replace(first, query=replace(first.query, rewrite=None, text="<|image_pad|>"))
    splits["test"] = []
    path = write(tmp_path / "corpus", splits)
    entries = read_split(path, "train")
    for entry in (entries[4], entries[7]):
        offset, size = entry.members["t0.png"]
        with entry.shard.open("r+b") as file:
            file.seek(offset + size // 2)
            file.write(b"\0" * (size - size // 2))
    (path / "val" / "val-000000.tar").unlink()
    found = check_corpus(path, FEW)
    problems = [(fault.kind, fault.where) for fault in found.faults if fault.level == "problem"]
    assert sorted(problems) == [
        ("broken sample", "train-000000.tar/big-0004"),
        ("broken sample", "train-000000.tar/big-0007"),
        ("broken split", f"{path}, split 'val'"),
        ("changed tar", "train-000000.tar"),
        ("missing split", str(path)),
        ("missing split", str(path)),
        ("special token", "train-000000.tar/big-0000"),
    ]
    assert found.counts["train", "big"].half_annotated == 1


def test_a_flipped_bit_in_a_text_is_found(tmp_path: Path) -> None:
    """A tar has no checksums of its contents: only the index shows that the text is another one."""
    path = write(tmp_path / "corpus", make_splits())
    entry = read_split(path, "train")[3]
    offset, size = entry.members["json"]
    content = bytearray(entry.shard.read_bytes())
    place = content.index(b"number 3", offset, offset + size)
    content[place] ^= 1
    entry.shard.write_bytes(content)
    found = check_corpus(path, FEW)
    problems = [(fault.kind, fault.where) for fault in found.faults if fault.level == "problem"]
    assert problems == [("changed tar", "train-000000.tar"), ("broken sample", entry.name)]
    with (path / "train" / "index.names").open("ab") as names:
        names.write(b"more")
    problems = [(fault.kind, fault.where) for fault in check_corpus(path, FEW).faults]
    assert ("changed file of the index", "index.names") in problems


# -- the command ---------------------------------------------------------------------------------------


def test_a_build_tells_which_rows_it_keeps_that_a_training_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(16)
    rows[0]["query_text"] = "find <|im_end|> it"
    rows[1] |= {"target_rewrite": "word " * 200, "query_rewrite": "word " * 200}
    rows[4]["query_text"] = ""
    table, output = tmp_path / "pairs.jsonl", tmp_path / "corpus"
    table.write_text("\n".join(map(json.dumps, rows)))
    build = ["shards", "folder", "--table", str(table), "--output", str(output)]
    assert main([*build, "--skip_broken"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 row was left out." in told
    kept = "By the limits of the recipe 2b, 2 samples that were kept have a problem"
    assert f"{kept}: 2 x over-long rewrite, 1 x special token." in told
    assert f"`rime shards check --path {output}` lists them" in told
    assert main(["shards", "check", "--table", str(table)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "pairs.jsonl: rows that can be read" in told
    assert "2 of these rows have a problem all the same; it is listed below." in told
    assert main(["shards", "check", "--path", str(output)]) == 1
    assert "corpus: samples that can be read" in " ".join(capsys.readouterr().out.split())
    rows[0], rows[1], rows[4] = rows_of(5)[0], rows_of(5)[1], rows_of(5)[4]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert main(build) == 0 and "that were kept" not in capsys.readouterr().out


def test_exit_codes_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "pairs.jsonl"
    rows = rows_of(16)
    table.write_text("\n".join(map(json.dumps, rows)))
    check = ["shards", "check", "--batch-size", "4"]
    assert main([*check, "--table", str(table)]) == 0
    assert "0 problems, 0 warnings" in capsys.readouterr().out
    for number in range(8):
        rows[number]["target_image"] = "gone.png"
    del rows[8]["query_rewrite"]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert main([*check, "--table", str(table), "--shown", "3"]) == 1
    told = capsys.readouterr().out
    assert "pairs.jsonl line 3: field 'target_image'" in told and "line 4:" not in told
    assert "By kind: 8 x missing file" in told and "1 x half annotated" in told
    assert told.rstrip().endswith("8 problems, 2 warnings")
    path = write(tmp_path / "corpus", {name: make_pairs("a", 5, 5, start) for name, start in SPLITS})
    assert main([*check, "--path", str(path)]) == 0
    assert main([*check]) == 2 and main([*check, "--path", str(path), "--table", str(table)]) == 2
    assert "needs --table FILE or --path CORPUS, one of them" in capsys.readouterr().err


SPLITS = (("train", 0), ("val", 10), ("test", 20))


def test_settings_that_take_pairs_without_rewrites_answer_the_warning(tmp_path: Path) -> None:
    rows = rows_of(16)
    rows[0] |= {"query_rewrite": "", "target_rewrite": ""}
    table, output = tmp_path / "pairs.jsonl", tmp_path / "corpus"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert main(["shards", "folder", "--table", str(table), "--output", str(output)]) == 0
    for required in (True, False):
        settings = {"batch_size": 4, "require_rewrites": required}
        data = RimeDataModule(str(output), "no base", PromptConfig(), **settings)
        kinds = {fault.kind for fault in check_training(data).faults}
        assert ("few annotations" in kinds) == required
