"""Training curves of a finished run, read back from its TensorBoard events.

Called by `rime compare` for what a recall does not say: spread of the reward, divergence, lost groups.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

#: What Refine-RL logs and a comparison shows (docs/reference/metrics.md).
WATCHED = ("reward_spread", "no_signal", "entropy", "kl", "grad_norm")
#: Of these the highest, too: what spikes.
SPIKES = ("kl", "grad_norm")


def curve_means(folder: Path) -> dict[str, float]:
    """Mean over the logged steps of each of ``WATCHED``, highest of ``SPIKES``; empty for other stages.

    Args:
        folder: Of a run, with a folder ``tensorboard``.
    """
    if not (folder / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    logged = set(events.Tags()["scalars"])
    curves = {
        name: [event.value for event in events.Scalars(f"train/{name}")]
        for name in WATCHED
        if f"train/{name}" in logged
    }
    found = {name: mean(values) for name, values in curves.items()}
    return found | {f"{name}_highest": max(curves[name]) for name in SPIKES if name in curves}
