"""`rime base`: make the tiny base model of a corpus from its captions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from rime_pl.datamodules.shards import ShardReader, of_tasks, read_split
from rime_pl.errors import RimeError
from rime_pl.miniature.tiny import TinyConfig, make_base
from rime_pl.types import Medium, Pair


def run(
    *,
    data: Path,
    output: Path,
    seed: int = 0,
    tasks: list[str] | None = None,
    vision_steps: int = TinyConfig.vision_steps,
    copy_steps: int = TinyConfig.copy_steps,
    num_steps: int = TinyConfig.num_steps,
    batch_size: int = TinyConfig.batch_size,
    num_threads: int = 2,
) -> int:
    """Make the tiny base model: a small Qwen3-VL that learns to caption what a corpus shows.

    Args:
        data: Corpus folder with a captions split.
        output: Hugging Face folder to write.
        seed: Seed of the weights and of the order of the captions.
        tasks: Tasks whose words the tokenizer learns (default: all of the corpus).
        vision_steps: Training steps of the vision tower, on the words of the captions.
        copy_steps: Training steps of the decoder, on copying words.
        num_steps: Training steps of the decoder, on captions.
        batch_size: Texts or captions of a step.
        num_threads: CPU threads.
    """
    torch.set_num_threads(num_threads)
    config = TinyConfig(
        vision_steps=vision_steps, copy_steps=copy_steps, num_steps=num_steps, batch_size=batch_size
    )
    samples, texts = read_captions(data)
    texts += read_words(data, tasks)
    columns = (
        TextColumn("pre-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns) as progress:
        total = config.vision_steps + config.copy_steps + config.num_steps
        task = progress.add_task("", total=total, loss=float("nan"))
        on_step = partial(_advance, progress, task)
        make_base(output, samples, texts, config, seed, on_step)
    print(f"base model: {output}")
    return 0


def read_captions(data: Path) -> tuple[list[tuple[Medium, list[str]]], list[str]]:
    """Return pictures, clips and pages of the captions split with their captions, and all its texts."""
    reader = ShardReader(read_split(data, "captions"))
    pairs = [reader.read(n) for n in track(range(len(reader)), "reading captions")]
    samples = [(pair.query.media[0], pair.target.text.split("\n")) for pair in pairs if pair.query]
    return samples, [text for pair in pairs for text in _texts(pair)]


def read_words(data: Path, tasks: list[str] | None) -> list[str]:
    """Return texts of the training pairs, for the tokenizer only: a downloaded one would know their words.

    Raises:
        RimeError: If the corpus has no such task.
    """
    entries = read_split(data, "train")
    known = {entries.tasks[code] for code in np.unique(entries.task_codes()).tolist()}
    if unknown := set(tasks or ()) - known:
        raise RimeError(f"--tasks {' '.join(sorted(unknown))}: no such task in {data}.")
    train = ShardReader(of_tasks(entries, tasks or None, data))
    step = max(1, len(train) // 4000)
    return [
        text for n in track(range(0, len(train), step), "reading words") for text in _texts(train.read(n))
    ]


def _advance(progress: Progress, task: TaskID, step: int, loss: float) -> None:
    progress.update(task, completed=step + 1, loss=loss)


def _texts(pair: Pair) -> list[str]:
    items = [pair.target, *([pair.query] if pair.query else [])]
    return [f"{item.instruction} {item.text}\n{item.rewrite or ''}" for item in items]
