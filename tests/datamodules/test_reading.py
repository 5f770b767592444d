"""Reading in the real world: odd pictures, many tars, a machine that fails, files with any content."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from colour_corpus import make_pairs, write
from PIL import Image

from rime_pl.datamodules.plain_tars import index
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.split_index import Entry
from rime_pl.datamodules.tar_files import MAX_OPEN
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Item, Pair


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def _edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _read_member(entry: Entry, name: str) -> bytes:
    offset, size = entry.members[name]
    return entry.shard.read_bytes()[offset : offset + size]


def _overwrite(entry: Entry, name: str, data: bytes) -> None:
    with entry.shard.open("r+b") as stream:
        stream.seek(entry.members[name][0])
        stream.write(data)


def test_pictures_are_opened_as_a_person_sees_them(tmp_path: Path) -> None:
    """A PNG that is turned by EXIF and one with 16 bits, in a tar of another program."""
    turned = Image.new("RGB", (8, 4), "red")
    turned.paste("blue", (4, 0, 8, 4))  # the right half, which the orientation turns to the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"q0": io.BytesIO(), "t0": io.BytesIO()}
    turned.save(files["q0"], "PNG", exif=exif)
    Image.fromarray(np.full((4, 4), 30000, np.uint16)).save(files["t0"], "PNG")
    pair = Pair("k", "t", "g", Item("", (turned,), "a"), Item("", (turned,), "b"))
    path = write(tmp_path, {"train": [pair]})
    entry = read_split(path, "train")[0]
    tar = entry.shard
    sample = json.dumps(json.loads(_read_member(entry, "json")) | {"key": "k"}).encode()
    members = {"json": sample, **{f"{name}.png": file.getvalue() for name, file in files.items()}}
    with tar.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as out:
        out.write({"__key__": "k", **members})
    index(path)
    read = ShardReader(read_split(path, "train")).read(0)
    assert read.query is not None
    (upright,), (grey,) = read.query.media, read.target.media
    assert upright.size == (4, 8) and upright.getpixel((0, 0)) == (255, 0, 0)
    assert upright.getpixel((0, 7)) == (0, 0, 255)
    assert grey.getpixel((0, 0)) == (117, 117, 117)  # 30000 / 257


# -- many tars, and a machine that fails ---------------------------------------------------------------


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _read_all(reader: ShardReader) -> int:
    before = _open_files()
    keys = [reader.read(index).key for index in range(len(reader))]
    assert keys == [entry.name for entry in reader.entries]
    return _open_files() - before


def test_more_tars_than_files_may_be_open(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": make_pairs("a", 200, 200)}, samples_per_shard=1)
    reader = ShardReader(read_split(path, "train"))
    assert len({entry.shard for entry in reader.entries}) == 200
    assert _read_all(reader) == MAX_OPEN + 1  # and the names of the index
    worker = get_context("fork").Process(target=_read_all, args=(reader,))
    worker.start()  # it closes what it inherited, and only for itself
    worker.join()
    assert worker.exitcode == 0
    assert _read_all(reader) == 0
    before = _open_files()
    del reader
    assert _open_files() == before - MAX_OPEN - 2  # and both files of the index


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_a_fault_of_the_machine_is_no_broken_sample(
    corpus: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = read_split(corpus, "train")

    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    for call in ("pread", "open"):
        with monkeypatch.context() as patch, pytest.raises(RimeError) as error:
            patch.setattr(os, call, fails)
            ShardReader(entries).read(0)
        assert not isinstance(error.value, DataError)
        assert re.search(rf"train-000000.tar must be readable.*{os.strerror(code)}", str(error.value))


def test_a_tar_that_is_gone_is_no_broken_sample(copy: Path) -> None:
    reader = ShardReader(read_split(copy, "train"))
    shutil.rmtree(copy / "train")
    with pytest.raises(RimeError, match=r"No such file .* Was the corpus moved or built again") as error:
        reader.read(0)
    assert not isinstance(error.value, DataError)


# -- what a file may hold ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b'"dataset": "big"',
            b'"dataset": "bag"',
            "field 'dataset' gives 'bag', and the index",
        ),
        (b'"colour 4"', b'"colour 5"', "field 'query.content_id' gives 'colour 5', and the index"),
        (
            b'"rewrite": "It is',
            b'"rewrote": "It is',
            "field 'query.rewrite' gives None, and the index says otherwise",
        ),
        (b'"number 4"', b'"\\ud800 4"', r"field 'query.text' must be text, but holds '\\ud800', half"),
    ],
)
def test_a_sample_that_its_index_does_not_describe(copy: Path, old: bytes, new: bytes, message: str) -> None:
    entry = read_split(copy, "train")[4]
    content = _read_member(entry, "json")
    assert old in content and len(old) == len(new)
    _overwrite(entry, "json", content.replace(old, new))
    with pytest.raises(DataError, match=rf"^train-000000.tar/big-0004: .*{message}"):
        ShardReader(read_split(copy, "train")).read(4)


@pytest.mark.parametrize("name", ["../train/train-000000.tar", "/etc/passwd", 3, "a.zip"])
def test_a_corpus_names_no_file_outside_its_folder(copy: Path, name: object) -> None:
    _edit_json(copy / "corpus.json", lambda corpus: corpus["splits"]["train"].update(shards=[name]))
    with pytest.raises(DataError, match=r"corpus.json: field 'splits' must name the tars of each split"):
        read_split(copy, "train")


@pytest.mark.parametrize("name", ["../outside", "/etc", "", ".", "..", "a\0", "\ud800", "x" * 300])
def test_a_split_is_a_folder_of_its_corpus(copy: Path, name: str) -> None:
    _edit_json(copy / "corpus.json", lambda corpus: corpus["splits"].update({name: corpus["splits"]["val"]}))
    with pytest.raises(DataError, match=r"corpus.json: field 'splits' must name the tars of each split"):
        read_split(copy, "train")


@pytest.mark.parametrize("shards", [0, 2])
def test_a_tar_that_corpus_json_names_not_or_twice(copy: Path, shards: int) -> None:
    def change(corpus: dict[str, Any]) -> None:
        named = corpus["splits"]["train"]["shards"]
        corpus["splits"]["train"]["shards"] = [*named[1:], *named[:1] * shards]

    _edit_json(copy / "corpus.json", change)
    with pytest.raises(DataError, match=r"must have 50 samples in . tars, as it says, but index.json"):
        read_split(copy, "train")


@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_a_corpus_without_its_hash(copy: Path, value: object) -> None:
    _edit_json(copy / "corpus.json", lambda corpus: corpus.update(data_hash=value))
    with pytest.raises(DataError, match=r"corpus.json: field 'data_hash' must be text, but is"):
        read_split(copy, "train")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["train-000000.tar", "index.json", "index.columns", "index.names", "../corpus.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle"])
def test_a_file_of_a_corpus_that_is_no_file_is_named_and_never_waited_for(
    copy: Path, name: str, kind: str
) -> None:
    file = copy / "train" / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file)
    with pytest.raises(DataError, match=re.escape(Path(name).name)):
        ShardReader(read_split(copy, "train")).read(0)
    if name.endswith(".tar"):
        with pytest.raises(DataError, match=r"train-000000.tar: must be a file with a printable name"):
            index(copy)
