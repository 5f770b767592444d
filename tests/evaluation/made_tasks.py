"""Small tasks made by hand: texts, pictures on disk, opened pictures and clips, in local and global pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.types import Clip, Item

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "pink", "brown")
SHAPES = ("ring", "star", "square", "circle")


class Read(Sequence[Item]):
    """Items that are read when they are asked for, as a reader makes them."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.asked = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return self.items[index]


def texts(count: int, start: int = 0) -> list[Item]:
    """Distinct texts."""
    numbers = range(start, start + count)
    return [
        Item(f"a {COLOURS[n % 10]} {SHAPES[n // 10 % 4]} number {n}", instruction="Find it.") for n in numbers
    ]


def pictures(folder: Path, count: int) -> list[Item]:
    """Pictures on disk, one an item; their sizes differ."""
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for n in range(count):
        path = folder / f"{n}.png"
        Image.new("RGB", (32 + 8 * (n % 3), 40), COLOURS[n % 10]).save(path)
        items.append(Item("", (path,)))  # type: ignore[arg-type]
    return items


def local_task(folder: Path, count: int = 6, name: str = "Local") -> BenchmarkTask:
    """Text queries and pools of four pictures, the right one first."""
    candidates = pictures(folder, 10)
    return BenchmarkTask(
        *("mmeb-v2", name, "image", "I-RET", "hit@1"),
        Read(texts(count)),
        Read(candidates),
        [f"{n}.png" for n in range(10)],
        [{n % 10: 1.0} for n in range(count)],
        [[(n + shift) % 10 for shift in range(4)] for n in range(count)],
        version="made by hand",
    )


def global_task(folder: Path, count: int = 5, name: str = "Global") -> BenchmarkTask:
    """Opened pages, clips and a blank candidate; two graded answers a query; some texts of `local_task`."""
    frames = tuple(Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    clips = [Item("", (Clip(frames, (0.0, 1.0)),)), Item("a walk", (Clip(frames[::-1], (0.0, 1.0)),))]
    opened = [Item("", (Image.new("RGB", (36, 36), colour),)) for colour in COLOURS[:4]]
    candidates = [*clips, *opened, Item("", content_id="blank"), *pictures(folder, 2)]
    return BenchmarkTask(
        *("mmeb-v2", name, "visdoc", "D-OOD", "ndcg_linear@5"),
        Read(texts(count, start=3)),
        Read(candidates),
        list(range(100, 100 + len(candidates))),
        [{n: 1.0, n + 2: 2.0} for n in range(count)],
        info=[{"id": n} for n in range(count)],
    )


def with_main(task: BenchmarkTask, **changes: Any) -> BenchmarkTask:
    """The task with other fields."""
    return replace(task, **changes)
