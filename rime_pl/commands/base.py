"""`rime base`: make the tiny base model of a corpus from its captions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.miniature.tiny import TinyConfig, make_base
from rime_pl.types import Pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = TinyConfig()
    parser.add_argument("--data", type=Path, required=True, help="corpus folder with a captions split")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tasks", nargs="+", help="tasks whose words the tokenizer learns (default: all of the corpus)"
    )
    parser.add_argument(
        "--vision_steps",
        type=int,
        default=defaults.vision_steps,
        help="steps of the vision tower alone, on the captions' words (%(default)s)",
    )
    parser.add_argument(
        "--num_steps", type=int, default=defaults.num_steps, help="steps on captions (%(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=defaults.batch_size, help="captions a step (%(default)s)"
    )
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads (%(default)s)")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.num_threads)
    captions = ShardReader(read_split(args.data, "captions"))
    pairs = [captions.read(n) for n in track(range(len(captions)), "reading captions")]
    samples = [(pair.query.images[0], pair.target.text.split("\n")) for pair in pairs if pair.query]
    texts = [text for pair in pairs for text in _texts(pair)]
    # The tokenizer sees the words of the tasks, as a downloaded one would know them; the model does not.
    entries = read_split(args.data, "train")
    unknown = set(args.tasks or ()) - {entry.dataset for entry in entries}
    if unknown:
        raise RimeError(f"--tasks {' '.join(sorted(unknown))}: no such task in {args.data}.")
    train = ShardReader([entry for entry in entries if not args.tasks or entry.dataset in args.tasks])
    step = max(1, len(train) // 4000)
    for n in track(range(0, len(train), step), "reading words"):
        texts += _texts(train.read(n))
    config = TinyConfig(vision_steps=args.vision_steps, num_steps=args.num_steps, batch_size=args.batch_size)
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
            args.output,
            samples,
            texts,
            config,
            args.seed,
            lambda n, loss: progress.update(task, completed=n + 1, loss=loss),
        )
    print(f"base model: {args.output}")
    return 0


def _texts(pair: Pair) -> list[str]:
    items = [pair.target, *([pair.query] if pair.query else [])]
    return [f"{item.instruction} {item.text}\n{item.rewrite or ''}" for item in items]
