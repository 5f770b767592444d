"""What a tar may hold, from the index to training, evaluation, inspection and rewriting."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from colour_corpus import make_splits, write
from PIL import Image
from test_plain_tars import sample, tar_of

from rime_pl.datamodules.checking import check_corpus
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.pair_check import Limits
from rime_pl.datamodules.plain_tars import index
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.stored import StoredReader
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.errors import DataError
from rime_pl.media import open_picture

MakeData = Callable[..., RimeDataModule]
pytestmark = pytest.mark.timeout(120)

GOOD = json.loads(sample("odd")[0][1])
TEXT = json.dumps(GOOD)
#: JSON of a sample -> how the index counts it; "" if it is taken.
JSON: dict[str, tuple[bytes, str]] = {
    "as it is": (TEXT.encode(), ""),
    "a byte order mark": (codecs.BOM_UTF8 + TEXT.encode(), ""),
    "UTF-16": (TEXT.encode("utf-16"), "no UTF-8"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "malformed JSON"),
    "Latin-1": (TEXT.replace("find", "f\u00fcr").encode("latin-1"), "no UTF-8"),
    "empty": (b"", "malformed JSON"),
    "zero bytes": (bytes(100), "malformed JSON"),
    "cut": (TEXT[:-9].encode(), "malformed JSON"),
    "more behind it": (f"{TEXT}{TEXT}".encode(), "malformed JSON"),
    "a list": (f"[{TEXT}]".encode(), "malformed JSON"),
    "NaN": (TEXT.replace('"g"', '"g", "score": NaN').encode(), "malformed JSON"),
    "Infinity": (TEXT.replace('"g"', '"g", "score": -Infinity').encode(), "malformed JSON"),
    "a number of 5,000 digits": (TEXT.replace('"g"', f'"g", "n": {"9" * 5000}').encode(), "malformed JSON"),
    "brackets without end": (b"[" * 100_000, "malformed JSON"),
    "a field twice": (TEXT.replace('"g"', '"g", "gallery": "h"').encode(), "malformed JSON"),
    "a field of a side twice": (TEXT.replace('"media"', '"text": "x", "media"').encode(), "malformed JSON"),
    "half a character": (TEXT.replace("find odd", "\\ud800").encode(), "malformed field"),
    "half a character as a task": (TEXT.replace('"t"', '"\\udfff"').encode(), "malformed field"),
    "no target": (json.dumps({**GOOD, "target": None}).encode(), "malformed field"),
    "a number as text": (TEXT.replace('"find odd"', "7").encode(), "malformed field"),
    "a path as picture": (TEXT.replace("t0.png", "../t0.png").encode(), "missing media"),
    "a picture that is not there": (TEXT.replace("t0.png", "t1.png").encode(), "missing media"),
}


@pytest.mark.parametrize("fault", JSON)
def test_json_of_any_kind_is_taken_or_counted_by_its_name(tmp_path: Path, fault: str) -> None:
    data, kind = JSON[fault]
    members = [*sample("good"), ("odd.json", data), sample("odd")[1], *sample("last")]
    tar_of(tmp_path / "train" / "a.tar", members)
    if kind:
        with pytest.raises(DataError, match=rf"1 sample cannot be used:\n.*a.tar/odd: .*\n.*1 x {kind}"):
            index(tmp_path)
    index(tmp_path, skip_broken=True)
    reader = ShardReader(read_split(tmp_path, "train"))
    read = [reader.read(number).key for number in range(len(reader))]
    assert read == [f"a.tar/{key}" for key in ("good", *([] if kind else ["odd"]), "last")]


def photo(number: int) -> Image.Image:
    """An opened JPEG, which the writer keeps as it is."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90 + number).convert("RGB").save(buffer, "JPEG")
    return Image.open(buffer)


