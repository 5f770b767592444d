"""What the mutations start from: a micro corpus and base model, a run, and its checkpoint half-way."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from rime_pl.__main__ import dispatch, main
from rime_pl.callbacks.measures import Measures
from rime_pl.run_folder import RunFolder
from tests.micro import build_base, build_corpus
from tests.stages.runs import stage_arguments
from tests.torture.watched import digest


class EnoughError(BaseException):
    """The batch that was waited for is trained. Carries a digest of the trained weights."""


@contextmanager
def ending_after(batches: int) -> Iterator[None]:
    """End a training after some batches."""
    seen = 0
    trained = Measures.on_train_batch_end

    def count(self: Measures, trainer: Any, module: Any, *more: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == batches:
            tensors = [p.detach().cpu().numpy().tobytes() for p in module.parameters() if p.requires_grad]
            raise EnoughError(digest(trainer.global_step, *tensors))
        trained(self, trainer, module, *more)

    with mock.patch.object(Measures, "on_train_batch_end", count):
        yield


def first_step(words: list[str]) -> str:
    """Train one batch by the real command line, and return a digest of the weights after it.

    Raises:
        RimeError: As the command; only what its ``main`` would print is left to the caller.
    """
    try:
        with ending_after(1):
            dispatch(words)
    except EnoughError as enough:
        return str(enough)
    return "nothing to train"


class Sources:
    """The folders that inputs are copied from; nobody changes them."""

    def __init__(self, folder: Path) -> None:
        self.scenes, self.base = folder / "scenes", folder / "base"
        self.colours = folder / "colours"
        self.run, self.halfway = RunFolder(folder / "runs/x/sft"), RunFolder(folder / "halfway/sft")
        self.reports = folder / "reports"

    def arguments(self, run: Path | RunFolder, *more: str) -> list[str]:
        """Return the words of a short SFT run."""
        return stage_arguments("sft", self.scenes, self.base, Path(str(run)), *more)

    def build(self, trained: bool = True) -> None:
        """Build everything in a process of its own, because one that has trained must not be forked."""
        process = multiprocessing.get_context("fork").Process(target=_build, args=(self, trained))
        process.start()
        process.join()
        assert process.exitcode == 0


def _build(sources: Sources, trained: bool) -> None:
    from tests.torture import corpora, reports  # which import this file

    build_corpus(sources.scenes)
    build_base(sources.base, sources.scenes)
    corpora.build(sources.colours)
    reports.build(sources.reports, sources.colours)
    if not trained:
        return
    assert main(sources.arguments(sources.run)) == 0
    try:
        with ending_after(3):
            main(sources.arguments(sources.halfway))
    except EnoughError:
        pass
    assert sources.halfway.last_checkpoint.is_file()
    for run in (sources.run, sources.halfway):
        shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
