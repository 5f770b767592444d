"""What the tutorials share: the trained run, pairs of its corpus, and the verdict on an exercise.

Imported by the tutorials beside it. Nothing of the method is here: ``train_steps`` calls the stage's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before tokenizers are imported

import torch

from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.quiet import quiet_other_libraries
from rime_pl.run_folder import RunFolder
from rime_pl.types import Batch, Pair

quiet_other_libraries()
warnings.filterwarnings("ignore", message='install "ipywidgets"')  # a page shows no moving bar

ROOT = Path(__file__).resolve().parents[2]
#: Names the folder of another CMA run; tests give one that is made in seconds.
VARIABLE = "RIME_TUTORIAL_RUN"
COLOURS = {"disc": "#0072b2", "gen": "#d55e00", "right": "#009e73", "wrong": "#999999"}  # Okabe-Ito


def trained_run(stage: Literal["cma", "sft"] = "cma") -> RunFolder:
    """Return the CMA run that the tutorials look at, or the SFT run that it started from.

    Raises:
        RimeError: If it is not there.
    """
    run = RunFolder(ROOT / os.environ.get(VARIABLE, "runs/openmoji-tiny-seed0/cma"))
    if run.finished and stage == "sft":
        before = run.before()
        assert before is not None, f"{run} must have started from an SFT run"
        run = RunFolder(ROOT / before.path)
    if not run.finished:
        raise RimeError(f"{run} must be a finished run, but is none. Run `make train-cma` first.")
    return run


def corpus_of(run: RunFolder) -> Path:
    """Return the corpus folder that a run was trained on.

    Raises:
        RimeError: If it is gone.
    """
    if run.corpus is None:
        raise RimeError(f"The corpus of {run} must be there, but is not. Run `make train-cma` again.")
    return run.corpus


def read_pairs(corpus: Path, split: str, task: str | None = None, most: int = 100) -> list[Pair]:
    """Return the first pairs of a split, or of one of its tasks."""
    reader = ShardReader(read_split(corpus, split, None if task is None else [task]))
    return [reader.read(number) for number in range(min(most, len(reader)))]


def verdict(check: Callable[[Any], None], answer: Any) -> str:
    """Return in words whether an answer passes the check of its exercise."""
    try:
        check(answer)
    except NotImplementedError:
        return "Not solved yet: write the function above, then run this cell again."
    except AssertionError as error:
        return f"Not right yet: {error}"
    return "Solved. Well done."


def train_steps(
    module: RimeModule, backbone: Backbone, batches: Iterable[Batch], learning_rate: float
) -> list[dict[str, float]]:
    """Run training steps of a stage without a trainer, and return what each step logged.

    Args:
        module: SFT or CMA, with its settings.
        backbone: What trains.
        batches: One for each step.
        learning_rate: Of AdamW.
    """
    logged: list[dict[str, float]] = []
    watched: Any = module
    watched.backbone = backbone
    watched.log = lambda name, value, **_: logged[-1].update({name: float(value)})
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for number, batch in enumerate(batches):
        logged.append({})
        optimizer.zero_grad()
        watched.training_step(batch, number).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return logged
