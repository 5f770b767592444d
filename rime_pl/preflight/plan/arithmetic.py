"""The plain arithmetic of a plan: hours on each GPU, disk, and parts on several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30
#: Share of the peak matrix throughput that a step is assumed to reach; it is not measured.
UTILISATION = 0.25
#: Bytes of each trained number, and of each of the optimizer's two moments: float32.
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
    """What one step of a stage needs on one process."""

    stage: str
    parts: dict[str, int]  # bytes at the peak: the weights by part, then what the step adds
    largest: int  # bytes of the largest tensor that a step makes
    largest_operation: str  # what makes it, and its shape
    flops: float  # of the step
    trained: int  # number of trained parameters
    parameters: int  # number of all parameters; a packed one counts as it was

    @property
    def peak(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def hours(flops: float, peak: int, num_steps: int | None) -> list[dict[str, Any]]:
    """Return for each GPU whether a run fits, the seconds of a step, and the class of hours of the run.

    FLOPs of a step and bytes at the peak are those of one process. 5 % of the memory are left to the driver
    and to fragmentation.
    """
    rows = []
    for gpu, (gib, tflops) in GPUS.items():
        seconds = flops / (tflops * 1e12 * UTILISATION)
        run = "-" if num_steps is None else hour_class(seconds * num_steps / 3600)
        rows.append({"gpu": gpu, "fits": peak <= 0.95 * gib * GIB, "seconds_per_step": seconds, "class": run})
    return rows


def hour_class(number: float) -> str:
    """Return a class of hours, because a prediction of minutes would claim too much.

    Example:
        >>> hour_class(0.4), hour_class(2.5), hour_class(500)
        ('< 1 h', '1-3 h', '> 100 h')
    """
    for low, high in zip((0, *CLASSES), CLASSES, strict=False):
        if number < high:
            return f"{low}-{high} h" if low else f"< {high} h"
    return f"> {CLASSES[-1]} h"


def checkpoint_bytes(trained: int, stage: str) -> dict[str, int]:
    """Return the disk space of a run's weights; processor files are not counted.

    "adapter" is used later; "checkpoint", to resume from, holds both moments of AdamW, too. Refine-RL may
    diverge, so it keeps the checkpoint before the last one as well.

    Example:
        >>> checkpoint_bytes(1000, "cma"), checkpoint_bytes(1000, "refine_rl")["checkpoint"]
        ({'adapter': 4000, 'checkpoint': 12000}, 24000)
    """
    kept = 2 if stage == "refine_rl" else 1
    return {"adapter": trained * TRAINED_BYTES, "checkpoint": kept * 3 * trained * TRAINED_BYTES}


def shard(
    parts: Mapping[str, int], sharded: Sequence[str], processes: int, num_layers: int
) -> dict[str, int]:
    """Return the bytes of each process when FSDP2 splits the parts ``sharded`` of the decoder's layers.

    Two layers at a time are whole on every process.
    """
    split = {name: -(-size // processes) if name in sharded else size for name, size in parts.items()}
    if processes > 1:
        whole = sum(parts[name] for name in sharded if name in parts)
        split["gathered layers"] = 2 * -(-whole // num_layers)
    return split
