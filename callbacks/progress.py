"""Shows how far a run is: the number of training batches, the x-axis of all curves, and the progress bar."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


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
    """Lightning's progress bar that counts epochs from 1: "Epoch 3 of 3" is the last one."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs or 0
        return f"Epoch {current_epoch + 1}" + (f" of {last}" if last > 0 else "")
