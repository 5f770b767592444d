"""Checkpoints that survive a kill at any moment, and the adapter folder that PEFT loads.

Added to every stage by cli.py. ``checkpoints/last.ckpt`` holds what trains, the optimiser, the loops, the
random state and the data position; ``adapter/`` holds what a user of the model needs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.types import DivergedError

LAST = "checkpoints/last.ckpt"


class AdapterCheckpoint(Checkpoint):
    """Save for resuming every few steps and after each epoch; write the adapter folder at the end.

    Args:
        run_dir: Folder of this stage's run.
        every_n_steps: Optimiser steps between two saves within an epoch.
    """

    def __init__(self, run_dir: str, every_n_steps: int = 50) -> None:
        self.run_dir = Path(run_dir)
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not on an epoch's last batch: there Lightning restores wrong counters, and the epoch's end follows.
        last_of_epoch = batch_idx + 1 == trainer.num_training_batches
        if trainer.global_step % self.every_n_steps == 0 and not last_of_epoch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write_adapter(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell a diverged run where it was still good: a step that diverges is not taken, and not saved."""
        if isinstance(exception, DivergedError):
            last = self.run_dir / LAST
            where = str(last) if last.is_file() else "none, nothing was saved yet"
            exception.args = (f"{exception} Last good checkpoint: {where}.",)

    def _save(self, trainer: L.Trainer) -> None:
        path = self.run_dir / LAST
        path.parent.mkdir(parents=True, exist_ok=True)
        half_written = path.with_suffix(".half")
        trainer.save_checkpoint(half_written, weights_only=False)
        if trainer.is_global_zero:
            half_written.replace(path)  # atomic: a kill leaves the old file or the new one
        trainer.strategy.barrier()

    def write_adapter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The adapter as a PEFT folder; gathered from all ranks when it is sharded."""
        backbone: Any = pl_module.model  # a Backbone; callbacks do not import the model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        gathered: Any = get_model_state_dict(backbone.peft, options=options)
        if trainer.is_global_zero:
            state = adapter_state(backbone.peft, gathered)
            folder = self.run_dir / "adapter"
            save_adapter(
                folder, backbone.peft, state, backbone.processor, backbone.config, backbone.base_hash
            )
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "python": random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])
