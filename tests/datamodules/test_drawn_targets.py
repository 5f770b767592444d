"""Hard negatives and further positives in a corpus: how many are read, which ones, and what is malformed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from colour_corpus import make_splits, write

from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Batch, Item, Pair
from tests.micro import PROMPT, read_pairs


def test_positives_come_back_beside_the_negatives(tmp_path: Path) -> None:
    splits: dict[str, list[Pair | None]] = dict(make_splits())
    first = splits["train"][0]
    assert first is not None
    splits["train"][0] = replace(
        first, positives=(Item("another right answer", content_id="p", rewrite="x"),)
    )
    reader = ShardReader(read_split(write(tmp_path / "corpus", splits), "train"))
    pair = reader.read(0)
    assert [item.text for item in pair.positives] == ["another right answer"]
    assert len(pair.hard_negatives) == len(first.hard_negatives)
    assert not reader.read(0, "target").hard_negatives and not reader.read(0, "target").positives


def corpus_with(tmp_path: Path, negatives: int, positives: int) -> Path:
    splits: dict[str, list[Pair | None]] = dict(make_splits())
    splits["train"] = [
        pair
        and replace(
            pair,
            hard_negatives=tuple(Item(f"wrong {n}", content_id=f"n{n}") for n in range(negatives)),
            positives=tuple(Item(f"right {n}", content_id=f"p{n}") for n in range(positives)),
        )
        for pair in splits["train"]
    ]
    return write(tmp_path / "corpus", splits)


def test_so_many_are_drawn_anew_for_each_batch_and_always_alike(tmp_path: Path) -> None:
    entries = read_split(corpus_with(tmp_path, 5, 3), "train")
    reader = ShardReader(entries, further=(2, 1))
    drawn: Counter[str] = Counter()
    for draw in range(60):
        pair = reader.read(0, draw=draw)
        texts = [item.text for item in pair.hard_negatives]
        assert texts == sorted(set(texts)) and len(texts) == 2 and len(pair.positives) == 1
        assert reader.read(0, draw=draw) == pair == ShardReader(entries, further=(2, 1)).read(0, draw=draw)
        drawn.update(texts)
    assert set(drawn) == {f"wrong {n}" for n in range(5)} and min(drawn.values()) > 10
    assert not ShardReader(entries, further=(0, 0)).read(0).hard_negatives
    assert len(ShardReader(entries, further=(9, 9)).read(0).hard_negatives) == 5
    assert len(ShardReader(entries).read(0).positives) == 3


@pytest.mark.parametrize("field", ["hard_negatives", "positives"])
def test_a_number_below_0_is_refused(field: str, scenes_corpus: Path, micro_base: Path) -> None:
    settings: dict[str, int] = {field: -1}
    with pytest.raises(RimeError, match=rf"data.{field} must be 0 or more, but is -1"):
        RimeDataModule(str(scenes_corpus), str(micro_base), PROMPT, batch_size=4, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["hard_negatives", "positives"])
def test_a_malformed_one_is_named(field: str, tmp_path: Path) -> None:
    entries = read_split(corpus_with(tmp_path, 2, 2), "train")
    word = b"wrong 1" if field == "hard_negatives" else b"right 1"
    data = entries[0].shard.read_bytes()
    entries[0].shard.write_bytes(data.replace(b'"text": "' + word + b'"', b'"tixt": "' + word + b'"', 1))
    with pytest.raises(DataError, match=rf"field '{field}\[1\].text' must be a string"):
        ShardReader(entries).read(0)


def test_training_batches_hold_them_only_if_asked(
    scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    train = read_pairs(scenes_corpus, "train")
    more = [
        replace(pair, key=pair.key.partition("/")[2], hard_negatives=(train[0].target,)) for pair in train
    ]
    rest = {
        split: [replace(pair, key=pair.key.partition("/")[2]) for pair in read_pairs(scenes_corpus, split)]
        for split in ("val", "test")
    }
    path = write(tmp_path / "corpus", {"train": more, **rest})
    for asked in (0, 1):
        data = RimeDataModule(str(path), str(micro_base), PROMPT, batch_size=4, hard_negatives=asked)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert isinstance(batch, Batch) and (batch.further is not None) == bool(asked)
        if batch.further is not None:
            assert batch.further.owner.tolist() == [0, 1, 2, 3] and not batch.further.positive.any()
