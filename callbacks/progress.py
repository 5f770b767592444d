"""Shows how far a run is: the number of training batches, the x-axis of all curves, and the progress bar."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TaskID

from rime_pl.bars import Lines, told


def batches_trained(trainer: pl.Trainer) -> int:
    """Return the number of training batches since the start of the run, including those before a resume.

    Lightning logs over this count. ``global_step`` counts optimiser steps instead, and Refine-RL may take
    several for one batch.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def step_of_validation(trainer: pl.Trainer) -> int:
    """Return where Lightning logs a validation: at the batch before it, counted from 0.

    A resumed run drops all that was logged at or after the number of batches behind its checkpoint.
    """
    return max(0, batches_trained(trainer) - 1)


class EpochsFromOne(RichProgressBar):
    """Lightning's progress bar that counts epochs from 1: "Epoch 3 of 3" is the last one.

    In a file, where no bar is seen, a line now and then says how far the training or the test is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines()

    def _update(self, progress_bar_id: TaskID | None, current: int, *args: Any, **options: Any) -> None:
        super()._update(progress_bar_id, current, *args, **options)
        if self.progress is not None and self.is_enabled and progress_bar_id is not None:
            self._lines.tell(self.progress.console, lambda: self._line(progress_bar_id))

    def _line(self, progress_bar_id: TaskID) -> str:
        assert self.progress is not None
        (task,) = (task for task in self.progress.tasks if task.id == progress_bar_id)
        shown = self.get_metrics(self.trainer, self.trainer.lightning_module) if self.trainer.training else {}
        values = (f", {name} {value:.3f}" for name, value in shown.items() if isinstance(value, float))
        return f"{told(task)} batches{''.join(values)}"

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs or 0
        return f"Epoch {current_epoch + 1}" + (f" of {last}" if last > 0 else "")
