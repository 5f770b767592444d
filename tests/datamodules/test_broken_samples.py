"""Samples that cannot be used are named, counted and left out: never something else in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from colour_corpus import make_splits, write
from PIL import Image

from rime_pl.datamodules import shards
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.shards import read_split
from rime_pl.datamodules.split_index import Entry
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Batch, EvalBatch, Pair

MakeData = Callable[..., RimeDataModule]
LONG = "word " * 50


def train(data: RimeDataModule) -> list[Batch]:
    data.setup("fit")
    return [*data.train_dataloader()]  # type: ignore[list-item]


def keys(batches: list[Any]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def with_long_rewrites(folder: Path, split: str, *places: int) -> Path:
    splits = make_splits()
    for place in places:
        pair = splits[split][place]
        assert pair.query is not None
        splits[split][place] = replace(pair, query=replace(pair.query, rewrite=LONG))
    return write(folder, splits)


def spoil(entry: Entry, member: str = "t0.png") -> str:
    """Overwrite a member of a sample with garbage."""
    offset, size = entry.members[member]
    with entry.shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    return entry.name


# -- a sample that makes no batch ----------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rewrite_that_is_too_long_is_a_broken_sample(
    make_data: MakeData, tmp_path: Path, num_workers: int
) -> None:
    path = with_long_rewrites(tmp_path / "long", "train", 0)
    name = "train-000000.tar/big-0000"
    with pytest.raises(DataError) as error:
        train(make_data(path=path, steps_per_epoch=24, num_workers=num_workers))
    assert f"1 of 50 samples in {path / 'train'} are broken:" in str(error.value)
    assert f"{name}: field 'query.rewrite' is too long." in str(error.value)
    data = make_data(path=path, max_broken_share=0.05, steps_per_epoch=24, num_workers=num_workers)
    assert name not in keys(train(data)) and set(data.broken) == {name} and not data.cut


@pytest.mark.parametrize("num_workers", [0, 1])
def test_texts_that_are_too_long_can_be_cut_and_are_counted(
    make_data: MakeData, tmp_path: Path, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_long_rewrites(tmp_path / "long", "train", 0, 1)
    data = make_data(path=path, too_long="cut", steps_per_epoch=24, num_workers=num_workers)
    train(data)
    assert data.cut == [f"train-000000.tar/big-000{n} (query): rewrite" for n in (0, 1)] and not data.broken
    capsys.readouterr()
    data.teardown("fit")
    assert f"{path / 'train'}: 2 texts were too long and were cut" in capsys.readouterr().out
    data.teardown("test")
    assert capsys.readouterr().out == "", "it is said once"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_share_is_that_of_all_workers(make_data: MakeData, tmp_path: Path, num_workers: int) -> None:
    """A pass of 12 batches meets four broken samples, and neither worker more than three of them."""
    path = with_long_rewrites(tmp_path / "long", "train", 0, 9, 18, 27)
    settings = {"path": path, "num_workers": num_workers, "steps_per_epoch": 24}
    data = make_data(max_broken_share=0.08, **settings)
    train(data)
    assert len(data.broken) == 4
    with pytest.raises(DataError, match=r"4 of 50 samples in .*train are broken:"):
        train(make_data(max_broken_share=0.07, **settings))


def test_the_share_is_that_of_the_whole_run_after_it_was_resumed(make_data: MakeData, tmp_path: Path) -> None:
    path = with_long_rewrites(tmp_path / "long", "train", *range(3))
    data = make_data(path=path, max_broken_share=0.06, steps_per_epoch=24)
    train(data)
    kept = data.state_dict()
    resumed = make_data(path=path, max_broken_share=0.06)
    resumed.load_state_dict(kept)
    assert resumed.broken == data.broken and len(resumed.broken) == 3
    resumed.setup("fit")
    with pytest.raises(DataError, match=r"4 of 50 samples in"):
        resumed._samples("train").add({"train-000003.tar/another": "is cut off"}, 50)
    del kept["broken"]  # of an earlier version
    make_data(path=path).load_state_dict(kept)


def test_an_item_with_too_many_pictures_is_a_broken_sample_and_is_not_opened(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = make_splits()
    first = splits["train"][0]
    many = replace(first.target, media=first.target.media * 500)
    splits["train"][0] = replace(first, target=many)
    path, name = write(tmp_path / "many", splits), "train-000000.tar/big-0000"
    opened: list[str] = []
    monkeypatch.setattr(
        shards, "open_picture", lambda data, name: opened.append(name) or Image.new("RGB", (8, 8))
    )
    message = rf"{name}: field 'target' must have at most 16 pictures, but has 500. Use fewer, or raise"
    with pytest.raises(DataError, match=message):
        train(make_data(path=path, steps_per_epoch=24))
    data = make_data(path=path, max_broken_share=0.05, steps_per_epoch=24)
    assert name not in keys(train(data)) and set(data.broken) == {name}
    assert not [each for each in opened if name in each]


def test_every_task_shows_its_instructions_however_small_it_is(tmp_path: Path) -> None:
    """One pair of `small` among 37 of `big`: every tenth pair of the corpus would miss it."""
    splits = make_splits()
    splits["train"] = [pair for pair in splits["train"] if pair.dataset == "big" or pair.key == "small-0001"]
    entries = read_split(write(tmp_path / "colours", splits), "train")
    read = [pair.dataset for pair in read_texts(TextReader(entries), most=4)]
    assert sorted(set(read)) == ["big", "small"] and len(read) <= 4
    assert len(list(read_texts(TextReader(entries), most=38))) == len(entries)


def test_broken_samples_are_told_at_the_end(
    make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_long_rewrites(tmp_path / "long", "train", *range(25))
    data = make_data(path=path, max_broken_share=1.0, steps_per_epoch=24)
    train(data)
    data.teardown("fit")
    said = capsys.readouterr().out
    assert "25 broken samples were left out:" in said and "big-0000: field 'query.rewrite'" in said
    assert "... and 5 more" in said and said.count("too long") == 20


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("fault", [OSError(24, "Too many open files"), MemoryError()])
def test_a_fault_of_the_machine_ends_the_run_whatever_may_be_broken(
    make_data: MakeData, num_workers: int, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise fault

    data = make_data(max_broken_share=1.0, num_workers=num_workers)
    data.setup("fit")
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(RimeError, match=r"must be readable, but the machine fails to read it: ") as error:
        [*data.train_dataloader()]
    assert not isinstance(error.value, DataError) and not data.broken


def test_memory_that_is_used_up_while_a_batch_is_made(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(max_broken_share=1.0)
    data.setup("fit")

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(data.processor, "training_batch", fails)
    with pytest.raises(RimeError, match=r"must fit in the memory of this machine, but it is used up"):
        [*data.train_dataloader()]


def test_others_are_looked_for_only_if_a_sample_is_broken(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(self: Any, index: int) -> Iterator[int]:
        raise AssertionError("this walks through the whole split, for each sample")
        yield index

    monkeypatch.setattr("rime_pl.datamodules.loading._Batches._instead", looked)
    assert train(make_data())


def test_each_split_has_its_own_share(make_data: MakeData, tmp_path: Path) -> None:
    """One broken sample of 18 in val: 5 of 50 in train were found before, and do not count."""
    path = with_long_rewrites(tmp_path / "long", "train", *range(5))
    spoil(read_split(path, "val")[0])
    data = make_data(path=path, max_broken_share=0.1, steps_per_epoch=24)
    train(data)
    [*data.val_dataloader()[1]]  # the targets: the picture of a target is broken
    assert len(data.broken) == 6


# -- evaluation ----------------------------------------------------------------------------------------


def evaluated(data: RimeDataModule, loader: int) -> list[EvalBatch]:
    data.setup("test")
    return [*data.test_dataloader()[loader]]  # type: ignore[list-item]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_broken_query_is_left_out_and_not_replaced_by_another(
    make_data: MakeData, tmp_path: Path, world_size: int
) -> None:
    """A repeat of a query that is evaluated anyway fills its row: the metric drops repeats by their id."""
    path = with_long_rewrites(tmp_path / "long", "test", 8)
    name = read_split(path, "test")[8].name
    with pytest.raises(DataError, match=rf"1 of \d+ samples in .*test are broken:\n  {name}"):
        evaluated(make_data(path=path), 0)
    seen: set[str] = set()
    for rank in range(world_size):
        data = make_data(path=path, max_broken_share=0.1, eval_batch_size=2)
        place = {"rank": rank, "num_replicas": world_size}
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs=place, state=SimpleNamespace(fn=None), world_size=1
        )  # type: ignore
        seen.update(keys(evaluated(data, 0)))
    assert seen == {entry.name for entry in read_split(path, "test")} - {name}


def test_validation_takes_no_other_query_for_a_broken_one(make_data: MakeData, tmp_path: Path) -> None:
    path = with_long_rewrites(tmp_path / "long", "val", *range(11))  # all of the task "big"

    def chosen(path: Path | None = None, **settings: Any) -> set[str]:
        data = make_data(**({"path": path} if path else {}), limit_val_queries=6, **settings)
        data.setup("validate")
        return set(keys([*data.val_dataloader()[0]]))

    clean = chosen()
    with pytest.raises(DataError, match=r"Every sample that could stand in for val-000000.tar/big-00"):
        chosen(path, max_broken_share=1.0)
    names = [entry.name for entry in read_split(path, "val")]
    name = next(name for name in names if name in clean)
    spoiled = with_long_rewrites(tmp_path / "spoiled", "val", names.index(name))
    assert chosen(spoiled, max_broken_share=0.1) == clean - {name}


def test_a_duplicate_takes_the_place_of_a_broken_gallery_item(make_data: MakeData, tmp_path: Path) -> None:
    """Test sample 5 shows the same colour as sample 0; nothing shows that of sample 9."""
    path = write(tmp_path / "spoiled", make_splits())
    entries = read_split(path, "test")
    assert entries[0].target_content == entries[5].target_content
    broken = {spoil(entries[0]), spoil(entries[9])}
    data = make_data(path=path, max_broken_share=0.2, distractors=False)
    gallery = evaluated(data, 1)
    assert set(keys(gallery)) == {entries[n].name for n in (1, 2, 3, 4, 5, 10, 11, 12, 13)}
    assert set(data.broken) == broken


def test_a_corpus_to_test_on_only(make_data: MakeData, tmp_path: Path) -> None:
    path = write(tmp_path / "test", {"test": make_splits()["test"]})
    assert len(keys(evaluated(make_data(path=path), 0))) == 14
    with pytest.raises(
        DataError,
        match=r"needs a corpus with the split 'train', but .* has only \['test'\]. .* `rime STAGE test`",
    ):
        make_data(path=path).setup("fit")


# -- annotation ----------------------------------------------------------------------------------------


def with_rewrites(folder: Path, keep: Callable[[int], tuple[bool, bool]]) -> Path:
    """A corpus whose training pairs keep the rewrites of query and target that ``keep`` names."""
    splits = make_splits()

    def kept(number: int, pair: Pair) -> Pair:
        assert pair.query is not None
        of_query, of_target = keep(number)
        query = pair.query if of_query else replace(pair.query, rewrite=None)
        return replace(
            pair, query=query, target=pair.target if of_target else replace(pair.target, rewrite=None)
        )

    splits["train"] = [kept(number, pair) for number, pair in enumerate(splits["train"])]
    return write(folder, splits)


def test_pairs_with_one_rewrite_are_not_annotated(make_data: MakeData, tmp_path: Path) -> None:
    """The generative terms need both, so they would be 0 in each step of such a run."""
    path = with_rewrites(tmp_path / "one", lambda number: (number % 2 == 0, number % 2 == 1))
    for rewrites in ("all", "annotated"):
        with pytest.raises(RimeError, match=r"must have a rewrite on both sides, but of 50 none has"):
            make_data(path=path, require_rewrites=False, rewrites=rewrites).setup("fit")
    for rewrites in ("none", "unannotated"):
        batches = train(make_data(path=path, rewrites=rewrites))
        assert not any(side.annotated.any() for batch in batches for side in batch.sides)


def test_how_many_pairs_are_annotated_is_said_at_the_start(
    make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_rewrites(tmp_path / "few", lambda number: (number % 5 > 0, number % 2 == 0))

    def said(**settings: Any) -> str:
        capsys.readouterr()
        make_data(path=path, require_rewrites=False, **settings).setup("fit")
        pairs, order = capsys.readouterr().out.strip().splitlines()
        assert "batches a pass" in order
        return pairs

    assert said() == "20 of 50 pairs annotated (big: 15 of 37, small: 5 of 13)"
    assert said(tasks=["small"]) == "5 of 13 pairs annotated"
    assert said(rewrites="none") == "50 pairs; no rewrite is read (data.rewrites none)"
    few = said(tasks=["small"], annotated_share=0.5, rewrites="unannotated")
    assert few.endswith(
        "of 13 pairs annotated, other rewrites are hidden (data.annotated_share 0.5), 12 used "
        "(data.rewrites unannotated)"
    )


def test_every_process_gets_its_part_of_the_annotated_pairs(make_data: MakeData, tmp_path: Path) -> None:
    path = with_rewrites(tmp_path / "few", lambda number: (number % 3 == 0, number % 3 == 0))
    settings = {"path": path, "batch_size": 8, "require_rewrites": False}
    alone = train(make_data(**settings))
    ranks = []
    for rank in range(2):
        data = make_data(**settings)
        place = {"rank": rank, "num_replicas": 2}
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs=place, state=SimpleNamespace(fn=None), world_size=1
        )  # type: ignore
        ranks.append(train(data))
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [part.query.annotated.sum().item() for part in parts] == [2, 2]
        assert sorted(keys(parts)) == sorted(whole.keys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 12},
            r"hold 6 annotated .* 'big' has 33 .* 4 others. Use a .*share to 0.6667, or set",
        ),
        (
            {"batch_size": 4, "annotated_batch_share": 0.05},
            r"hold 0 annotated pairs, at least 2, .* to 0.5, or set",
        ),
    ],
)
def test_batches_that_cannot_hold_their_part_say_what_to_type(
    make_data: MakeData, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = with_rewrites(tmp_path / "most", lambda number: (number % 12 > 0, number % 12 > 0))
    with pytest.raises(RimeError, match=message):
        make_data(path=path, require_rewrites=False, tasks=["big"], **settings).setup("fit")
