"""How far a run is: in the unit that its curves are drawn over, and in the terminal."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def batches_trained(trainer: pl.Trainer) -> int:
    """Training batches since the start of the run, those before a resumption included.

    What Lightning draws logged values over; ``global_step`` counts optimiser steps, of which reinforcement
    learning may take several for a batch.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


class EpochsFromOne(RichProgressBar):
    """Lightning's progress bar that counts epochs from 1: "Epoch 3 of 3" is the last one."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs or 0
        return f"Epoch {current_epoch + 1}" + (f" of {last}" if last > 0 else "")
