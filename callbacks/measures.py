"""Logs how training goes, in every stage: learning rate, gradient norm, pairs per second and peak memory.

Added to every stage by ``cli``; docs/reference/metrics.md explains each.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

GIB = 2**30


class Measures(Callback):
    """Logs the four values of each training batch under ``train/``."""

    def __init__(self) -> None:
        self._since = 0.0  # when the batch before ended

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the gradients before Lightning clips them; Refine-RL clips and logs its gradients itself."""
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        if not pl_module.automatic_optimization:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        pl_module.log("train/grad_norm", whole)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        pairs, self._since, seconds = len(batch) * trainer.world_size, now, now - self._since
        pl_module.log_dict(
            {
                "train/pairs_per_second": pairs / seconds,
                "train/peak_memory_gib": peak_memory(pl_module.device) / GIB,
            },
            batch_size=len(batch),
        )


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used so far: on a GPU its memory there, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
