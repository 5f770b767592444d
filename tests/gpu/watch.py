"""Record seconds, memory, losses, packed bytes and changed weights of one training run. Used by bench.py.

`Watch` reads the peak of CUDA's allocator. A CPU has no such peak: `CountingWatch` adds up living tensors.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rime_pl.backbone.quantization import linear_4bit_modules, packed_digests
from rime_pl.modules.base import RimeModule
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.preflight.plan.weightless import state_tensors
from rime_pl.scaling.sharding import gathered_digests


@dataclass
class Run:
    """The results of one run: numbers only, so that its memory is free again."""

    items: int  # training pairs, or items to embed
    tokens: int  # of a step, padding left out: read, or written (Refine-RL, embedding after writing)
    load_seconds: float = 0.0
    load_peak: int | None = None  # bytes; None: not measured
    seconds: float | None = None  # of the timed step
    peak: int | None = None  # bytes of a step: weights, optimiser states and batch included
    utilisation: float | None = None  # FLOPs per second over those of a matrix product; not of the first step
    losses: list[float] = field(default_factory=list)  # of all steps
    moved: float = 0.0  # share of the trained numbers that changed
    intact: bool = False  # the packed 4-bit weights are unchanged
    logged: dict[str, float] = field(default_factory=dict)  # in the timed step


class Watch(L.Callback):
    """Fills a `Run` while Lightning trains."""

    extra_steps = 0  # after the timed one

    def __init__(self, device: torch.device, run: Run) -> None:
        self.device, self.run = device, run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.before, self.start = release(self.device), now(self.device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.run.load_seconds = now(self.device) - self.start
        self.run.load_peak = peak_since(self.before, self.device)
        self.packed, self.trained = packed_parts(pl_module), trained_parts(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        release(self.device)  # after Refine-RL has made its anchors

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.start = now(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.run.seconds = now(self.device) - self.start
        self.run.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.run.losses.append(self.run.logged["train/loss"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.run.peak = peak_since(self.before, self.device)
        last = trained_parts(pl_module)
        moved = sum(int((tensor != self.trained[name]).sum()) for name, tensor in last.items())
        self.run.moved = moved / sum(tensor.numel() for tensor in last.values())
        self.run.intact = any(self.packed) and packed_parts(pl_module) == self.packed

    def close(self) -> None:
        """End what a failed run has left open."""


class CountingWatch(Watch):
    """Counts the bytes of living tensors in the last step, which is not timed then. Not under FSDP2."""

    extra_steps = 1
    live: LiveBytes | None = None
    counted: int | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == trainer.max_steps - 1 and not torch.distributed.is_initialized():
            known = standing_tensors(pl_module, trainer.optimizers, batch)
            self.standing = sum(tensor.nbytes for tensor in known)
            self.live = LiveBytes(known)
            self.live.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.live is not None:
            self.counted = self.standing + self.live.peak.total()
        self.close()
        timed = self.run.seconds, self.run.logged
        super().on_train_batch_end(trainer)
        if self.counted is not None:
            self.run.seconds, self.run.logged = timed

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_fit_end(trainer, pl_module)
        self.run.peak = self.counted

    def close(self) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)
            self.live = None


def now(device: torch.device) -> float:
    """Return the time in seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_of(device: torch.device) -> int:
    """Return the bytes of the card; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def release(device: torch.device) -> int:
    """Free unreferenced memory and reset the peak counter; return the bytes that are still in use."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(before: int, device: torch.device) -> int | None:
    """Return the largest number of bytes since `release`, less the `before` that it returned."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def packed_parts(module: RimeModule) -> list[dict[str, str]]:
    """Return the checksums of the packed 4-bit weights of each decoder layer."""
    layers = module.model.language_model.model.language_model.layers
    return [gathered_digests(x) if isinstance(x, FSDPModule) else packed_digests(x) for x in layers]


def trained_parts(module: RimeModule) -> dict[str, Tensor]:
    """Return copies of the trained tensors on the CPU."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in local.items()}


def standing_tensors(module: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Any) -> list[Tensor]:
    """Return weights, their 4-bit state, optimiser states and the batch, each tensor once."""
    tensors = [*module.parameters(), *module.buffers(), *tensors_of(batch)]
    for layer in linear_4bit_modules(module).values():
        tensors += state_tensors(layer.weight.quant_state)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return list({id(tensor): tensor for tensor in tensors}.values())


def tensors_of(batch: Any) -> list[Tensor]:
    """Return all tensors of a dataclass of dataclasses, such as a `Batch`."""
    if isinstance(batch, Tensor):
        return [batch]
    if not is_dataclass(batch):
        return []
    return [tensor for f in fields(batch) for tensor in tensors_of(getattr(batch, f.name))]
