"""Files of data sets: JSON in pieces, Parquet by row group, and paths that stay in their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny_sources as tiny

from rime_pl.datamodules.builders.sources import json_files
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.paths import file_below, folder_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.errors import DataError

ROWS = [
    {"n": number, "text": "ä€😀 " * (number % 7), "deep": {"a": [1, {"b": "]}, {"}]}} for number in range(50)
]


def values(file: SourceFile) -> list[Any]:
    """All rows, read in order; and again by their places, which must give the same."""
    records = list(file.records())
    places = [record.place for record in records]
    again = {record.place: record.values for record in file.read(places[::-1])}
    for record in records:
        if isinstance(record.values, Refused):
            assert isinstance(again[record.place], Refused)
        else:
            assert again[record.place] == record.values
    assert [place.row for place in places] == sorted({place.row for place in places})
    return [record.values for record in records]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_in_pieces(
    tmp_path: Path, chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    file = JsonFile(path, "a.json")
    monkeypatch.setattr(json_files._Window.__init__, "__defaults__", (chunk,))
    assert values(file) == ROWS
    path.write_text("\n" + json.dumps({"dataset": "x", "images": ROWS, "more": [1]}, indent=indent))
    assert values(JsonFile(path, "a.json", "images")) == ROWS
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert values(JsonFile(path, "a.json")) == ROWS


def test_json_lines_and_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(ROWS[3], ensure_ascii=False).encode(), b"", b'{"a": "\xff"}', b'{"a": 1, "a": 2}']
    path.write_bytes(b"\r\n".join([*lines, b"[1]", b'{"a": ', b'{"last": 1}']))
    read = values(JsonFile(path, "a.jsonl"))
    assert read[0] == ROWS[3] and read[-1] == {"last": 1}
    kinds = ["not UTF-8", "duplicate key", "malformed JSON", "malformed JSON"]
    assert [one.kind for one in read[1:-1]] == kinds


def test_rows_of_an_array_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": {"b": 1, "b": 2}}, 7, "x", {"ok": 1}]')
    read = values(JsonFile(path, "a.json"))
    assert [one.kind for one in read[:3]] == ["duplicate key", "malformed JSON", "malformed JSON"]
    assert read[3] == {"ok": 1}
    path.write_text("[ ]")
    assert values(JsonFile(path, "a.json")) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "must be a list of JSON objects or JSON lines, but is empty"),
        (b"hello", "must be a list of JSON objects or JSON lines, but begins with b'hello'"),
        (b'[{"a": 1}, {"b": 2', "row 2, byte 11: malformed JSON"),
        (b'[{"a": 1}', "is cut off: its list has no end"),
        (b'[{"a": 1} {"b": 2}]', "there must be a comma at byte 10, but there is '{'"),
        (b'[{"a": "\xe4"}]', "must be UTF-8, but holds byte 0xe4"),
        (b'[{"a": nope}]', "row 1, byte 1: malformed JSON"),
        (b"[" * 100_000, "row 1, byte 1: malformed JSON"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "row 1, byte 1: malformed JSON"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_a_clear_stop(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        list(JsonFile(path, "a.json").records())
    assert str(error.value).startswith(str(path)) and says in str(error.value)


def test_parquet_is_read_by_row_group_and_column(tmp_path: Path) -> None:
    rows = [{"n": number, "big": b"x" * number, "more": None} for number in range(300)]
    path = tiny.write_parquet(tmp_path / "a.parquet", rows, group=100)
    file = ParquetFile(path, "a.parquet", ["n"], media=["big"], optional=["more", "absent"])
    assert file.total == 300 and file.blocked
    records = list(file.records())
    assert [record.values for record in records] == [{"n": n, "more": None} for n in range(300)]
    places = [records[n].place for n in (299, 5, 200, 6, 199)]
    read = {record.place.row: record.values for record in file.read(places)}
    assert read == {n + 1: rows[n] for n in (5, 6, 199, 200, 299)}
    assert values(ParquetFile(path, "a.parquet")) == rows


def test_a_parquet_file_that_cannot_be_read_is_a_clear_stop(tmp_path: Path) -> None:
    path = tiny.write_parquet(tmp_path / "a.parquet", [{"n": n, "t": str(n) * 50} for n in range(1000)], 100)
    with pytest.raises(DataError, match=r"must have the columns \['q'\], but has \['n', 't'\]"):
        ParquetFile(path, "a", ["n", "q"])
    data = bytearray(path.read_bytes())
    for start in range(4, len(data) // 2):
        data[start] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet, row group \d+ cannot be read as Parquet"):
        list(ParquetFile(path, "a", ["n", "t"]).records())
    for broken in (b"", b"hello", bytes(data[:1000])):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet"):
            ParquetFile(path, "a", ["n"])
    with pytest.raises(DataError, match="must be a Parquet file, but there is none"):
        ParquetFile(tmp_path / "none.parquet", "none")


def test_columns_of_another_type_are_told_by_row(tmp_path: Path) -> None:
    table = pyarrow.table({"qry": [1], "pos_text": [None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert values(ParquetFile(tmp_path / "a.parquet", "a", ["qry", "pos_text"])) == [
        {"qry": 1, "pos_text": None}
    ]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    tiny.save(folder / "in" / "a.png", 1)
    tiny.save(tmp_path / "outside" / "b.png", 2)
    (folder / "link.png").symlink_to(tmp_path / "outside" / "b.png")
    (folder / "inside.png").symlink_to(folder / "in" / "a.png")
    (folder / "away").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("in/b.png", "missing file"),
        ("in", "missing file"),
        ("in\\a.png", "missing file"),
        ("pipe", "missing file"),
        ("loop", "path outside the folder|missing file"),
        ("in/a.png/more", "missing file"),
        ("x" * 5000, "missing file"),
        ("/etc/passwd", "path outside the folder"),
        ("\\\\host\\share", "path outside the folder"),
        ("C:\\a.png", "path outside the folder"),
        ("http://host/a.png", "path outside the folder"),
        ("in/../../outside/b.png", "path outside the folder"),
        ("in\\..\\..\\outside\\b.png", "path outside the folder"),
        ("..", "path outside the folder"),
        ("link.png", "path outside the folder"),
        ("away/b.png", "path outside the folder"),
        ("", "malformed path"),
        ("./", "malformed path"),
        ("a\0b", "malformed path"),
        ("a\ud800b", "malformed path"),
        (7, "not a string"),
        (None, "not a string"),
    ],
)
def test_a_path_that_leads_to_no_file_of_the_folder(media: Path, name: Any, kind: str) -> None:
    with pytest.raises(Refused) as refused:
        file_below(media, name)
    assert refused.value.kind in kind.split("|")


def test_paths_that_stay_in_the_folder(media: Path) -> None:
    for name in ("in/a.png", "./in//a.png", "inside.png"):
        assert file_below(media, name).read_bytes() == (media / "in" / "a.png").read_bytes()
    assert folder_below(media, "in") == media / "in"
    for name, kind in (
        ("away", "path outside the folder"),
        ("none", "missing folder"),
        ("..", "path outside the folder"),
    ):
        with pytest.raises(Refused) as refused:
            folder_below(media, name)
        assert refused.value.kind == kind
