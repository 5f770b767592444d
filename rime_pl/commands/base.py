"""`rime base`: make the tiny base model of a corpus from its captions."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.miniature.tiny import TinyConfig, make_base
from rime_pl.types import Pair


def run(
    *,
    data: Path,
    output: Path,
    seed: int = 0,
    tasks: list[str] | None = None,
    vision_steps: int = TinyConfig.vision_steps,
    num_steps: int = TinyConfig.num_steps,
    batch_size: int = TinyConfig.batch_size,
    num_threads: int = 2,
) -> int:
    """Make the tiny base model: a small Qwen3-VL that learns to caption the pictures of a corpus.

    Args:
        data: Corpus folder with a captions split.
        output: Hugging Face folder to write.
        seed: Seed of the weights and of the order of the captions.
        tasks: Tasks whose words the tokenizer learns (default: all of the corpus).
        vision_steps: Training steps of the vision tower, on the words of the captions.
        num_steps: Training steps of the whole model, on captions.
        batch_size: Captions of a step.
        num_threads: CPU threads.
    """
    torch.set_num_threads(num_threads)
    captions = ShardReader(read_split(data, "captions"))
    pairs = [captions.read(n) for n in track(range(len(captions)), "reading captions")]
    samples = [(pair.query.images[0], pair.target.text.split("\n")) for pair in pairs if pair.query]
    texts = [text for pair in pairs for text in _texts(pair)]
    # The tokenizer sees the words of the tasks, as a downloaded one would know them; the model does not.
    entries = read_split(data, "train")
    unknown = set(tasks or ()) - {entry.dataset for entry in entries}
    if unknown:
        raise RimeError(f"--tasks {' '.join(sorted(unknown))}: no such task in {data}.")
    train = ShardReader([entry for entry in entries if not tasks or entry.dataset in tasks])
    step = max(1, len(train) // 4000)
    for n in track(range(0, len(train), step), "reading words"):
        texts += _texts(train.read(n))
    config = TinyConfig(vision_steps=vision_steps, num_steps=num_steps, batch_size=batch_size)
    columns = (
        TextColumn("pre-training on captions"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=config.vision_steps + config.num_steps, loss=float("nan"))
        make_base(
            output,
            samples,
            texts,
            config,
            seed,
            lambda n, loss: progress.update(task, completed=n + 1, loss=loss),
        )
    print(f"base model: {output}")
    return 0


def _texts(pair: Pair) -> list[str]:
    items = [pair.target, *([pair.query] if pair.query else [])]
    return [f"{item.instruction} {item.text}\n{item.rewrite or ''}" for item in items]
