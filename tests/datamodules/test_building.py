"""What all builders share: order, splits, refusals, threads, and going on after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_sources as tiny

from rime_pl.__main__ import main
from rime_pl.datamodules.builders import building, planning
from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import Expected, Settings, Source
from rime_pl.datamodules.builders.sources.drafts import Draft, Refused, identity, text_of
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.paths import picture_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.errors import RimeError, StoppedError
from rime_pl.types import Item

SHARES = Settings(val_share=0.2, test_share=0.2, workers=1)


class Notes(Source):
    """JSON lines of a text and a picture; what a builder of a data set has to bring."""

    name, licence, arguments = "notes", "CC0", {"kind": "plain"}

    def __init__(self, folder: Path, *names: str) -> None:
        self.media = folder
        self.files = [JsonFile(folder / name, name) for name in names or ("a.jsonl",)]
        self.expected = {name: Expected(40) for name in names or ("a.jsonl",)}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        return file.name

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft | Refused]:
        text, name = text_of(values, "text"), text_of(values, "picture")
        files = (picture_below(self.media, name),) if name else ()
        yield Draft("notes", "pictures", Item(text, (), identity(text)), Item("", (), name), (), files)


def write_notes(folder: Path, count: int = 40, pictures: int = 20, name: str = "a.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(pictures):
        tiny.save(folder / f"p{number}.png", number)
    rows = [
        {"text": f"note {number} of {name}", "picture": f"p{number % pictures}.png"}
        for number in range(count)
    ]
    return tiny.write_lines(folder / name, rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_notes(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planning, building):
        monkeypatch.setattr(module, "PER_SHARD", 4)


def test_shards_are_shuffled_split_by_content_and_lead_back_to_their_rows(
    tmp_path: Path, source: Path
) -> None:
    build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    groups, rows = {}, {}
    for split in read_corpus(tmp_path / "corpus")["splits"]:
        reader = ShardReader(read_split(tmp_path / "corpus", split))
        pairs = [reader.read(number) for number in range(len(reader))]
        groups[split] = {pair.target.content_id for pair in pairs}
        rows[split] = [int(pair.source.removeprefix("a.jsonl row ")) for pair in pairs]
        assert [pair.key.partition("/")[2] for pair in pairs] == [f"a-{row:08d}" for row in rows[split]]
        for pair, row in zip(pairs, rows[split], strict=True):
            assert pair.query is not None and pair.query.text == f"note {row - 1} of a.jsonl"
    assert groups.keys() == {"train", "val", "test"}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 20
    assert sorted(row for split in rows.values() for row in split) == list(range(1, 41))
    assert rows["train"] != sorted(rows["train"])


def test_another_seed_gives_another_order_and_the_same_seed_the_same_bytes(
    tmp_path: Path, source: Path
) -> None:
    for name, settings in (
        ("one", SHARES),
        ("two", SHARES),
        ("more", replace(SHARES, workers=4)),
        ("other", replace(SHARES, seed=1)),
    ):
        build_corpus(tmp_path / name, Notes(source), settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "more")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_building
from rime_pl.datamodules.builders import building, planning
planning.PER_SHARD = building.PER_SHARD = 4
written = []
write = building.write_shard
def write_some(*arguments):
    if len(written) == {shards}:
        arguments[0].parent.mkdir(parents=True, exist_ok=True)
        arguments[0].write_bytes(b"half a tar")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*arguments))
building.write_shard = write_some
building.build_corpus(Path({output!r}), test_building.Notes(Path({source!r})), test_building.SHARES)
"""


def killed(output: Path, source: Path, shards: int) -> None:
    """A build in a process of its own, killed in the middle of a tar after some were finished."""
    code = KILLED.format(
        tests=str(Path(__file__).parent), output=str(output), source=str(source), shards=shards
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def test_a_killed_build_goes_on_where_it_was(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "p3.png").write_bytes(b"no picture")  # found in the second pass, so a note must hold it
    settings = replace(SHARES, max_refused=0.5)
    build_corpus(tmp_path / "whole", Notes(source), settings)
    output = tmp_path / "corpus"
    monkeypatch.setattr(sys.modules[__name__], "SHARES", settings)
    killed(output, source, 5)
    assert not output.exists()
    written: list[Path] = []
    write = building.write_shard
    monkeypatch.setattr(
        building, "write_shard", lambda path, *more: written.append(path) or write(path, *more)
    )
    capsys.readouterr()
    build_corpus(output, Notes(source), settings)
    total = sum(len(about["shards"]) for about in read_corpus(output)["splits"].values())
    assert len(written) == total - 5
    assert f"5 of {total} parts were finished by an earlier build" in capsys.readouterr().out
    assert contents(output) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "source", "whole"]
    assert "unusable picture" in (output / "broken.txt").read_text()


def test_another_build_does_not_go_on_with_the_parts(tmp_path: Path, source: Path) -> None:
    killed(tmp_path / "corpus", source, 3)
    build_corpus(tmp_path / "corpus", Notes(source), replace(SHARES, seed=5))
    build_corpus(tmp_path / "whole", Notes(source), replace(SHARES, seed=5))
    assert contents(tmp_path / "corpus") == contents(tmp_path / "whole")


