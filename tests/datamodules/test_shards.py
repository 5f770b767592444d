"""The shard format: what is written comes back, other readers understand it, faults are named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from colour_corpus import make_pairs, make_splits, write

from rime_pl.datamodules.annotation import CompletionKind
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.split_index import BYTES_PER_PAIR, COLUMNS
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair


def same_item(a: Item, b: Item) -> bool:
    pixels = all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a.media, b.media, strict=True))
    return pixels and replace(a, media=()) == replace(b, media=())


def same_pair(a: Pair, b: Pair) -> bool:
    items = [(a.target, b.target), *zip(a.hard_negatives, b.hard_negatives, strict=True)]
    if a.query is not None and b.query is not None:
        items.append((a.query, b.query))
    assert (a.query is None) == (b.query is None)
    return all(same_item(x, y) for x, y in items) and (a.dataset, a.gallery) == (b.dataset, b.gallery)


@pytest.mark.parametrize("split", ["train", "distractors"])
def test_what_is_written_comes_back(corpus: Path, split: str) -> None:
    written = make_splits()[split]
    entries = read_split(corpus, split)
    reader = ShardReader(entries)
    for index in reversed(range(len(written))):
        pair, entry = reader.read(index), entries[index]
        assert same_pair(pair, written[index])
        assert pair.key == entry.name == f"{entry.shard.name}/{written[index].key}"
        assert entry.target_content == written[index].target.content_id
        assert entry.has_rewrite == (split == "train", split == "train")
        assert (entry.query_content is None) == (pair.query is None)


def test_any_webdataset_reader_streams_the_tars(corpus: Path) -> None:
    shards = sorted(str(path) for path in (corpus / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    written = make_splits()["train"]
    assert [sample["__key__"] for sample in samples] == [pair.key for pair in written]
    for sample, pair in zip(samples, written, strict=True):
        assert sample["json"]["target"]["rewrite"] == pair.target.rewrite
        assert np.array_equal(np.asarray(sample["t0.png"]), np.asarray(pair.target.media[0]))
        assert np.array_equal(np.asarray(sample["n0.1.png"]), np.asarray(pair.hard_negatives[0].media[1]))


def test_corpus_file_counts_and_hash(corpus: Path, tmp_path: Path) -> None:
    about = read_corpus(corpus)
    assert about["splits"]["train"]["tasks"] == {"big": 37, "small": 13}
    assert len(about["splits"]["train"]["shards"]) == -(-50 // 16)
    again = read_corpus(write(tmp_path / "again", make_splits()))
    assert again == about
    splits = make_splits()
    splits["val"][0] = replace(splits["val"][0], target=replace(splits["val"][0].target, rewrite="Other."))
    assert read_corpus(write(tmp_path / "other", splits))["data_hash"] != about["data_hash"]


def test_building_again_leaves_no_shard_of_the_old_corpus(tmp_path: Path) -> None:
    write(tmp_path / "c", {"train": make_pairs("a", 40, 40)}, samples_per_shard=4)
    write(tmp_path / "c", {"train": make_pairs("a", 8, 8)}, samples_per_shard=4)
    assert sorted(path.name for path in (tmp_path / "c" / "train").iterdir()) == [
        *("index.columns", "index.json", "index.names", "train-000000.tar", "train-000001.tar")
    ]
    assert len(read_split(tmp_path / "c", "train")) == 8


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "big-0001"])
def test_keys_that_a_tar_cannot_hold(tmp_path: Path, key: str) -> None:
    pairs = make_pairs("big", 3, 3)
    pairs[2] = replace(pairs[2], key=key)
    with pytest.raises(DataError, match=rf"split 'train': a sample key must be unique .* one is '{key}'"):
        write(tmp_path / "c", {"train": pairs})


def test_a_jpeg_keeps_its_bytes(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "photo.jpg"
    Image.effect_noise((32, 32), 60).convert("RGB").save(file, quality=50)
    target = Item("", (Image.open(file),), "noise")
    write(tmp_path / "corpus", {"train": [Pair("k", "t", "g", None, target)]})
    entry = read_split(tmp_path / "corpus", "train")[0]
    offset, size = entry.members["t0.jpg"]
    assert entry.shard.read_bytes()[offset : offset + size] == file.read_bytes()


def _read_key(reader: ShardReader) -> str:
    return reader.read(3).key


def test_reader_works_in_forked_and_spawned_processes(corpus: Path) -> None:
    reader = ShardReader(read_split(corpus, "train"))
    expected = _read_key(reader)  # opens the tar before the fork
    assert _read_key(pickle.loads(pickle.dumps(reader))) == expected
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_read_key, [reader] * 8) == [expected] * 8


# -- faults ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a corpus folder, but '.*/nowhere' does not exist. Build"):
        read_split(tmp_path / "nowhere", "train")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a finished corpus, but folder .* has no corpus.json"):
        read_split(tmp_path, "train")


def test_unknown_split_and_split_without_samples(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"split 'dev' is missing; the corpus has \['distractors', 'test', 'train', 'val'\]"
    ):
        read_split(copy, "dev")
    write(tmp_path / "none", {"train": []})
    with pytest.raises(DataError, match=r"split 'train' is missing; the corpus has \[\]"):
        read_split(tmp_path / "none", "train")
    _edit_json(copy / "corpus.json", lambda corpus: corpus["splits"]["val"].update(shards=[]))
    with pytest.raises(DataError, match=r"split 'val' holds no samples"):
        read_split(copy, "val")


def test_other_format_version(copy: Path) -> None:
    _edit_json(copy / "corpus.json", lambda corpus: corpus.update(format=99))
    with pytest.raises(DataError, match=r"field 'format' must be 2, but is 99.*rime shards index --path"):
        read_split(copy, "train")


@pytest.mark.parametrize("name", ["train-000001.tar", "index.json", "index.columns", "index.names"])
def test_missing_tar_or_index(copy: Path, name: str) -> None:
    (copy / "train" / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: this file .*is missing.*Build the corpus again"):
        read_split(copy, "train")


@pytest.mark.parametrize("lost", [10, 20_000])
def test_a_truncated_tar(copy: Path, lost: int) -> None:
    shard = read_split(copy, "train")[0].shard
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - lost)
    with pytest.raises(DataError, match=rf"{shard.name}: the tar must have \d+ bytes, .* but has \d+.*trunc"):
        read_split(copy, "train")


def test_tar_truncated_after_the_index_was_read(copy: Path) -> None:
    reader = ShardReader(read_split(copy, "train"))
    entry = reader.entries[2]
    with entry.shard.open("r+b") as file:
        file.truncate(entry.members["json"][0] + 5)
    with pytest.raises(DataError, match=rf"{entry.name}: the sample ends after the end"):
        reader.read(2)


def set_column(split: Path, name: str, row: int, value: int) -> None:
    """Change a value of the index."""
    mapped = {}
    columns = np.memmap(split / "index.columns", np.uint8, "r+")
    rows, position = len(columns) // BYTES_PER_PAIR, 0
    for column, kind in COLUMNS.items():
        mapped[column] = columns[position : position + rows * kind.itemsize].view(kind)
        position += rows * kind.itemsize
    mapped[name][row] = value
    columns.flush()


def test_index_of_another_tar(copy: Path) -> None:
    entry = read_split(copy, "train")[0]
    set_column(copy / "train", "offset", 0, entry.extent[0] + 512)
    with pytest.raises(DataError, match=rf"{entry.name}: the index must point at the sample, but"):
        ShardReader(read_split(copy, "train")).read(0)


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", 2**63), ("offset", 2**64 - 1), ("size", 2**32 - 1), ("task", 9), ("gallery", 9)],
)
def test_an_index_with_impossible_values(copy: Path, column: str, value: int) -> None:
    set_column(copy / "train", column, 7, value)
    with pytest.raises(DataError, match=r"index.columns: sample 7 of train-000000.tar must lie in its tar"):
        read_split(copy, "train")


@pytest.mark.parametrize(("column", "value"), [("size", 512), ("size", 0), ("name", 3), ("name", 2**64 - 1)])
def test_an_index_with_wrong_values_makes_a_broken_sample(copy: Path, column: str, value: int) -> None:
    set_column(copy / "train", column, 7, value)
    with pytest.raises(DataError, match=r"^train-000000.tar"):
        ShardReader(read_split(copy, "train")).read(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("shards"), "malformed"),
        (lambda facts: facts.update(tasks=[3]), "malformed"),
        (lambda facts: facts.update(galleries=["\ud800"]), "malformed"),
        (lambda facts: facts["shards"][0].pop(), "malformed"),
        (lambda facts: facts.update(format=1), "'format' must be 2, but is 1"),
        (lambda facts: facts["shards"][0].__setitem__(3, -4), "numbers must be at least 0"),
        (lambda facts: facts["shards"][0].__setitem__(3, 4), "must have .* bytes, .* but has"),
        (lambda facts: facts["shards"].reverse(), "tars, as it says, but index.json lists"),
    ],
)
def test_malformed_facts_of_an_index(copy: Path, change: Callable[[Any], Any], message: str) -> None:
    _edit_json(copy / "train" / "index.json", change)
    with pytest.raises(DataError, match=message):
        read_split(copy, "train")


def test_an_index_that_is_no_json(copy: Path) -> None:
    for text in ("{", "[" * 100_000, "3"):
        (copy / "train" / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index.json: (malformed JSON|'format' must be 2)"):
            read_split(copy, "train")


def test_broken_image_names_shard_key_and_field(copy: Path) -> None:
    entry = read_split(copy, "train")[4]
    offset, size = entry.members["t0.png"]
    _overwrite(entry.shard, offset + size // 2, b"\0" * (size - size // 2))
    with pytest.raises(
        DataError, match=r"^train-000000.tar/big-0004: field 'target.media': 't0.png' must be a picture"
    ):
        ShardReader(read_split(copy, "train")).read(4)


def test_malformed_sample_json(copy: Path) -> None:
    entry = read_split(copy, "train")[4]
    _overwrite(entry.shard, entry.members["json"][0], b"?")
    with pytest.raises(DataError, match=r"^train-000000.tar/big-0004: field 'json': malformed JSON"):
        ShardReader(read_split(copy, "train")).read(4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"dataset"', b'"dazased"', "field 'dataset' is missing"),
        (b'"target"', b'"tarxxx"', "field 'target' is missing"),
        (b'"text": "number 4"', b'"text":          4', "field 'query.text' must be a string, but is 4"),
        (
            b'"media": ["t0.png"]',
            b'"media": ["t9.png"]',
            "field 'target.media': member 't9.png' is not in the tar",
        ),
        (
            b'"media": ["t0.png"]',
            b'"media":         []',
            "field 'target' must have text or media, but has neither",
        ),
    ],
)
def test_faulty_sample_fields(copy: Path, old: bytes, new: bytes, message: str) -> None:
    assert len(old) == len(new)
    entry = read_split(copy, "train")[4]
    offset, size = entry.members["json"]
    content = entry.shard.read_bytes()[offset : offset + size]
    assert old in content
    _overwrite(entry.shard, offset, content.replace(old, new))
    with pytest.raises(DataError, match=rf"^train-000000.tar/big-0004: {message}"):
        ShardReader(read_split(copy, "train")).read(4)


@pytest.mark.parametrize("rewrite", [None, "", "  "])
@pytest.mark.parametrize("side", ["query", "target"])
def test_rewrite_missing_where_one_is_required(tmp_path: Path, side: str, rewrite: str | None) -> None:
    pair = make_pairs("a", 1, 1)[0]
    pair = replace(pair, **{side: replace(getattr(pair, side), rewrite=rewrite)})
    entries = read_split(write(tmp_path, {"train": [pair]}), "train")
    assert entries[0].has_rewrite == (side != "query", side != "target")
    assert getattr(ShardReader(entries).read(0), side).rewrite is None
    with pytest.raises(
        DataError, match=rf"^train-000000.tar/a-0000: field '{side}.rewrite' is missing or empty"
    ):
        ShardReader(entries, require_rewrites=True).read(0)


def test_chain_of_thought_or_filler_tokens_in_place_of_the_rewrite(tmp_path: Path) -> None:
    bare = make_pairs("a", 1, 1)[0]
    assert bare.query is not None
    query = replace(bare.query, rewrite="A red ring.", cot="Near: a ring. A red ring.")
    pair = replace(bare, query=query, target=replace(bare.target, rewrite="Red, a ring.", cot=None))
    entries = read_split(write(tmp_path / "cot", {"train": [pair]}), "train")

    def rewrites(completion: CompletionKind) -> list[str | None]:
        read = ShardReader(entries, completion=completion).read(0)
        return [read.query.rewrite if read.query else None, read.target.rewrite]

    assert rewrites("rewrite") == ["A red ring.", "Red, a ring."]
    assert rewrites("cot") == ["Near: a ring. A red ring.", "Red, a ring."]
    assert rewrites("filler") == [". . .", ". . ."]
    without = replace(pair, query=replace(query, cot=None))
    entries = read_split(write(tmp_path / "none", {"train": [without]}), "train")
    with pytest.raises(DataError, match=r"a-0000: field 'query.cot' is missing or empty, but data.compl"):
        ShardReader(entries, completion="cot").read(0)


def _overwrite(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def _edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
