"""The data module: batches, resume, several processes, broken samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from colour_corpus import make_splits, on_rank, with_broken_image, write
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Batch

MakeData = Callable[..., RimeDataModule]


class Recorder(L.LightningModule):
    """Trains one number and notes which batch it saw at which step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[str, ...]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch.position, tuple(batch.keys)))
        return (self.weight - batch.position) ** 2

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("killed")


def fit(
    data: RimeDataModule,
    folder: Path,
    *,
    kill: int | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Recorder:
    model = Recorder()
    callbacks: list[Callback] = [Kill(kill)] if kill is not None else []
    if "save" in settings:
        callbacks.append(ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **settings.pop("save")))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    try:
        trainer.fit(model, data, ckpt_path=resume, weights_only=False)
    except KeyError:
        assert kill is not None
    return model


@pytest.mark.parametrize(("steps_per_epoch", "num_workers"), [(None, 0), (5, 0), (5, 2)])
def test_three_epochs_are_the_plan_read_from_its_start(
    make_data: MakeData, tmp_path: Path, steps_per_epoch: int | None, num_workers: int
) -> None:
    data = make_data(num_workers=num_workers, steps_per_epoch=steps_per_epoch)
    seen = fit(data, tmp_path).seen
    length = steps_per_epoch or 37 // 4 + 13 // 4
    assert [position for position, _ in seen] == list(range(3 * length))
    train = read_split(data.path, "train")
    assert data._plan is not None
    assert [keys for _, keys in seen] == [
        tuple(train[index].name for index in data._plan.batch(position).indices)
        for position in range(3 * length)
    ]


BATCH_END, VAL_END = {"every_n_train_steps": 1}, {"every_n_epochs": 1}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("save", "kill", "num_workers"),
    [
        *((BATCH_END, kill, 0) for kill in (1, 3, 5, 6, 12)),  # 5: an epoch's last batch
        *((save, kill, 0) for save in (VAL_END, EPOCH_END) for kill in (5, 7)),
        (BATCH_END, 8, 2),
        (VAL_END, 12, 2),
    ],
)
def test_killed_anywhere_and_resumed_it_sees_every_batch_once(
    make_data: MakeData, tmp_path: Path, save: dict[str, Any], kill: int, num_workers: int
) -> None:
    whole = fit(make_data(steps_per_epoch=5), tmp_path).seen
    first = fit(make_data(steps_per_epoch=5, num_workers=num_workers), tmp_path, kill=kill, save=dict(save))
    trained, checkpoint = max((int(path.stem.split("=")[1]), path) for path in tmp_path.glob("*.ckpt"))
    assert torch.load(checkpoint, weights_only=False)["RimeDataModule"]["position"] == trained
    second = fit(make_data(steps_per_epoch=5, num_workers=num_workers), tmp_path, resume=checkpoint)
    assert first.seen[:trained] + second.seen == whole


