"""Pairs without rewrites, as a corpus and as a table, and a source that is only a list."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import DataError
from rime_pl.teacher.cache import Answers
from rime_pl.teacher.jobs import SIDES, Jobs, Order
from rime_pl.teacher.settings import Filters, Price, Teacher
from rime_pl.types import Item, Pair

#: What nobody who writes a query's rewrite may see: it is in every target and in no query.
SECRET = "zanzibar"


def picture(number: int, form: str = "PNG", size: tuple[int, int] = (12, 9)) -> Image.Image:
    """An undecoded picture; equal numbers give equal bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 9 % 256, 200, 30)).save(buffer, form)
    return Image.open(buffer)


def pair(number: int, **query: Any) -> Pair:
    """A picture with a question -> a text, different for each number."""
    asked = Item(f"Which town is number {number}?", (picture(number),), f"town {number}", "Answer.")
    told = Item(f"{SECRET} {number}", (), f"town {number}", f"The {SECRET} of the answer.")
    changed = Item(**{**vars(asked), **query})
    return Pair(f"pair-{number:04d}", "towns", "texts", changed, told)


def make_corpus(folder: Path, count: int = 6, pairs: Sequence[Pair] = ()) -> Path:
    """A corpus with three splits and distractors."""
    train = list(pairs) or [pair(number) for number in range(count)]
    gallery = [Pair("d-0", "distractors", "texts", None, Item("nowhere", (), "nowhere"))]
    splits = {"train": train, "val": [pair(800)], "test": [pair(900)], "distractors": gallery}
    totals = {name: len(rows) for name, rows in splits.items()}
    write_corpus(folder, "towns", "CC0", splits, totals, seed=3, arguments={"a": 1}, samples_per_shard=4)
    return folder


def make_table(folder: Path, count: int = 4, **more: str) -> Path:
    """A CSV with a picture for each query; ``more`` are further columns."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pairs.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["query_text", "query_image", "target_text", *more])
        for number in range(count):
            (folder / f"{number}.png").write_bytes(picture(number).fp.getvalue())  # type: ignore[union-attr]
            writer.writerow(
                [f'town "{number}"; which?\nAnswer', f"{number}.png", f"{SECRET} {number}", *more.values()]
            )
    return file


class Listed:
    """A source that is a list of pairs; None is one that cannot be read."""

    def __init__(self, *pairs: Pair | None) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, number: int) -> str:
        return f"pair {number}"

    def is_asked(self, number: int) -> bool:
        return True

    def read(self, number: int) -> Pair:
        found = self.pairs[number]
        if found is None:
            raise DataError(f"pair {number} is torn.")
        return found


def make_jobs(source: Any, folder: Path, url: str = "http://127.0.0.1:9", **changes: Any) -> Jobs:
    """Jobs whose answers are kept in a folder; fields of Order and Teacher are given by name."""
    fields = {name: changes.pop(name) for name in list(changes) if name in Order.__dataclass_fields__}
    quick: dict[str, Any] = {"timeout": 5.0, "retries": 2, "concurrency": 2, **changes}
    teacher = Teacher(model="teacher", base_url=url, **quick)
    settings = {"way": "write", "sides": SIDES, "filters": Filters(), "price": Price(), **fields}
    return Jobs(Order(teacher=teacher, **settings), source, Answers(folder / "answers.jsonl"))
