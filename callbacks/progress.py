"""How far a run is, in the unit that its curves are drawn over."""

from __future__ import annotations

import lightning.pytorch as pl


def batches_trained(trainer: pl.Trainer) -> int:
    """Training batches since the start of the run, those before a resumption included.

    What Lightning draws logged values over; ``global_step`` counts optimiser steps, of which reinforcement
    learning may take several for a batch.
    """
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]
