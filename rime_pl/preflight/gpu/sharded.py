"""FSDP2 on one process: the strategy of configs/overlays/fsdp.yaml over a mesh of one device.

A part of `rime gpu-check`. One device splits nothing, and torch copies where several would exchange; but the
packed bytes take the way through FSDP2's parameters, hooks and gradients on this device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from rime_pl.errors import RimeError
from rime_pl.modules.cma import CMAModule
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part
from rime_pl.preflight.gpu.stages import sound
from rime_pl.preflight.gpu.watch import Seen

#: Lightning sets them for the processes that it starts, and leaves them there.
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def overlay() -> ModelParallelStrategy:
    """configs/overlays/fsdp.yaml for one process; a test holds the two together."""
    return ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def fsdp(bench: Bench, out: Part) -> None:
    """CMA, sharded: ``shard_backbone`` compares the packed bytes before and after, and so does the watch."""
    with process_group():
        module = CMAModule(bench.config(), warmup_steps=0)
        seen = bench.fit(module, bench.batch(bench.num_pairs), num_steps=2, strategy=overlay())
        out.add("backend", "process group", "nccl" if bench.device.type == "cuda" else "gloo")
    out.add("pairs", "pairs of a step", bench.num_pairs)
    out.add("step_seconds", "a step of CMA", seen.seconds, "s")
    out.add("step_peak_bytes", "peak of a step, weights included", seen.step_peak, "bytes")
    sound(out, seen)
    plain = bench.runs.get("cma")
    difference = seen.losses[0] / plain.losses[0] - 1 if isinstance(plain, Seen) else None
    shown = None if difference is None else f"{difference:.1e}"
    out.add("loss_difference", "first loss over that without FSDP2, minus 1", difference, shown=shown)


@contextmanager
def process_group() -> Iterator[None]:
    """Whatever process group is made inside is gone afterwards, so that later parts run without one.

    Raises:
        RimeError: If there is one already.
    """
    if dist.is_initialized() or "LOCAL_RANK" in os.environ:
        raise RimeError("rime gpu-check was started by a launcher of several processes; start it by itself.")
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
