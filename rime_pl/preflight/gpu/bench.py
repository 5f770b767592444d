"""The bench that all parts of `rime gpu-check` work on: checkpoint, batches, runs under Lightning's trainer.

Each run loads the model anew, through the very code that training uses, and leaves nothing on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader

from rime_pl.backbone.config import BackboneConfig
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES, Shape, save_checkpoint, synthetic_pairs
from rime_pl.modules.base import RimeModule
from rime_pl.preflight.gpu.watch import Seen, Watch, memory_of, release
from rime_pl.preflight.plan.arithmetic import StagePlan
from rime_pl.preflight.plan.predict import predict_stage
from rime_pl.preflight.plan.weightless import read_architecture
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch

#: The first warms up, the second is timed; on a CPU a third is counted (see watch.py).
NUM_STEPS = {"cuda": 2, "cpu": 3}


@dataclass(frozen=True)
class Amounts:
    """How much the parts take on."""

    cached_pairs: int  # of the batch that is taken at once and through the gradient cache
    large_pairs: int  # of the batch that only the gradient cache can take
    large_rows: int  # its micro-batch
    rl_pairs: int
    num_generations: int  # rewrites of an item
    new_tokens: int  # most tokens of a written rewrite


AMOUNTS = {
    "2b": Amounts(24, 256, large_rows=8, rl_pairs=4, num_generations=8, new_tokens=64),
    "micro": Amounts(8, 8, large_rows=2, rl_pairs=2, num_generations=4, new_tokens=4),
}
#: GiB of the card for each 8 pairs of ``cached_pairs``: a plain step takes 60 to 70 % of it.
GIB_FOR_8_PAIRS = 8


def amounts_for(shape: str, memory: int | None) -> Amounts:
    """Larger cards take larger batches: small micro-batches would leave them waiting for the processor.

    Args:
        shape: Name of the dimensions.
        memory: Bytes of the card; None on a CPU.

    Example:
        >>> [amounts_for("2b", gib * 2**30).cached_pairs for gib in (16, 24, 80)]
        [24, 24, 80]
    """
    amounts = AMOUNTS[shape]
    if memory is None or shape != "2b":
        return amounts
    pairs = 8 * round(memory / 2**30 / GIB_FOR_8_PAIRS)
    return replace(amounts, cached_pairs=max(amounts.cached_pairs, pairs))


class Bench:
    """Makes the checkpoint; trains on it.

    Args:
        folder: Empty; 4.4 GB go there for the 2b shape.
        shape: Name of the dimensions, see ``SHAPES``.
        device: Of weights and training.
        num_pairs: Of an ordinary step.
        checkpointing: Recompute activations in the backward pass.
    """

    def __init__(
        self, folder: Path, shape: str, device: torch.device, num_pairs: int, checkpointing: bool
    ) -> None:
        self.shape: Shape = SHAPES[shape]
        self.amounts = amounts_for(shape, memory_of(device))
        self.device, self.num_pairs, self.checkpointing = device, num_pairs, checkpointing
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.runs: dict[str, Seen | str] = {}  # stage -> its run, or why there is none
        save_checkpoint(self.base, self.shape, device)
        release(device)

    def config(self, attn_implementation: str = "sdpa") -> BackboneConfig:
        """As in configs/*.yaml, dropout apart; float32 on a CPU, which emulates bfloat16."""
        return BackboneConfig(
            str(self.base),
            dtype="bfloat16" if self.device.type == "cuda" else "float32",
            gradient_checkpointing=self.checkpointing,
            attn_implementation=attn_implementation,
            prompt=PromptConfig(max_rewrite_tokens=8 * self.shape.num_words),
        )

    @cached_property
    def processor(self) -> RimeProcessor:
        return RimeProcessor.from_pretrained(str(self.base), self.config().prompt)

    def batch(self, num_pairs: int) -> Batch:
        """Random words and noise, on the CPU; Lightning moves it."""
        return self.processor.training_batch(synthetic_pairs(num_pairs, self.shape))

    def plan(self, module: RimeModule, batch: Batch) -> StagePlan:
        """What `rime plan` says about a step on this batch."""
        return predict_stage(module, read_architecture(str(self.base)), batch)

    def fit(
        self,
        module: RimeModule,
        batch: Batch,
        num_steps: int | None = None,
        strategy: str | Strategy = "auto",
        more: Sequence[L.Callback] = (),
    ) -> Seen:
        """Optimiser steps on one batch, through Lightning.

        Args:
            module: The stage; its backbone is loaded on the way.
            batch: On the CPU.
            num_steps: None: ``NUM_STEPS``.
            strategy: Lightning's; tensors are counted on a single device alone.
            more: Callbacks beside the watch.

        Raises:
            RimeError: If a loss is not finite.
        """
        steps = num_steps or NUM_STEPS[self.device.type]
        watch = Watch(self.device, counted=steps - 1 if strategy == "auto" else None)
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            strategy=strategy,
            precision="32-true",  # Lightning casts nothing: the backbone has its types from the loader
            max_steps=steps,
            use_distributed_sampler=False,  # the batch is what it is
            callbacks=[*more, watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            with redirect_stdout(sys.stderr):  # what the stages print is not part of the report
                trainer.fit(module, datamodule=SyntheticData(batch, steps))
        finally:
            watch.close()
        losses = torch.tensor(watch.seen.losses)
        if len(losses) != steps or not losses.isfinite().all():
            raise RimeError(f"{type(module).__name__}: the losses of {steps} steps are {watch.seen.losses}.")
        return watch.seen


class SyntheticData(L.LightningDataModule):
    """The same batch in every step, and what Refine-RL asks for (``RewardData``)."""

    seed = 0

    def __init__(self, batch: Batch, num_steps: int) -> None:
        super().__init__()
        self.batch, self.num_steps = batch, num_steps

    def train_dataloader(self) -> Any:
        batches: Any = [replace(self.batch, position=number) for number in range(self.num_steps)]
        return DataLoader(batches, batch_size=None)

    def anchor_batches(self, num_anchors: int) -> list[Batch]:
        return [self.batch]

    def sample_batches(self, num_samples: int) -> list[Batch]:
        """None: rewrites to look at are no part of a step."""
        return []
