"""Several corpora with weights: which pairs come how often, under which names, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_corpus import make_pairs, make_splits, write

from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.errors import DataError, RimeError

MakeData = Callable[..., RimeDataModule]


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """20 further pairs of "big", which the first corpus has, and 12 of a task of its own."""
    pairs = make_pairs("big", 20, 20, start=30) + make_pairs("new", 12, 12, start=60)
    return write(tmp_path / "second", {"train": pairs})


@pytest.fixture
def several(make_data: MakeData) -> MakeData:
    def make(path: dict[str, float], **settings: Any) -> RimeDataModule:
        data = make_data(**settings)
        return RimeDataModule(path, "no-model", data.prompt, data.batch_size, **settings)

    return make


def keys(data: RimeDataModule) -> list[list[str]]:
    data.setup("fit")
    return [batch.keys for batch in data.train_dataloader()]  # type: ignore[union-attr]


def test_pairs_of_both_come_as_often_as_their_weights_say(
    several: MakeData, corpus: Path, second: Path
) -> None:
    data = several({str(corpus): 1.0, str(second): 2.0})
    batches = keys(data)
    seen = Counter(key for batch in batches for key in batch)
    of_second = {key: count for key, count in seen.items() if key.startswith("second/")}
    assert sum(of_second.values()) == 2 * (20 + 12) and set(of_second.values()) == {2}
    assert sum(seen.values()) - 64 == 36 + 12  # 37 and 13 pairs in batches of 4
    for batch in batches:  # a batch holds one task of one corpus
        assert len({key.rpartition("/")[2].partition("-")[0] for key in batch}) == 1
        assert len({key.startswith("second/") for key in batch}) == 1
    data.setup("validate")
    val = {key for batch in data.val_dataloader()[0] for key in batch.keys}  # type: ignore[union-attr]
    assert len(val) == 18 and not any(key.startswith("second/") for key in val)


def test_tasks_are_those_of_all_corpora(several: MakeData, corpus: Path, second: Path) -> None:
    both = {str(corpus): 1.0, str(second): 1.0}
    assert {key[:7] for batch in keys(several(both, tasks=["new"])) for key in batch} == {"second/"}
    with pytest.raises(RimeError, match=r"must name tasks of the corpora of data.path, but \['old'\]"):
        several(both, tasks=["old"]).setup("fit")


def test_hash_and_weights_are_part_of_the_identity_of_a_run(
    several: MakeData, corpus: Path, second: Path
) -> None:
    both = {str(corpus): 1.0, str(second): 1.0}
    one, two = Corpora.of(str(corpus)).data_hash, Corpora.of(both).data_hash
    assert one == read_corpus(corpus)["data_hash"] != two
    kept = several(both).state_dict()
    several(both).load_state_dict(kept)
    with pytest.raises(
        RimeError, match=r"data.corpus_weights must be \[1.0, 1.0\], as in the checkpoint, but"
    ):
        several({str(corpus): 1.0, str(second): 3.0}).load_state_dict(kept)
    with pytest.raises(RimeError, match=r"data_hash of data.path=.* must be"):
        several({str(second): 1.0, str(corpus): 1.0}).load_state_dict(kept)
    del kept["order"]
    with pytest.raises(RimeError, match=r"is of an earlier version, whose order .* --run_dir"):
        several(both).load_state_dict(kept)


def test_names_tell_corpora_of_one_name_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / place / "data", make_splits()) for place in "abc"]
    names = [entry.name for entry in Corpora.of({str(path): 1.0 for path in paths}).train(None)]
    assert len(set(names)) == 150 and names[0] == "train-000000.tar/big-0000"
    assert names[50] == f"{paths[1]}/train-000000.tar/big-0000"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({}, "must name a corpus, but is empty"),
        ({"a": 0.0}, "weights greater than 0, but that of a is 0.0"),
        ({"a": float("inf")}, "weights greater than 0, but that of a is inf"),
        ({"a": 1.0, "./a": 1.0}, "must name each corpus once, but ./a, a are the same"),
    ],
)
def test_corpora_that_make_no_sense(path: dict[str, float], message: str) -> None:
    with pytest.raises(RimeError, match=message):
        Corpora.of(path)


def test_each_corpus_must_be_there_and_have_a_training_split(
    several: MakeData, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"must be a corpus folder, but .*nowhere' does not exist"):
        several({str(corpus): 1.0, str(tmp_path / "nowhere"): 1.0}).setup("fit")
    test = write(tmp_path / "test", {"test": make_splits()["test"]})
    with pytest.raises(
        DataError, match=r"needs a corpus with the split 'train', but .*test has only \['test'\]"
    ):
        several({str(corpus): 1.0, str(test): 1.0}).setup("fit")
