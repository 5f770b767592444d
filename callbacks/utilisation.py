"""Logs the utilisation: FLOPs per second of training over those of a matrix product on the same device.

Added to every stage by ``cli``; docs/reference/metrics.md explains the number. FLOPs are counted in the
first step since the start or a resume. Later steps count in proportion to their tokens.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from rime_pl.metrics.flops import CountedFlops, product_flops_per_second


class Utilisation(Callback):
    """Logs ``train/utilisation`` for each step after the counted one."""

    def __init__(self) -> None:
        self._counted: CountedFlops | None = None  # while the first step runs
        self._product = 0.0  # FLOPs per second
        self._per_token: float | None = None  # FLOPs of the counted step for each of its tokens
        self._since = 0.0  # when the batch before ended
        self._flops = self._seconds = 0.0  # of all steps after the counted one

    @property
    def facts(self) -> dict[str, float] | None:
        """The means since the start or the last resume, for the manifest; None after less than two steps."""
        if not self._seconds:
            return None
        per_second = self._flops / self._seconds
        return {
            "share": per_second / self._product,
            "flops_per_second": per_second,
            "product_flops_per_second": self._product,
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._per_token, self._flops, self._seconds = None, 0.0, 0.0
        self._product = product_flops_per_second(pl_module.device, dtype_of(trainer, pl_module))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()  # a validation does not count

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._per_token is None:
            self._counted = CountedFlops()
            self._counted.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        tokens = sum(int(side.lengths().sum()) for side in batch.sides)
        if self._counted is not None:  # counting slows this step
            self._end()
            self._per_token = self._counted_flops / tokens
            self._since = time.perf_counter()
            return
        assert self._per_token is not None
        flops = self._per_token * tokens
        self._flops, self._seconds = self._flops + flops, self._seconds + seconds
        pl_module.log("train/utilisation", flops / seconds / self._product, batch_size=len(batch))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._counted is not None:
            self._counted.__exit__(None, None, None)
            self._counted_flops, self._counted = self._counted.flops, None


def dtype_of(trainer: L.Trainer, pl_module: Any) -> torch.dtype:
    """Return the type that the matrix products of a run have: autocast's, else that of the backbone."""
    for name, dtype in (("bf16", torch.bfloat16), ("16", torch.float16)):
        if str(trainer.precision).startswith(name):
            return dtype
    found: torch.dtype = getattr(torch, pl_module.config.dtype)
    return found
