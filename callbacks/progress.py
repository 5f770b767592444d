"""Shows how far a run is: the number of training batches, the x-axis of all curves, and the progress bar."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from rime_pl.bars import Lines


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

    In a file, where no bar is seen, a line now and then says how far the training is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines = Lines()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, and perhaps write a line."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.is_enabled and self._console is not None:
            self._lines.tell(self._console, lambda: self._line(trainer, pl_module, batch_idx + 1))

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule, done: int) -> str:
        shown = self.get_metrics(trainer, pl_module)
        values = "".join(f", {name} {value:.3f}" for name, value in shown.items() if isinstance(value, float))
        epoch = self._get_train_description(trainer.current_epoch)
        return f"{epoch}: {done} of {self.total_train_batches} batches{values}"

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs or 0
        return f"Epoch {current_epoch + 1}" + (f" of {last}" if last > 0 else "")
