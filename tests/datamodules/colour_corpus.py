"""A tiny corpus of coloured squares and a processor without a model, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.plain_tars import index
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import DataError
from rime_pl.types import Batch, Completions, EvalBatch, Item, Pair, Prompts, Rows, Side, content_hash


def colour(number: int) -> Image.Image:
    """A picture of 8 to 14 pixels a side; equal numbers give equal pictures."""
    return Image.new("RGB", (8 + number % 5, 8 + number % 7), (number, 255 - number, number // 2))


def make_pairs(task: str, count: int, contents: int, start: int = 0) -> list[Pair]:
    """Text -> coloured square; sample n shows content n modulo ``contents``."""
    pairs = []
    for number in range(count):
        content = f"colour {start + number % contents}"
        query = Item(
            f"number {number}", (), content, "Find it.", f"It is {content}.", f"Step. It is {content}."
        )
        image = colour(start + number % contents)
        target = Item("", (image,), content, "Look.", f"One sees {content}.")
        negative = Item("", (colour(255 - start - number % contents), image), f"not {content}")
        pairs.append(Pair(f"{task}-{number:04d}", task, "pictures", query, target, (negative,)))
    return pairs


def make_splits() -> dict[str, list[Pair]]:
    distractors = [
        Pair(f"d-{n:04d}", "distractors", "pictures", None, Item("", (colour(n),), f"colour {n}"))
        for n in range(95, 110)
    ]
    return {
        "train": make_pairs("big", 37, 20) + make_pairs("small", 13, 13),
        "val": make_pairs("big", 11, 6, start=40) + make_pairs("small", 7, 7, start=60),
        "test": make_pairs("big", 9, 5, start=80) + make_pairs("small", 5, 5, start=95),
        "distractors": distractors,
    }


def write(folder: Path, splits: dict[str, list[Pair]], samples_per_shard: int = 16) -> Path:
    totals = {name: len(pairs) for name, pairs in splits.items()}
    write_corpus(folder, "colours", "CC0", splits, totals, seed=0, samples_per_shard=samples_per_shard)
    return folder


class PlainProcessor:
    """Stands in for ``RimeProcessor``: one token a row, so that a test sees which pairs came."""

    def check(self, pair: Pair, sides: Sequence[Side], cut: bool) -> tuple[Pair, list[str]]:
        if pair.query is None or len(pair.query.rewrite or "") <= 40 or "query" not in sides:
            return pair, []
        if not cut:
            raise DataError(f"{pair.key}: field 'query.rewrite' is too long.")
        short = replace(pair.query, rewrite=str(pair.query.rewrite)[:40])
        return replace(pair, query=short), [f"{pair.key} (query): rewrite"]

    def training_batch(self, pairs: Sequence[Pair], position: int, further: bool = False) -> Batch:
        queries = [pair.query for pair in pairs if pair.query is not None]
        targets = [pair.target for pair in pairs]
        return Batch(
            query=self._rows(queries),
            target=self._rows(targets),
            query_content=_hashes(queries),
            target_content=_hashes(targets),
            dataset=pairs[0].dataset,
            keys=[pair.key for pair in pairs],
            query_texts=[item.text for item in queries],
            position=position,
        )

    def eval_batch(self, side: Side, pairs: Sequence[Pair]) -> EvalBatch:
        items = [pair.query if side == "query" and pair.query else pair.target for pair in pairs]
        return EvalBatch(
            side=side,
            prompts=self._prompts(items),
            completions=self._completions(len(items)),
            item_ids=torch.tensor([content_hash(f"{side} {pair.key}") for pair in pairs]),
            content_ids=_hashes(items),
            relevant_ids=_hashes([pair.target for pair in pairs]),
            distractor=torch.tensor([pair.query is None for pair in pairs]),
            datasets=[pair.dataset for pair in pairs],
            galleries=[pair.gallery for pair in pairs],
            keys=[pair.key for pair in pairs],
            items=items,
        )

    def _rows(self, items: Sequence[Item]) -> Rows:
        annotated = torch.tensor([item.rewrite is not None for item in items])
        return Rows(self._prompts(items), self._completions(len(items)), annotated)

    def _prompts(self, items: Sequence[Item]) -> Prompts:
        ids = _hashes(items)[:, None]
        return Prompts(
            ids, torch.ones_like(ids), None, None, torch.tensor([len(item.media) for item in items])
        )

    def _completions(self, rows: int) -> Completions:
        return Completions(torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1, dtype=torch.int64))


def _hashes(items: Sequence[Item]) -> torch.Tensor:
    return torch.tensor([content_hash(item.content_id) for item in items])


def on_rank(data: RimeDataModule, rank: int, world_size: int) -> RimeDataModule:
    place = {"rank": rank, "num_replicas": world_size}
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs=place, state=SimpleNamespace(fn=None), world_size=1
    )  # type: ignore
    return data


def with_broken_image(tmp_path: Path, split: str = "train") -> tuple[Path, str]:
    """A corpus in which the bytes of one picture are garbage."""
    path = write(tmp_path / "broken", make_splits())
    entry = next(entry for entry in read_split(path, split)[2:] if entry.key.startswith("big"))
    offset, size = entry.members["t0.png"]
    with entry.shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    index(path)  # of a program that wrote it so: bytes that change later make both sides broken
    return path, entry.name
