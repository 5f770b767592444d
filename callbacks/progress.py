"""Counts the progress of a run in training batches, the x-axis of all curves. Used by the callbacks."""

from __future__ import annotations

import lightning.pytorch as pl


def batches_trained(trainer: pl.Trainer) -> int:
    """Return the number of training batches since the start of the run, including those before a resume.

    Lightning logs over this count. ``global_step`` counts optimiser steps instead, and Refine-RL may take
    several for one batch.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]
