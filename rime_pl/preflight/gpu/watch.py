"""What one run on the device is watched for: seconds, memory, losses, packed bytes, tensors that moved.

Memory on CUDA is the allocator's own peak. On a CPU the last step is not timed; instead the bytes of its
living tensors are counted, with the ruler that `rime plan` is tested with.
"""

from __future__ import annotations

import gc
import hashlib
import time
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rime_pl.backbone.quantization import linear_4bit_modules, packed_weights_hash
from rime_pl.modules.base import RimeModule
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.preflight.plan.weightless import state_tensors
from rime_pl.scaling.sharding import gathered_digests


@dataclass
class Seen:
    """What a run left behind: numbers alone, so that its memory is free."""

    load_seconds: float = 0.0
    load_peak: int | None = None  # bytes; None: not measured
    step_seconds: list[float] = field(default_factory=list)  # of the timed steps
    step_peak: int | None = None  # bytes, weights and optimiser states included
    losses: list[float] = field(default_factory=list)
    intact: bool = False  # the packed 4-bit weights
    moved: int = 0  # trained numbers that are not what they were
    trained: int = 0  # trained numbers
    logged: dict[str, float] = field(default_factory=dict)  # of the last timed step

    @property
    def seconds(self) -> float | None:
        """Of the last timed step; the first one warms up, where there are several."""
        return self.step_seconds[-1] if self.step_seconds else None


class Watch(L.Callback):
    """Fills ``seen``.

    Args:
        device: Of weights and training.
        counted: Number of the step whose tensors are counted, for a CPU; None for no count.
    """

    def __init__(self, device: torch.device, counted: int | None) -> None:
        self.device = device
        self.counted = counted if device.type == "cpu" else None
        self.seen = Seen()
        self._standing = 0
        self._live: LiveBytes | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before ``configure_model``, where the backbone is built."""
        release(self.device)
        self._before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self._start = now(self.device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RimeModule)
        self.seen.load_seconds = now(self.device) - self._start
        self.seen.load_peak = self._peak()
        self._packed = packed_hash(pl_module)
        self._first = trained_parts(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the module's own ``on_fit_start``, where Refine-RL makes its anchors."""
        release(self.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.counted:
            known = standing_tensors(pl_module, trainer.optimizers, batch)
            self._standing = sum(tensor.nbytes for tensor in known)
            self._live = LiveBytes(known)
            self._live.__enter__()
        self._start = now(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        seconds = now(self.device) - self._start
        if self._live is not None:
            self.seen.step_peak = self._standing + self._live.peak.bytes
            self.close()
        else:
            self.seen.step_seconds.append(seconds)
            self.seen.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RimeModule)
        if self.device.type == "cuda":
            self.seen.step_peak = self._peak()
        last = trained_parts(pl_module)
        self.seen.trained = sum(tensor.numel() for tensor in last.values())
        self.seen.moved = sum(int((tensor != self._first[name]).sum()) for name, tensor in last.items())
        self.seen.intact = packed_hash(pl_module) == self._packed

    def close(self) -> None:
        """Stop counting; also after an error in the counted step."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def _peak(self) -> int | None:
        """Bytes since :func:`release`, without what lay there before this run."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - self._before


def now(device: torch.device) -> float:
    """Seconds, all work on the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_of(device: torch.device) -> int | None:
    """Bytes of the card; None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give back what nobody holds, and begin a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def packed_hash(module: RimeModule) -> str:
    """SHA-256 over the packed 4-bit bytes, whether FSDP2 has split them or not."""
    layers = module.model.language_model.model.language_model.layers
    if not isinstance(layers[0], FSDPModule):
        return packed_weights_hash(module)
    return hashlib.sha256(str([gathered_digests(layer) for layer in layers]).encode()).hexdigest()


def trained_parts(module: RimeModule) -> dict[str, Tensor]:
    """Copies on the CPU of what trains, of this process's part where it is split."""
    return {
        name: (p.to_local() if isinstance(p, DTensor) else p).detach().to("cpu", copy=True)
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def standing_tensors(
    module: L.LightningModule, optimizers: list[torch.optim.Optimizer], batch: Any
) -> list[Tensor]:
    """Weights, their 4-bit state, optimiser states and the batch, each once."""
    tensors = [*module.parameters(), *module.buffers(), *tensors_of(batch)]
    for layer in linear_4bit_modules(module).values():
        tensors += state_tensors(layer.weight.quant_state)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return list({id(tensor): tensor for tensor in tensors}.values())


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors of a dataclass of dataclasses, such as a ``Batch``."""
    if isinstance(batch, Tensor):
        return [batch]
    if not is_dataclass(batch):
        return []
    return [tensor for f in fields(batch) for tensor in tensors_of(getattr(batch, f.name))]
