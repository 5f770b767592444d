"""What is written: a corpus and a table that our own readers read, and never in the place of another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.builders.table import read_table
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.errors import RimeError
from rime_pl.teacher.cache import Answer
from rime_pl.teacher.gains import Gains
from rime_pl.teacher.jobs import Jobs
from rime_pl.teacher.sources import CorpusSource, TableSource
from rime_pl.teacher.writing import refuse_output, write_new_corpus, write_new_table, write_unwritten
from tests.teacher.pairs import SECRET, make_corpus, make_jobs, make_table, pair


def gains_of(source: Any, path: Path, **changes: Any) -> Gains:
    """As if a teacher had answered, but for the texts with a 2: these are too short."""
    jobs = make_jobs(source, path, **changes)
    jobs.look()
    for key, job in jobs.jobs.items():
        item = source.read(job.number)
        text = item.query.text if job.side == "query" else item.target.text
        jobs.answers.known[key] = Answer(
            "Short." if "2" in text else f'"{job.side}", one said, of {job.number}.'
        )
    jobs.answers.close()
    jobs = Jobs(jobs.order, source, jobs.answers)
    jobs.look()
    return Gains(jobs)


def test_a_corpus_is_the_same_but_for_its_rewrites(tmp_path: Path) -> None:
    original = make_corpus(tmp_path / "data", 6)
    source = CorpusSource(original)
    gains = gains_of(source, tmp_path)
    write_new_corpus(source, gains, tmp_path / "new")
    before, after = read_corpus(original), read_corpus(tmp_path / "new")
    assert {name: after[name] for name in ("name", "licence", "seed")} == {
        name: before[name] for name in ("name", "licence", "seed")
    }
    assert after["arguments"] == {
        "a": 1,
        "rewrites": {
            "way": "write",
            "sides": ["query", "target"],
            "corpus": before["data_hash"],
            "model": "teacher",
            "prompts": after["arguments"]["rewrites"]["prompts"],
        },
    }
    for split in ("train", "val", "test", "distractors"):
        old, new = read_split(original, split), read_split(tmp_path / "new", split)
        assert [entry.key for entry in old] == [entry.key for entry in new]
        for n, (a, b) in enumerate(zip(old, new, strict=True)):
            short = split == "train" and n == 2
            given = split != "distractors" and not short
            assert b.has_rewrite == (given, given)
            one, other = ShardReader(old).read(n), ShardReader(new).read(n)
            if given:
                assert other.query and str(other.query.rewrite).startswith('"query", one said')
            assert (one.target.text, one.target.content_id) == (other.target.text, other.target.content_id)
            for member in a.members:
                if member != "json":  # pictures keep their bytes
                    (start, size), (begin, length) = a.members[member], b.members[member]
                    whole = b.shard.read_bytes()[begin : begin + length]
                    assert a.shard.read_bytes()[start : start + size] == whole
    assert not list(original.glob("*.txt")), "the original is as it was"


def test_a_sample_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    original = make_corpus(tmp_path / "data", 6)
    entry = read_split(original, "train")[1]
    start, size = entry.members["q0.png"]
    data = bytearray(entry.shard.read_bytes())
    data[start : start + size] = b"x" * size
    entry.shard.write_bytes(data)
    source = CorpusSource(original)
    gains = gains_of(source, tmp_path, max_failed_share=0.5)
    write_new_corpus(source, gains, tmp_path / "new")
    assert [each.key for each in read_split(tmp_path / "new", "train")] == [
        f"pair-{n:04d}" for n in range(6) if n != 1
    ]
    assert "train-000000.tar/pair-0001" in (tmp_path / "new/broken.txt").read_text()
    lines = write_unwritten(gains, tmp_path / "new")
    listed = (tmp_path / "new.unwritten.txt").read_text().splitlines()
    assert lines == len(listed) == 3
    assert listed[0].startswith("train-000000.tar/pair-0002 (query): dropped: length: 1 words")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_is_the_same_but_for_its_rewrites(tmp_path: Path, suffix: str) -> None:
    table = make_table(tmp_path / "in", 4, split="train", target_cot="a;b")
    if suffix == ".jsonl":
        rows = [row.values for row in read_table(table).rows]
        for row in rows:
            row["query_image"] = [row["query_image"]]
        table = table.with_suffix(suffix)
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TableSource(table)
    gains = gains_of(source, tmp_path)
    output = table.with_name(f"new{suffix}")
    done: list[None] = []
    write_new_table(source, gains, output, lambda: done.append(None))
    before, after = read_table(table), read_table(output)
    assert not after.faults and len(after.rows) == len(done) == 4
    for number, (old, new) in enumerate(zip(before.rows, after.rows, strict=True)):
        given = dict(new.values)
        rewrites = [given.pop(f"{side}_rewrite", "") for side in ("query", "target")]
        assert {name: value for name, value in given.items() if value} == old.values
        assert old.files == new.files and new.pair.query and old.pair.query
        assert new.pair.query.content_id == old.pair.query.content_id
        assert rewrites == (
            ["", ""] if number == 2 else [f'"{s}", one said, of {number}.' for s in ("query", "target")]
        )
        assert new.pair.target.rewrite == (rewrites[1] or None)
    assert not list(tmp_path.rglob("*.half"))


def test_a_table_with_rewrites_becomes_a_corpus(tmp_path: Path) -> None:
    table = make_table(tmp_path / "in", 30)
    source = TableSource(table)
    write_new_table(source, gains_of(source, tmp_path), tmp_path / "in/new.csv", lambda: None)
    folder.build(tmp_path / "corpus", table=tmp_path / "in/new.csv", val_share=0.2, test_share=0.2)
    annotated = [
        entry.has_rewrite
        for split in ("train", "val", "test")
        for entry in read_split(tmp_path / "corpus", split)
    ]
    assert len(annotated) == 30 and annotated.count((True, True)) == 30 - len(
        [n for n in range(30) if "2" in str(n)]
    )


def test_faulty_rows_and_unknown_splits_are_refused(tmp_path: Path) -> None:
    table = make_table(tmp_path, 2)
    (tmp_path / "1.png").unlink()
    with pytest.raises(RimeError, match=r"(?s)Every row of .*must be usable.*1.png.*rime shards check"):
        TableSource(table)
    with pytest.raises(RimeError, match=r"--splits must name some of .*'tset'"):
        TableSource(table, None, ["tset"])
    corpus = make_corpus(tmp_path / "data", 2)
    with pytest.raises(RimeError, match=r"--splits must name splits of .*'tset'"):
        CorpusSource(corpus, ["tset"])
    with pytest.raises(RimeError, match="must not name 'distractors'"):
        CorpusSource(corpus, ["distractors"])


def test_only_the_splits_that_are_named(tmp_path: Path) -> None:
    source = CorpusSource(make_corpus(tmp_path / "data", 2), ["val"])
    assert [source.name(n) for n in range(len(source)) if source.is_asked(n)] == ["val-000000.tar/pair-0800"]


def test_outputs_that_would_harm_something(tmp_path: Path) -> None:
    corpus, table = make_corpus(tmp_path / "data", 2), make_table(tmp_path / "in", 1)
    (tmp_path / "in/old.csv").write_text("mine")
    for output, source, message in (
        (corpus, corpus, "must be another place than the input"),
        (corpus / "new", corpus, "hold each other"),
        (tmp_path, corpus, "hold each other"),
        (table, table, "must be another place than the input"),
        (tmp_path / "in/old.csv", table, "must be a new file, but"),
        (tmp_path / "new", table, "must end in .csv, like the table"),
        (tmp_path / "new.jsonl", table, "must end in .csv, like the table"),
    ):
        with pytest.raises(RimeError, match=message):
            refuse_output(output, source)
    refuse_output(tmp_path / "new", corpus)
    refuse_output(tmp_path / "in/new.csv", table)


def test_the_list_of_sides_without_a_rewrite_goes_when_all_have_one(tmp_path: Path) -> None:
    (tmp_path / "new.unwritten.txt").write_text("old")
    source = TableSource(make_table(tmp_path / "in", 2))
    assert write_unwritten(gains_of(source, tmp_path), tmp_path / "new") == 0
    assert not (tmp_path / "new.unwritten.txt").exists()
    assert SECRET in pair(0).target.text