def test_position_counts_trained_batches_not_prefetched_ones(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(num_workers=2)
    fit(data, tmp_path, limit_train_batches=3)
    assert data.position == 9


@pytest.mark.parametrize("setting", ["seed", "data", "batch_size", "tasks"])
def test_resume_with_other_data_or_settings_is_refused(
    make_data: MakeData, tmp_path: Path, setting: str
) -> None:
    fit(make_data(), tmp_path, save={"every_n_train_steps": 2}, limit_train_batches=2)
    checkpoint = next(tmp_path.glob("*.ckpt"))
    splits = make_splits()
    splits["train"].pop()
    other = {
        "seed": lambda: make_data(seed=1),
        "data": lambda: make_data(path=write(tmp_path / "other", splits)),
        "batch_size": lambda: make_data(batch_size=2),
        "tasks": lambda: make_data(tasks=["big"]),
    }[setting]()
    name = {"data": "data_hash"}.get(setting, f"data.{setting}")
    with pytest.raises(RimeError, match=rf"{name} .*must be .* as in the checkpoint, but is"):
        fit(other, tmp_path, resume=checkpoint)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_read_the_same_global_batches(make_data: MakeData, world_size: int) -> None:
    alone = [batch.keys for batch in _loader(make_data())]
    ranks = [_loader(on_rank(make_data(), rank, world_size)) for rank in range(world_size)]
    together = [[key for batch in batches for key in batch.keys] for batches in zip(*ranks, strict=True)]
    assert together == alone


def test_batch_size_must_divide_by_the_processes(make_data: MakeData) -> None:
    with pytest.raises(RimeError, match=r"but is 4 with 3 processes. Set data.batch_size to 6"):
        _loader(on_rank(make_data(), 0, 3))


def test_task_smaller_than_a_batch(make_data: MakeData) -> None:
    with pytest.raises(RimeError, match=r"data.batch_size must be at most 13, but is 16"):
        make_data(batch_size=16).setup("fit")


def test_unknown_task(make_data: MakeData) -> None:
    with pytest.raises(RimeError, match=r"data.tasks .*/train, but \['nope'\] .* has \['big', 'small'\]"):
        make_data(tasks=["big", "nope"]).setup("fit")


def test_chosen_tasks_only(make_data: MakeData) -> None:
    data = make_data(tasks=["small"])
    assert {batch.dataset for batch in _loader(data)} == {"small"}
    assert {name for batch in data.val_dataloader()[0] for name in batch.datasets} == {"small"}


def test_a_broken_sample_stops_training_and_is_named(make_data: MakeData, tmp_path: Path) -> None:
    path, name = with_broken_image(tmp_path)
    with pytest.raises(DataError) as error:
        _loader(make_data(path=path))
    assert name in str(error.value) and "target.media" in str(error.value)
    assert "At most 0.0 of the samples may be broken (data.max_broken_share), but 1 of 50" in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_below_the_share_a_broken_sample_is_replaced(
    make_data: MakeData, tmp_path: Path, num_workers: int
) -> None:
    path, name = with_broken_image(tmp_path)
    data = make_data(path=path, max_broken_share=0.05, num_workers=num_workers)
    batches = _loader(data)
    assert set(data.broken) == {name}
    keys = [key for batch in batches for key in batch.keys]
    assert name not in keys and all(len(batch) == 4 for batch in batches)
    intact = [key for batch in _loader(make_data()) for key in batch.keys]
    assert sum(a != b for a, b in zip(keys, intact, strict=True)) == 1


def test_missing_rewrite_is_broken_only_where_rewrites_are_needed(
    make_data: MakeData, tmp_path: Path
) -> None:
    splits = make_splits()
    splits["train"] = [
        replace(pair, target=replace(pair.target, rewrite=None)) if number % 2 else pair
        for number, pair in enumerate(splits["train"])
    ]
    path = write(tmp_path / "half", splits)
    with pytest.raises(
        DataError,
        match=r"25 of 50 training pairs have no rewrite on one side or both, for example .*big-0001,",
    ):
        make_data(path=path).setup("fit")
    for batch in _loader(make_data(path=path, require_rewrites=False)):
        assert batch.query.annotated.all(), "the rewrite of one side still teaches to write"
        assert batch.target.annotated.tolist() == [True, True, False, False]
    for batch in _loader(make_data(path=path, rewrites="none")):
        assert not batch.query.annotated.any() and not batch.target.annotated.any()


def test_where_few_have_a_rewrite_they_come_round_more_often(make_data: MakeData, tmp_path: Path) -> None:
    """Pairs are annotated when they have a rewrite, not only when a share of them is hidden."""
    splits = make_splits()
    splits["train"] = [
        pair if number % 3 == 0 else without_rewrites(pair) for number, pair in enumerate(splits["train"])
    ]
    settings = {"path": write(tmp_path / "sparse", splits), "batch_size": 4, "require_rewrites": False}
    for batch in _loader(make_data(**settings)):
        assert batch.query.annotated.tolist() == [True, True, False, False]
    alike = [
        batch.query.annotated.sum() for batch in _loader(make_data(**settings, annotated_batch_share=None))
    ]
    assert len(set(map(int, alike))) > 1, "drawn alike, batches differ"
    rest = _loader(make_data(**settings, rewrites="unannotated"))
    assert not any(batch.query.annotated.any() for batch in rest)


def test_missing_folder_and_missing_split(make_data: MakeData, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path must be a corpus folder, but .*nowhere.* does not exist"):
        make_data(path=tmp_path / "nowhere").setup("fit")
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: this file is missing"):
        make_data(path=tmp_path / "copy").setup("fit")


def _loader(data: RimeDataModule) -> list[Batch]:
    data.setup("fit")
    return [*data.train_dataloader()]  # type: ignore[list-item]
