"""`rime shards index`: tars of other programs become a corpus; what cannot be used is named and counted."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colour_corpus import colour, make_splits, write

from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.plain_tars import index
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.split_index import BYTES_PER_PAIR, COLUMNS
from rime_pl.errors import DataError

Members = list[tuple[str, bytes]]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    colour(number).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, **changes: Any) -> Members:
    """A text that finds a picture."""
    query = {"text": f"find {key}", "media": [], "content_id": key}
    target = {"text": "", "media": ["t0.png"], "content_id": key}
    content = {"dataset": "t", "gallery": "g", "query": query, "target": target} | changes
    return [(f"{key}.json", json.dumps(content).encode()), (f"{key}.t0.png", picture(len(key)))]


def tar_of(file: Path, members: Members, **kind: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def test_an_index_that_is_made_again_is_that_of_the_builder(corpus: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "copy"))
    before = {file.relative_to(copy): file.read_bytes() for file in copy.rglob("index.*")}
    about = read_corpus(copy)
    for file in before:
        (copy / file).unlink()
    changed = json.loads((copy / "corpus.json").read_text()) | {"format": 1}  # the format before this one
    (copy / "corpus.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"'format' must be 2, but is 1.*`rime shards index --path FOLDER`"):
        read_split(copy, "train")
    index(copy)
    assert {file.relative_to(copy): file.read_bytes() for file in copy.rglob("index.*")} == before
    assert read_corpus(copy) == about


def test_the_columns_say_what_the_tars_hold(corpus: Path) -> None:
    assert BYTES_PER_PAIR == 58
    entries = read_split(corpus, "train")
    columns = {name: entries.column(name) for name in COLUMNS}
    assert set(columns["modality"].tolist()) == {0b0010_0001}  # a text finds a picture
    assert set(columns["visual_tokens"].tolist()) == {1}  # pictures of 8 to 14 pixels
    pair = make_splits()["train"][3]
    assert pair.query is not None
    texts = [(item.instruction, item.text, item.rewrite) for item in (pair.query, pair.target)]
    assert columns["text_tokens"][3] == sum(-(-len("".join(map(str, each))) // 4) for each in texts)
    starts, sizes = columns["offset"].astype(int), columns["size"].astype(int)
    assert np.array_equal(starts[1:16], (starts + sizes)[:15])  # side by side in the first tar


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_are_read(tmp_path: Path, kind: int) -> None:
    keys = ["short", "x" * 140, "ü" * 60]
    members = [each for key in keys for each in sample(key)]
    if kind == tarfile.USTAR_FORMAT:
        members = [(name, data) for name, data in members if len(name.encode()) < 100]
    tar_of(tmp_path / "train" / "a.tar", [(f"./{name}", data) for name, data in members], format=kind)
    index(tmp_path)
    reader = ShardReader(read_split(tmp_path, "train"))
    found = [reader.read(number) for number in range(len(reader))]
    assert [pair.key.removeprefix("a.tar/") for pair in found] == [
        name[: -len(".json")] for name, _ in members if name.endswith("json")
    ]
    assert all(pair.target.media for pair in found)


BAD: dict[str, Members] = {
    "path outside its folder": [("../evil.json", b"{}")],
    "no plain file": [],  # added as a link below
    "no JSON": [("lonely.t0.png", b"x")],
    "no UTF-8": [("latin.json", '{"dataset": "ü"}'.encode("latin-1"))],
    "malformed JSON": [("twice.json", b'{"dataset": "a", "dataset": "b"}')],
    "missing media": sample("blind")[:1],
    "malformed field": sample("odd", dataset=7),
    "duplicate key": [*sample("other"), *sample("good")],
    "duplicate member": [*sample("again"), ("again.t0.png", b"x")],
    "no sample name": [(".json", b"{}")],
}


@pytest.mark.parametrize("kind", BAD)
def test_each_fault_is_named_and_counted_and_the_rest_is_read(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "inside" / "corpus"
    tar = tar_of(folder / "train" / "a.tar", [*sample("good"), *BAD[kind], *sample("last")])
    if kind == "no plain file":
        with tarfile.open(tar, "a") as opened:
            link = tarfile.TarInfo("link.json")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            opened.addfile(link)
    with pytest.raises(
        DataError, match=rf"1 sample cannot be used:(.|\n)*By kind: 1 x {kind}(.|\n)*--skip_broken"
    ):
        index(folder)
    with pytest.raises(DataError, match=r"has no corpus.json"):
        read_split(folder, "train")
    index(folder, skip_broken=True)
    assert f"1 sample was left out: 1 x {kind}" in " ".join(capsys.readouterr().out.split())
    assert (folder / "broken.txt").read_text().count("\n") == 1
    reader = ShardReader(read_split(folder, "train"))
    assert [reader.read(number).key for number in range(len(reader))] == [
        *("a.tar/good", *["a.tar/other"] * (kind == "duplicate key"), "a.tar/last")
    ]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("a.tar", "broken.txt", "corpus.json", "index.columns", "index.json", "index.names")
    ]


def test_a_key_of_two_tars_is_a_duplicate(tmp_path: Path) -> None:
    for name, keys in {"a": "pq", "b": "qr", "c": "ps"}.items():
        tar_of(tmp_path / "train" / f"{name}.tar", [each for key in keys for each in sample(key)])
    index(tmp_path, skip_broken=True)
    assert [entry.name for entry in read_split(tmp_path, "train")] == [
        "a.tar/p",
        "a.tar/q",
        "b.tar/r",
        "c.tar/s",
    ]
    assert "c.tar/p: its key must be unique" in (tmp_path / "broken.txt").read_text()
    reader = ShardReader(read_split(tmp_path, "train"))
    assert [reader.read(n).target.content_id for n in range(4)] == [*"pqrs"]


@pytest.mark.parametrize("lost", [1, 700, 10_000])
def test_a_truncated_tar_stops(corpus: Path, tmp_path: Path, lost: int) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "copy"))
    tar = copy / "train" / "train-000001.tar"
    data = tar.read_bytes()
    content = data.rstrip(b"\0")
    tar.write_bytes(content[: len(content) - lost])
    with pytest.raises(
        DataError, match=r"train-000001.tar: must be a whole tar, but is damaged or truncated"
    ):
        index(copy)
    tar.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"train-000001.tar: must be a whole tar"):
        index(copy)


def test_a_flipped_bit_in_any_place_is_named_or_changes_a_content_only(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"train": make_splits()["train"][:6]})
    entries = read_split(path, "train")
    tar = entries[0].shard
    whole = tar.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(whole), 60).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        tar.write_bytes(damaged)
        assert list(entries.parts[0].changed_files()) == [tar]
        for number, entry in enumerate(entries):
            try:
                ShardReader(entries).read(number)
            except DataError as error:
                assert str(error).startswith(entry.name)
        copy = tmp_path / f"copy {bit}"
        shutil.copytree(path, copy)
        try:
            index(copy, skip_broken=True)
        except DataError as error:
            assert tar.name in str(error)


def test_a_folder_without_tars(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--path must be a folder of tars, but .*nowhere' does not exist"):
        index(tmp_path / "nowhere")
    tar_of(tmp_path / "a.tar", sample("k"))
    with pytest.raises(DataError, match=r"a folder of tars for each split, such as .*train, but"):
        index(tmp_path)
