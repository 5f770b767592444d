"""Train a few steps of each stage on one device. Used by the tests in this folder and by benchmarks/gpu.py.

The model has random weights in the shape of Qwen2-VL-2B, so nothing is downloaded. Each run loads it in 4
bits through the code that training uses, and takes its steps on one batch under Lightning's trainer.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.callbacks.utilisation import Utilisation
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import PATCH, SHAPES, save_checkpoint, synthetic_pairs
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import (
    MicroBatchSettings,
    OptimizerSettings,
    RewardSettings,
    RolloutSettings,
)
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.predict import predict_stage
from rime_pl.preflight.plan.weightless import read_architecture
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch
from tests.gpu.watch import Run, Watch, memory_of


@dataclass(frozen=True)
class Sizes:
    """Batch sizes of the runs, in pairs."""

    pairs: int = 8  # of an ordinary step
    cached_pairs: int = 24  # of a batch that is taken at once, and again in (up to) 8 micro-batches
    large_pairs: int = 256  # of a batch that only the gradient cache can take
    large_rows: int = 8  # of its micro-batch
    rl_pairs: int = 4
    num_generations: int = 8
    new_tokens: int = 64  # the limit of a sampled rewrite


#: Fewest and most visual tokens of an item with ragged pictures: small photos, and four large ones.
RAGGED = {"2b": (100, 1300), "micro": (4, 24)}
MICRO = Sizes(3, 4, 8, 2, rl_pairs=2, num_generations=4, new_tokens=4)


def sizes_for(memory: int) -> Sizes:
    """Return sizes for a card of so many bytes: the batch at once takes 60 to 70 % of 24 GiB or more."""
    return Sizes(cached_pairs=max(24, 8 * round(memory / 2**33)))


@dataclass(frozen=True)
class Case:
    """One training run: a stage and how it is trained."""

    stage: str
    pairs: int
    micro_batch: int | None = None
    attention: str = "sdpa"
    fsdp: bool = False
    steps: int = 2  # the first one warms up, the last one is timed


def cases(sizes: Sizes) -> dict[str, Case]:
    """Return the training runs by name."""
    pairs, cached, rows = sizes.pairs, sizes.cached_pairs, sizes.large_rows
    return {
        "sft": Case("sft", pairs),
        "cma": Case("cma", pairs),
        "refine_rl": Case("refine_rl", sizes.rl_pairs),
        "sft_eager": Case("sft", pairs, attention="eager"),
        "sft_flash": Case("sft", pairs, attention="flash_attention_2"),
        "cma_fsdp": Case("cma", pairs, fsdp=True),
        "sft_at_once": Case("sft", cached),
        "sft_cached": Case("sft", cached, micro_batch=max(1, cached // 8)),
        "sft_one_micro_batch": Case("sft", rows, micro_batch=rows, steps=1),
        "sft_large": Case("sft", sizes.large_pairs, micro_batch=rows, steps=1),
    }


class Bench:
    """Makes a random checkpoint in a folder (4.4 GB for the shape 2b) and trains on it.

    Args:
        folder: Empty.
        device: Where weights and training go.
        shape: A key of ``SHAPES``.
        watch: Fills a `Run`; `CountingWatch` for bytes on a CPU.
        checkpointing: Recompute activations in the backward pass.
        ragged: Items have 1 to 4 pictures of many sizes, not one of the usual size.
        load_in_4bit: Whether the decoder is packed; if not, bitsandbytes is not needed.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        shape: str,
        watch: type[Watch] = Watch,
        checkpointing: bool = True,
        ragged: bool = False,
        load_in_4bit: bool = True,
    ) -> None:
        self.base, self.adapter, self.device = folder / "base", folder / "adapter", device
        self.shape, self.checkpointing, self.watch = SHAPES[shape], checkpointing, watch
        self.visual_tokens, self.load_in_4bit = RAGGED[shape] if ragged else None, load_in_4bit
        self.sizes = MICRO if shape == "micro" else sizes_for(memory_of(device))
        self.cases, self.batches = cases(self.sizes), dict[int, Batch]()
        largest = self.shape.image_size
        if self.visual_tokens:  # the processor must not shrink the largest picture
            largest = max(largest, round(self.visual_tokens[1] ** 0.5 * 2 * PATCH))
        save_checkpoint(self.base, replace(self.shape, image_size=largest), device)

    def config(self, attention: str = "sdpa") -> BackboneConfig:
        """Return the backbone of configs/*.yaml, without dropout; float32 on a CPU."""
        return BackboneConfig(
            str(self.base),
            load_in_4bit=self.load_in_4bit,
            dtype="bfloat16" if self.device.type == "cuda" else "float32",
            gradient_checkpointing=self.checkpointing,
            attn_implementation=attention,
            prompt=PromptConfig(max_rewrite_tokens=8 * self.shape.num_words),
        )

    @cached_property
    def processor(self) -> RimeProcessor:
        """The processor of the checkpoint, with both mode tokens."""
        return RimeProcessor.from_pretrained(str(self.base), self.config().prompt)

    def backbone(self) -> Backbone:
        """Return the model with a fresh adapter."""
        return Backbone(self.config(), self.processor, self.device)

    def save(self, backbone: Backbone, folder: Path) -> None:
        """Write the adapter of a backbone."""
        state, base = adapter_state(backbone.peft), backbone.base_hash
        save_adapter(folder, backbone.peft, state, self.processor, backbone.config, base)

    def batch(self, pairs: int) -> Batch:
        """Return a batch of random words and noise, on the CPU; Lightning moves it."""
        if pairs not in self.batches:
            made = synthetic_pairs(pairs, self.shape, self.visual_tokens)
            self.batches[pairs] = self.processor.training_batch(made)
        return self.batches[pairs]

    def module(self, case: Case) -> RimeModule:
        """Return the stage with its settings. Its backbone is loaded when the run starts."""
        config, sizes = self.config(case.attention), self.sizes
        if case.stage == "refine_rl":
            return RefineRLModule(
                config,
                init_adapter_from=str(self.adapter),
                rollouts=RolloutSettings(
                    sizes.num_generations,
                    max_new_tokens=sizes.new_tokens,
                    items_per_pass=2,  # as in configs/refine_rl.yaml
                ),
                reward=RewardSettings(num_anchors=sizes.rl_pairs),
                optimizer=OptimizerSettings(3e-5, warmup_steps=0),
            )
        stage = CMAModule if case.stage == "cma" else SFTModule
        micro_batches = MicroBatchSettings(size=case.micro_batch)
        return stage(config, optimizer=OptimizerSettings(warmup_steps=0), micro_batches=micro_batches)

    def run(self, case: Case) -> Run:
        """Train on one batch.

        Raises:
            RimeError: If a loss is not finite.
        """
        if case.stage == "refine_rl" and not self.adapter.is_dir():
            self.save(self.backbone(), self.adapter)  # an adapter that does nothing yet
        batch = self.batch(case.pairs)
        run = Run(case.pairs, sum(int(side.lengths().sum()) for side in (batch.query, batch.target)))
        watch, used = self.watch(self.device, run), Utilisation()
        steps = case.steps + (watch.extra_steps if case.steps > 1 else 0)
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            strategy=fsdp_strategy() if case.fsdp else "auto",
            max_steps=steps,
            callbacks=[
                watch,
                used,
                *([FavourEnd(self.sizes.new_tokens)] if case.stage == "refine_rl" else []),
            ],
            use_distributed_sampler=False,  # the batch is what it is
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:  # Lightning leaves variables behind that would start the next run as one of several processes
            with patch.dict(os.environ), redirect_stdout(sys.stderr):
                trainer.fit(self.module(case), datamodule=RepeatedBatch(batch, steps))
        finally:
            watch.close()
            if dist.is_initialized():
                dist.destroy_process_group()
        if len(run.losses) != steps or not all(map(math.isfinite, run.losses)):
            raise RimeError(f"The losses of {steps} steps must be finite, but are {run.losses}.")
        run.utilisation = used.facts["share"] if used.facts else None
        if case.stage == "refine_rl":
            rewrites = 2 * case.pairs * self.sizes.num_generations  # of both sides
            run.tokens = round(rewrites * run.logged["train/rewrite_length"])
        return run

    def predicted_peak(self, case: Case) -> int:
        """Return the peak in bytes that `rime plan` predicts for a step of this run."""
        architecture = read_architecture(str(self.base))
        return predict_stage(self.module(case), architecture, self.batch(case.pairs)).peak


