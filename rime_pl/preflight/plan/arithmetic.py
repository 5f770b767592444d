"""The plan of a run as plain arithmetic: memory by part, time, disk, and what to change.

Called by `rime plan` with the bytes that rehearsal.py has counted. Nothing here touches a model.

Shape legend: T tokens of a step, L tokens of a row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
#: Share of the peak matrix throughput that a step is taken to reach; an assumption, not a measurement.
UTILISATION = 0.25
#: Of each trained number, and of each of the optimiser's moments: float32.
TRAINED_BYTES = 4
#: GPU -> GiB of memory, dense bfloat16 TFLOP/s with float32 accumulation, from the makers' data sheets.
GPUS: dict[str, tuple[int, float]] = {
    "RTX 3090": (24, 71.0),
    "RTX 4090": (24, 165.2),
    "L4": (24, 121.0),
    "A10": (24, 125.0),
    "L40S": (48, 362.0),
    "A100 40GB": (40, 312.0),
    "A100 80GB": (80, 312.0),
    "H100 SXM": (80, 989.0),
    "H200": (141, 989.0),
}
#: Upper ends of the classes in hours.
CLASSES = (1, 3, 10, 30, 100)


@dataclass(frozen=True)
class StagePlan:
    """Bytes of one stage's step on one process at its peak."""

    stage: str
    parts: dict[str, int]  # the weights by part, then what the step adds; their sum is the peak
    largest: int  # bytes of the largest tensor that a step makes
    largest_operation: str  # what makes it, and its shape
    flops: float  # of the step on one process
    trained: int  # numbers that train
    parameters: int  # all of them, a packed one counted as it was

    @property
    def peak(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Hours:
    """Time on one kind of GPU."""

    gpu: str
    seconds_per_step: float
    hours: float | None  # None: the number of steps is not known
    fits: bool

    @property
    def label(self) -> str:
        """The class, e.g. "1-3 h"."""
        return "-" if self.hours is None else hour_class(self.hours)


@dataclass(frozen=True)
class Change:
    """A setting that would bring the peak down."""

    setting: str  # as it is typed
    peak: int  # bytes with it


@dataclass(frozen=True)
class Plan:
    """All of it, as `rime plan --json` prints it."""

    facts: dict[str, Any]
    stages: list[StagePlan]
    hours: list[Hours]
    changes: list[Change] = field(default_factory=list)


def predict_hours(
    flops: float, peak: int, num_steps: int | None, utilisation: float = UTILISATION
) -> list[Hours]:
    """Seconds of a step and hours of a run on each GPU.

    Args:
        flops: Of a step on one process.
        peak: Bytes, to say where it fits; 5 % of the memory are left to the driver and to fragments.
        num_steps: Of the run, if known.
        utilisation: Share of the data sheet's throughput.
    """
    rows = []
    for gpu, (gib, tflops) in GPUS.items():
        seconds = flops / (tflops * 1e12 * utilisation)
        hours = None if num_steps is None else seconds * num_steps / 3600
        rows.append(Hours(gpu, seconds, hours, peak <= 0.95 * gib * GIB))
    return rows


def hour_class(hours: float) -> str:
    """A class, because a prediction of minutes would claim too much.

    Example:
        >>> hour_class(0.4), hour_class(2.5), hour_class(500)
        ('< 1 h', '1-3 h', '> 100 h')
    """
    low = None
    for high in CLASSES:
        if hours < high:
            return f"< {high} h" if low is None else f"{low}-{high} h"
        low = high
    return f"> {low} h"


def checkpoint_bytes(trained: int, stage: str) -> dict[str, int]:
    """Disk of a run's weights, processor files not counted.

    Args:
        trained: Number of trained parameters.
        stage: Refine-RL, which may diverge, keeps the checkpoint before the last, too.

    Returns:
        "adapter": what is used later; "checkpoint": with both moments of AdamW, to resume from.

    Example:
        >>> checkpoint_bytes(1000, "cma"), checkpoint_bytes(1000, "refine_rl")["checkpoint"]
        ({'adapter': 4000, 'checkpoint': 12000}, 24000)
    """
    kept = 2 if stage == "refine_rl" else 1
    return {"adapter": trained * TRAINED_BYTES, "checkpoint": kept * 3 * trained * TRAINED_BYTES}


def shard(
    parts: Mapping[str, int], sharded: Sequence[str], num_processes: int, num_layers: int
) -> dict[str, int]:
    """Parts per process when the decoder's layers are split among processes (FSDP2).

    Args:
        parts: Bytes on one process that holds everything.
        sharded: The parts that are split; two layers at a time are whole on every process.
        num_processes: Among which.
        num_layers: Of the decoder.
    """
    split = {name: -(-size // num_processes) if name in sharded else size for name, size in parts.items()}
    if num_processes > 1:
        whole = sum(parts[name] for name in sharded if name in parts)
        split["gathered layers"] = 2 * -(-whole // num_layers)
    return split
