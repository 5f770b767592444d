"""The same global batches for any number of ranks and workers, and after a kill at any batch."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from colour_corpus import make_pairs, write

from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.datamodules.batch_plan import OrderSettings
from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.loading import BatchLoader, Position

MakeData = Callable[..., RimeDataModule]


class Run:
    """All ranks of a run, read in step, as far as it comes."""

    def __init__(self, make: Callable[[], RimeDataModule], world_size: int, trained: int) -> None:
        self.loaders = []
        for rank in range(world_size):
            data = make()
            place = {"rank": rank, "num_replicas": world_size}
            state = SimpleNamespace(fn=None)
            data.trainer = SimpleNamespace(distributed_sampler_kwargs=place, state=state, world_size=1)  # type: ignore
            data.setup("fit")
            data._position.restore(trained)
            self.loaders.append(iter(data.train_dataloader()))

    def read(self, count: int) -> list[list[str]]:
        """Return the keys of the next global batches."""
        batches = []
        for _ in range(count):
            parts = [next(loader) for loader in self.loaders]
            assert len({part.position for part in parts}) == 1  # type: ignore[union-attr]
            assert len({len(part) for part in parts}) == 1
            batches.append(sorted(key for part in parts for key in part.keys))
        return batches


def draw(rng: random.Random, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A corpus with tars of a random size, and settings of its order."""
    pairs = [
        *make_pairs("big", rng.randrange(60, 150), 50),
        *make_pairs("small", rng.randrange(30, 60), 40, start=60),
        *make_pairs("tiny", rng.randrange(3, 20), 30, start=120),
    ]
    if rng.random() < 0.5:
        rng.shuffle(pairs)
    share = rng.choice((None, 0.25, 0.5))
    if share:
        pairs = [pair if n % 3 == 0 else without_rewrites(pair) for n, pair in enumerate(pairs)]
    write(folder, {"train": pairs}, samples_per_shard=rng.randrange(1, 40))
    order = OrderSettings(
        weights={"big": rng.choice((0.5, 1.0, 2.0))},
        caps={"small": rng.choice((25, 1000))},
        block_size=rng.choice((None, 8, 12)),
        small_tasks="leave_out" if share else rng.choice(("leave_out", "repeat")),
        window=rng.choice((1, 30, 16384)),
    )
    return folder, {"order": order, "annotated_batch_share": share, "require_rewrites": False, "seed": 7}


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_batch_and_continued_by_others_every_batch_is_that_of_the_plan(
    make_data: MakeData, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    path, settings = draw(rng, tmp_path / "corpus")

    def make(num_workers: int = 0) -> RimeDataModule:
        return make_data(path=path, batch_size=24, steps_per_epoch=100, num_workers=num_workers, **settings)

    data = make()
    data.setup("fit")
    plan, pairs = data._plan, data._train
    assert plan is not None and pairs is not None
    expected = [
        sorted(pairs.entries[index].name for index in plan.batch(position).indices) for position in range(20)
    ]
    seen: list[list[str]] = []
    while len(seen) < 20:  # each run is killed after some batches; the next one has other ranks and workers
        world_size, num_workers = rng.choice((1, 2, 3, 4, 6, 8)), rng.choice((0, 0, 1, 2, 4))
        if world_size > 3:
            num_workers = min(num_workers, 1)
        run = Run(lambda workers=num_workers: make(workers), world_size, len(seen))  # type: ignore[misc]
        seen += run.read(min(rng.randrange(1, 9), 20 - len(seen)))
    assert seen == expected
    assert Counter(key for batch in seen for key in batch) == Counter(
        key for each in expected for key in each
    )


class Pids:
    """Hands over the number of the process that reads."""

    reader: tuple[int, ...] = ()

    def __getitem__(self, number: int) -> Fetched:
        return Fetched(batch=os.getpid())  # type: ignore[arg-type]


def test_workers_of_training_stay_between_epochs_and_end_when_it_ends() -> None:
    position = Position()
    loader = BatchLoader(Pids(), 6, BrokenSamples("x", 0.0), 2, position)  # type: ignore[arg-type]
    first = set(loader)
    position.restore(6)
    assert set(loader) == first and len(first) == 2 and os.getpid() not in first
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in first)
    evaluation = BatchLoader(Pids(), 6, BrokenSamples("x", 0.0), 2)  # type: ignore[arg-type]
    assert set(evaluation).isdisjoint(set(evaluation))


def test_an_epoch_that_was_left_in_the_middle_goes_on_where_training_stands(
    make_data: MakeData,
) -> None:
    """A limit of the trainer leaves batches that were read ahead: they come again."""
    data = make_data(num_workers=2, steps_per_epoch=8)
    data.setup("fit")
    loader = data.train_dataloader()
    reading = iter(loader)
    for _ in range(3):
        next(reading)
    reading.close()  # type: ignore[attr-defined]
    data._position.restore(3)
    assert [batch.position for batch in loader] == [3, 4, 5, 6, 7]  # type: ignore[union-attr]