def test_a_part_whose_tar_is_gone_is_written_again(tmp_path: Path, source: Path) -> None:
    killed(tmp_path / "corpus", source, 3)
    for tar in sorted((tmp_path / ".corpus.building" / "train").glob("*.tar"))[:2]:
        tar.write_bytes(tar.read_bytes()[:100])
    build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    build_corpus(tmp_path / "whole", Notes(source), SHARES)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_ctrl_c_and_a_full_disk_keep_what_is_finished(
    tmp_path: Path, source: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = building.write_shard, []

    def fail(path: Path, *more: Any) -> None:
        if len(written) == 3:
            raise error
        written.append(write(path, *more))

    with monkeypatch.context() as patch:
        patch.setattr(building, "write_shard", fail)
        stopped = isinstance(error, KeyboardInterrupt)
        kind = StoppedError if stopped else RimeError
        says = (
            "3 of .* parts .* are finished and kept" if stopped else "What is finished is kept, and the same"
        )
        with pytest.raises(kind, match=says):
            build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    assert not (tmp_path / "corpus").exists()
    build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    build_corpus(tmp_path / "whole", Notes(source), SHARES)
    assert contents(tmp_path / "corpus") == contents(tmp_path / "whole")


FAULTS = {
    "missing file": {"picture": "none.png"},
    "path outside the folder": {"picture": "../source/p1.png"},
    "special token": {"text": "a <|im_end|>"},
    "half a character": {"text": "\ud83d"},
    "not a string": {"text": ["a"]},
    "empty side": {"text": " "},
    "unusable picture": {"picture": "bomb.png"},
    "duplicate pair": {"text": "note 1 of a.jsonl", "picture": "p1.png"},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_used_is_counted_by_its_name(
    tmp_path: Path, source: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_bomb(source / "bomb.png")
    rows = [*tiny.read_lines(source / "a.jsonl"), {"text": "more", "picture": "p2.png", **FAULTS[kind]}]
    tiny.write_lines(source / "a.jsonl", rows)
    build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    about = read_corpus(tmp_path / "corpus")
    assert about["refused"] == {kind: 1} and about["rows"] == {"a.jsonl": {"read": 41, "expected": 40}}
    assert sum(split["samples"] for split in about["splits"].values()) == 40
    assert (tmp_path / "corpus" / "broken.txt").read_text().startswith(f"a.jsonl row 41: {kind}: ")
    said = capsys.readouterr().out
    assert f"Left out: 1 x {kind}." in said and "a.jsonl: 41 rows, but 40 expected (+1)" in said


def test_too_many_refusals_stop_before_anything_is_written(tmp_path: Path, source: Path) -> None:
    for number in range(5):
        (source / f"p{number}.png").unlink()
    with pytest.raises(RimeError, match=r"10 of 40 .* --max_refused 0.1: 10 x missing file.\n  a.jsonl row"):
        build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    build_corpus(tmp_path / "corpus", Notes(source), replace(SHARES, max_refused=0.3))
    assert read_corpus(tmp_path / "corpus")["refused"] == {"missing file": 10}


def test_too_many_unusable_pictures_stop_too_and_leave_the_old_corpus(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    before = contents(tmp_path / "corpus")
    for number in range(5):
        (source / f"p{number}.png").write_bytes(b"x")
    with pytest.raises(RimeError, match=r"10 of 40 pairs cannot be used(.|\n)*are kept for that in"):
        build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    assert contents(tmp_path / "corpus") == before and (tmp_path / ".corpus.building").is_dir()
    capsys.readouterr()
    build_corpus(tmp_path / "corpus", Notes(source), replace(SHARES, max_refused=0.3))
    assert "parts were finished by an earlier build" in capsys.readouterr().out
    assert read_corpus(tmp_path / "corpus")["refused"] == {"unusable picture": 10}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "source"]


def test_a_split_without_pairs(tmp_path: Path, source: Path) -> None:
    with pytest.raises(RimeError, match=r"split 'val' must have pairs, but has none \(train \d+, val 0"):
        build_corpus(tmp_path / "corpus", Notes(source), replace(SHARES, val_share=0.0))
    for number in range(20):
        (source / f"p{number}.png").unlink()
    with pytest.raises(RimeError, match=r"split 'train' must have pairs.*Refused were 40 x missing file"):
        build_corpus(tmp_path / "corpus", Notes(source), SHARES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_limit_takes_the_first_rows(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_corpus(tmp_path / "corpus", Notes(source), replace(SHARES, limit=30))
    assert read_corpus(tmp_path / "corpus")["rows"]["a.jsonl"]["read"] == 30
    assert "30 rows read, at most 30 of each file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"val_share": 0.8, "test_share": 0.4}, "val_share and test_share must be at least 0"),
        ({"max_refused": 2.0}, "--max_refused must be at least 0 and at most 1, but is 2.0"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"workers": -1}, "--workers must be at least 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RimeError, match=says):
        Settings(**settings)


def test_files_whose_samples_would_have_the_same_keys(tmp_path: Path, source: Path) -> None:
    write_notes(source, name="a b.jsonl")
    write_notes(source, name="a-b.jsonl")
    with pytest.raises(RimeError, match=r"names as alike as 'a b.jsonl' and 'a-b.jsonl'"):
        build_corpus(tmp_path / "corpus", Notes(source, "a b.jsonl", "a-b.jsonl"), SHARES)


def test_the_help_of_shards_lists_all_builders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--help"]) == 0
    assert "  mmeb-train " in capsys.readouterr().out