@pytest.fixture
def flipped(tmp_path: Path) -> tuple[Path, str, str]:
    """A corpus with one bit flipped in a JPEG of train and of test, which can be decoded, and the samples."""
    splits = make_splits()
    for split in ("train", "test"):
        pair = splits[split][0]
        splits[split][0] = replace(pair, target=replace(pair.target, media=(photo(1),)))
    path = write(tmp_path / "corpus", splits)
    names = []
    for split in ("train", "test"):
        entry = read_split(path, split)[0]
        start, size = entry.members["t0.jpg"]
        tar = bytearray(entry.shard.read_bytes())
        before = open_picture(bytes(tar[start : start + size]))
        tar[start + size // 2] ^= 4
        after = open_picture(bytes(tar[start : start + size]))
        assert after.size == before.size and after.tobytes() != before.tobytes(), "Pillow says nothing"
        entry.shard.write_bytes(tar)
        names.append(entry.name)
    return path, names[0], names[1]


def test_a_flipped_bit_that_can_be_decoded_is_a_broken_sample_everywhere(
    make_data: MakeData, flipped: tuple[Path, str, str]
) -> None:
    path, of_train, of_test = flipped
    with pytest.raises(DataError, match=rf"1 of 50 samples .*\n.*{of_train}: the bytes of the sample must"):
        data = make_data(path=path, steps_per_epoch=24)
        data.setup("fit")
        list(data.train_dataloader())
    data = make_data(path=path, steps_per_epoch=24, max_broken_share=0.1)
    data.setup("fit")
    trained = {key for batch in data.train_dataloader() for key in batch.keys}
    assert of_train not in trained and set(data.broken) == {of_train}
    data.setup("test")
    asked = {key for batch in data.test_dataloader()[0] for key in batch.keys}
    assert of_test not in asked and set(data.broken) == {of_train, of_test}
    found = [(one.kind, one.where) for one in check_corpus(path, Limits(batch_size=4)).faults]
    assert ("broken sample", of_train) in found and ("broken sample", of_test) in found
    entries = read_split(path, "train")
    assert of_train not in {pair.key for pair in read_texts(TextReader(entries))}
    with pytest.raises(DataError, match=rf"^{of_train}: the bytes of the sample must be those"):
        StoredReader(entries).read(0)  # of `rime rewrite`


def test_an_index_of_before_has_no_checksums_and_is_read(flipped: tuple[Path, str, str]) -> None:
    path = flipped[0]
    names = path / "train" / "index.names"
    lines = [json.loads(line) for line in names.read_bytes().splitlines()]
    assert all(len(line) == 4 for line in lines)
    # as long as before, because the columns say where each line begins
    texts = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    shorter = [json.dumps(line[:3], ensure_ascii=False).encode() for line in lines]
    names.write_bytes(b"".join(new.ljust(len(old)) + b"\n" for new, old in zip(shorter, texts, strict=True)))
    assert ShardReader(read_split(path, "train")).read(0).target.media


@pytest.mark.parametrize("value", ["x", 1.5, True, [1]])
def test_a_checksum_that_is_no_number_is_malformed(tmp_path: Path, value: object) -> None:
    path = write(tmp_path / "corpus", {"train": make_splits()["train"][:1]})
    names = path / "train" / "index.names"
    line = json.loads(names.read_bytes())
    names.write_text(json.dumps([*line[:3], value], ensure_ascii=False) + "\n")
    with pytest.raises(DataError, match=r"^train-000000.tar.*(malformed|have changed)"):
        ShardReader(read_split(path, "train")).read(0)


@pytest.mark.parametrize("fault", ["EPS", "bomb", "cut", "words"])
def test_a_picture_that_cannot_be_opened_is_named_when_a_corpus_is_written_again(
    tmp_path: Path, fault: str
) -> None:
    whole = sample("odd")[1][1]
    bomb = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    data = {"EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n", "bomb": bomb, "cut": whole[:30], "words": b"no picture"}[
        fault
    ]
    tar_of(tmp_path / "train" / "a.tar", [sample("odd")[0], ("odd.t0.png", data)])
    index(tmp_path)
    for reader in (StoredReader, ShardReader):
        with pytest.raises(DataError, match=r"^a.tar/odd: field 'target.media': 't0.png' "):
            reader(read_split(tmp_path, "train")).read(0)
