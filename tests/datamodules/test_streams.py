"""The same global batches for any number of ranks and workers, and after a kill at any batch."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from colour_corpus import make_pairs

from rime_pl.datamodules import loading
from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.datamodules.batch_plan import OrderSettings
from rime_pl.datamodules.broken_samples import BrokenSamples, Fetched
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.loading import BatchLoader, Position
from rime_pl.datamodules.plain_tars import index
from rime_pl.datamodules.shard_writer import Encoder, write_shard

MakeData = Callable[..., RimeDataModule]


class InProcess:
    """Stands in for ``DataLoader``: a worker has a copy of the data set, as a process, and reads ahead."""

    def __init__(self, dataset: Any, sampler: Any, num_workers: int, **_: Any) -> None:
        self.sampler, self.ahead = sampler, 2 * num_workers
        self.workers = [pickle.loads(pickle.dumps(dataset)) for _ in range(num_workers)] or [dataset]

    def __iter__(self) -> Iterator[Any]:
        read: deque[Any] = deque()
        for number, position in enumerate(self.sampler):
            read.append(self.workers[number % len(self.workers)][position])
            if len(read) > self.ahead:
                yield read.popleft()
        yield from read


class Run:
    """All ranks of a run, read in step, until it is killed; ``state`` is that of the checkpoint before it."""

    def __init__(
        self, make: Callable[[], RimeDataModule], world_size: int, state: dict[str, Any] | None
    ) -> None:
        self.ranks, self.trained = [], state["position"] if state else 0
        for rank in range(world_size):
            data = make()
            if state:
                data.load_state_dict(state)
            place = {"rank": rank, "num_replicas": world_size}
            trainer = SimpleNamespace(fn=None)
            data.trainer = SimpleNamespace(distributed_sampler_kwargs=place, state=trainer, world_size=1)  # type: ignore
            data.setup("fit")
            self.ranks.append(data)
        self.loaders = [data.train_dataloader() for data in self.ranks]
        self.reading = [iter(loader) for loader in self.loaders]

    def read(self) -> list[str]:
        """Return the keys of the next global batch; at the end of an epoch the next one begins."""
        parts = [next(one, None) for one in self.reading]
        if parts == [None] * len(parts):
            self.reading = [iter(loader) for loader in self.loaders]
            parts = [next(one) for one in self.reading]
        assert {part.position for part in parts} == {self.trained}  # type: ignore[union-attr]
        assert len({len(part) for part in parts}) == 1  # type: ignore[arg-type]
        self.trained += 1
        for data in self.ranks:
            data._position.restore(self.trained)
        return sorted(key for part in parts for key in part.keys)  # type: ignore[union-attr]

    def kill(self) -> dict[str, Any]:
        """End it, whatever was read ahead, and return the state of a checkpoint."""
        state = self.ranks[0].state_dict()
        for loader in self.loaders:
            loader.close()
        return state


SIZES = {"big": (120, 180), "small": (60, 90), "tiny": (3, 30)}  # of the tasks, at least and less than


def draw(rng: random.Random, folder: Path, batch_size: int, plain: bool) -> tuple[Path, dict[str, Any]]:
    """A corpus whose tars have random sizes, and settings of its order; plain: weights of 1 and no caps."""
    counts = {task: rng.randrange(*sizes) for task, sizes in SIZES.items()}
    pairs = [
        pair
        for start, (task, count) in zip((0, 60, 120), counts.items(), strict=True)
        for pair in make_pairs(task, count, rng.randrange(10, 50), start=start)
    ]
    if rng.random() < 0.5:
        rng.shuffle(pairs)
    share = None if plain else rng.choice((None, 0.25, 0.5 if batch_size <= 40 else None))
    if share:
        pairs = [pair if int(pair.key[-4:]) % 3 == 0 else without_rewrites(pair) for pair in pairs]
    number = 0
    while pairs:
        size = rng.choice((1, 2, 7, 30, 100))
        write_shard(folder / "train" / f"train-{number:06d}.tar", pairs[:size], Encoder())
        pairs, number = pairs[size:], number + 1
    index(folder)
    blocks = [None, *(size for size in range(8 if share else 3, batch_size) if batch_size % size == 0)]
    order = OrderSettings(
        weights={} if plain else {"big": rng.choice((0.5, 1.0, 2.0))},
        caps={} if plain else {"small": rng.choice((25, 1000))},
        block_size=None if plain else rng.choice(blocks),
        small_tasks="leave_out" if share or plain else rng.choice(("leave_out", "repeat")),
        window=rng.choice((1, 30, 16384)),
    )
    return folder, {"order": order, "annotated_batch_share": share, "require_rewrites": False, "seed": 7}


def planned(data: RimeDataModule, num_batches: int) -> list[list[str]]:
    """The keys of the first global batches, from the plan."""
    assert data._plan is not None and data._train is not None
    names = [entry.name for entry in data._train.entries]
    return [sorted(names[i] for i in data._plan.batch(n).indices) for n in range(num_batches)]


def killed_and_continued(
    rng: random.Random,
    make: Callable[..., RimeDataModule],
    places: Iterator[tuple[int, int]],
    num_batches: int,
) -> list[list[str]]:
    """The batches of runs that are killed after some of them; the next run has other ranks and workers."""
    seen: list[list[str]] = []
    state = None
    while len(seen) < num_batches:
        world_size, num_workers = next(places)
        run = Run(functools.partial(make, num_workers=num_workers), world_size, state)
        seen += [run.read() for _ in range(min(rng.randrange(1, 4), num_batches - len(seen)))]
        state = run.kill()
    return seen


#: Pairs of a batch -> numbers of ranks that can share it. Together they are all from 1 to 8, with each other.
WORLDS = {size: [n for n in range(1, 9) if size % n == 0] for size in (24, 30, 35, 40, 42, 56)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("batch_size", WORLDS)
def test_killed_at_any_batch_and_continued_by_others_every_batch_is_that_of_the_plan(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, plain: bool
) -> None:
    """1 to 8 ranks with 0 to 4 workers each, in this process: from the plan to the samples in the tars."""
    monkeypatch.setattr(loading, "DataLoader", InProcess)
    rng = random.Random(2 * batch_size + plain)
    places = list(itertools.product(WORLDS[batch_size], range(5)))
    rng.shuffle(places)
    turns = itertools.cycle(places)
    for corpus in range(2):
        path, settings = draw(rng, tmp_path / f"{corpus}", batch_size, plain)
        steps = rng.randrange(2, 9)
        make = functools.partial(make_data, path, batch_size, steps_per_epoch=steps, **settings)
        whole = make()
        whole.setup("fit")
        assert whole._plan is not None and whole._train is not None
        num_batches = max(12, 2 * len(whole._plan))
        expected = planned(whole, num_batches)
        seen = killed_and_continued(rng, make, turns, num_batches)
        assert seen == expected
        each_as_often_as_the_settings_say(whole, seen, plain)


def each_as_often_as_the_settings_say(data: RimeDataModule, seen: list[list[str]], plain: bool) -> None:
    """In two passes; plain: no sample comes twice, and the report counts those that do not come."""
    assert data._plan is not None and data._train is not None
    tasks = {entry.name: entry.dataset for entry in data._train.entries}
    sizes, order = Counter(tasks.values()), data.order
    block = order.block_size or data.batch_size
    pairs = {}  # of a task in a pass
    for task, size in sizes.items():
        coming = order.weights.get(task, 1.0) * min(size, order.caps.get(task, size))
        pairs[task] = int(coming) // block * block or (block if order.small_tasks == "repeat" else 0)
    assert len(data._plan) == sum(pairs.values()) // data.batch_size
    rest = sum(pairs.values()) % data.batch_size  # blocks that fill no batch
    for start in (0, len(data._plan)):
        keys = Counter(key for batch in seen[start : start + len(data._plan)] for key in batch)
        came = Counter(tasks[key] for key in keys.elements())
        assert sum(pairs[task] - came[task] for task in pairs) == rest
        assert all(came[task] <= pairs[task] for task in pairs)
        if data.annotated_batch_share is None:
            assert all(count <= -(-pairs[tasks[key]] // sizes[tasks[key]]) for key, count in keys.items())
        if plain:
            assert set(keys.values()) == {1}
    waiting = {task: size - pairs[task] for task, size in sizes.items() if size != pairs[task]}
    if plain:
        assert all(f"{task}: {count}" in data._plan.report() for task, count in waiting.items())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 4), (2, 3), (5, 1), (7, 1)])
def test_processes_of_workers_read_the_batches_of_the_plan(
    make_data: MakeData, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    """Real workers, which are killed with their run; the next run has none."""
    rng = random.Random(world_size)
    path, settings = draw(rng, tmp_path / "corpus", 35 if world_size > 2 else 24, plain=False)
    make = functools.partial(make_data, path, 35 if world_size > 2 else 24, steps_per_epoch=4, **settings)
    whole = make()
    whole.setup("fit")
    run = Run(lambda: make(num_workers=num_workers), world_size, None)
    seen = [run.read() for _ in range(5)]
    run = Run(make, 1, run.kill())
    assert seen + [run.read() for _ in range(3)] == planned(whole, 8)


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


def test_a_spawned_worker_reads_the_same_batches(make_data: MakeData) -> None:
    """Where processes are spawned, a worker gets plan and index by pickle and maps the files itself."""
    data = make_data()
    data.setup("fit")
    batches = data.train_dataloader().batches
    again = pickle.loads(pickle.dumps(batches.plan)), pickle.loads(pickle.dumps(batches.reader))  # type: ignore[union-attr]
    for position in (0, 20):
        fetched = batches[position].batch
        names = [again[1].read(index).key for index in again[0].batch(position).indices]
        assert fetched is not None and names == fetched.keys