def fsdp_strategy() -> ModelParallelStrategy:
    """Return the strategy of configs/overlays/fsdp.yaml for one process."""
    return ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


class RepeatedBatch(L.LightningDataModule):
    """The same batch in every step, with what Refine-RL asks of its data."""

    seed = 0

    def __init__(self, batch: Batch, num_steps: int) -> None:
        super().__init__()
        self.batch, self.num_steps = batch, num_steps
        self.batch_size = len(batch.query.lengths())

    def train_dataloader(self) -> Any:
        steps: Any = [replace(self.batch, position=number) for number in range(self.num_steps)]
        return DataLoader(steps, batch_size=None)

    def anchor_batches(self, num_anchors: int) -> list[Batch]:
        return [self.batch]

    def sample_batches(self, num_samples: int) -> list[Batch]:
        return []


class FavourEnd(L.Callback):
    """Makes <gen_emb> more likely, so that two of three sampled rewrites end within `new_tokens`.

    A random model hardly ever ends a rewrite, and then there is no reward and no gradient.
    """

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens = new_tokens

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        processor = pl_module.model.processor
        # if all words were equally likely, <gen_emb> would be one in `new_tokens`
        bonus = math.log(max(1.0, len(processor.tokenizer) / self.new_tokens))

        def favour(layer: Any, inputs: Any, logits: Tensor) -> Tensor:
            bias = logits.new_zeros(logits.shape[-1])
            bias[processor.gen_id] = bonus
            return logits + bias

        pl_module.model.language_model.get_output_embeddings().register_forward_hook(favour)
