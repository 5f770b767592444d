"""`rime base`: make the tiny base model of a corpus from its captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from rime_pl.bars import Bar
from rime_pl.corpus_places import BASE_MARKER, BASE_RECORD
from rime_pl.datamodules.captions import Captions, read_captions
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.errors import RimeError
from rime_pl.miniature.tiny import TinyConfig, make_base
from rime_pl.options.parser import parse
from rime_pl.run_folder import write_json

#: Key of the record of a base model that holds its recipe.
MADE_WITH = "made_with"


def run(
    *,
    data: Path,
    output: Path,
    seed: int = 0,
    tasks: list[str] | None = None,
    picture_side: int = 96,
    max_pictures: int = 4000,
    vision_steps: int = TinyConfig.vision_steps,
    copy_steps: int = TinyConfig.copy_steps,
    num_steps: int = TinyConfig.num_steps,
    batch_size: int = TinyConfig.batch_size,
    learning_rate: float = TinyConfig.learning_rate,
    num_threads: int = 2,
) -> int:
    """Make the tiny base model: a small Qwen3-VL that learns to caption what a corpus shows.

    The captions are those of the split 'captions', or else the texts and pictures of the training pairs. No
    other split is read.

    Args:
        data: Corpus folder.
        output: Hugging Face folder to write.
        seed: Seed of the weights and of the order of the captions.
        tasks: Tasks whose words the tokenizer learns, and whose pictures are captioned where the corpus has
            no split 'captions' (default: all of the corpus).
        picture_side: Pixels of the longer side of a picture, where the corpus has no split 'captions'. A
            larger one is made smaller here, and whenever the model sees it later.
        max_pictures: Largest number of pictures, where the corpus has no split 'captions'.
        vision_steps: Training steps of the vision tower, on the words of the captions.
        copy_steps: Training steps of the decoder, on copying words.
        num_steps: Training steps of the decoder, on captions.
        batch_size: Texts or captions of a step.
        learning_rate: Peak learning rate of the vision tower and of the decoder.
        num_threads: CPU threads.
    """
    _check_values(picture_side, max_pictures, learning_rate)
    torch.set_num_threads(num_threads)
    captions = read_captions(data, tasks, picture_side, max_pictures, seed)
    for note in captions.notes:
        print(note)
    steps = {"vision_steps": vision_steps, "copy_steps": copy_steps, "num_steps": num_steps}
    config = TinyConfig(**steps, batch_size=batch_size, learning_rate=learning_rate)
    others = {"tasks": tasks, "picture_side": picture_side, "max_pictures": max_pictures}
    _begin(output, data, {"seed": seed, MADE_WITH: asdict(config) | others | {"num_threads": num_threads}})
    if captions.without_pictures:
        config = replace(config, vision_steps=0)
    _train(captions, config, output, seed)
    print(f"base model: {output}")
    return 0


def made_otherwise(base: Path, words: Sequence[str]) -> str:
    """Return which steps, sizes, tasks or threads of a base model ``words`` would make otherwise; "" if none.

    Seed and corpus are not compared: they decided which folder was taken.

    Args:
        base: Folder of a finished base model.
        words: Options of ``rime base``, as words of the command line.
    """
    kept = json.loads((base / BASE_RECORD).read_bytes()) if (base / BASE_RECORD).is_file() else None
    record = kept.get(MADE_WITH) if isinstance(kept, dict) else None
    if not isinstance(record, dict):
        return "an earlier version made it, and kept no record of the recipe"
    given = parse(run, "rime base", words)
    wanted = {name: given.get(name, usual) for name, usual in asdict(TinyConfig()).items()}
    wanted |= {name: given[name] for name in ("tasks", "picture_side", "max_pictures", "num_threads")}
    names = sorted(name for name in {*record, *wanted} if record.get(name) != wanted.get(name))
    if "--num_threads" not in words:  # then any number will do
        names = [name for name in names if name != "num_threads"]
    differing = (f"{name} {record.get(name)} instead of {wanted.get(name)}" for name in names)
    return "made with " + ", ".join(differing) if names else ""


def _check_values(picture_side: int, max_pictures: int, learning_rate: float) -> None:
    for name, value, least in (("picture_side", picture_side, 24), ("max_pictures", max_pictures, 2)):
        if value < least:
            raise RimeError(f"--{name} must be {least} or more, but is {value}.")
    if learning_rate <= 0:
        raise RimeError(f"--learning_rate must be above 0, but is {learning_rate}.")


def _begin(output: Path, data: Path, made: dict[str, Any]) -> None:
    """Keep what the model is made from. A stop must not leave an old model with this record."""
    about = read_corpus(data)
    output.mkdir(parents=True, exist_ok=True)
    (output / BASE_MARKER).unlink(missing_ok=True)
    write_json(output / BASE_RECORD, {"corpus": about.get("name"), "data_hash": about["data_hash"], **made})


def _train(captions: Captions, config: TinyConfig, output: Path, seed: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Bar(*columns) as progress:
        total = config.vision_steps + config.copy_steps + config.num_steps
        task = progress.add_task("pre-training", total=total, loss=float("nan"))
        on_step = partial(_advance, progress, task)
        make_base(output, captions.samples, captions.texts, config, seed, on_step)


def _advance(progress: Bar, task: TaskID, step: int, loss: float) -> None:
    progress.update(task, completed=step + 1, loss=loss)
