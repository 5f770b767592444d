"""Pictures of a healthy and a sick run for the metrics that matter, from what real runs logged.

python -m docs.site.curves --from NAME=RUN ... reads TensorBoard's files of runs and records their curves in
docs/reference/curves.json, then draws them. No curve is made up: a picture is drawn when both of its runs
were recorded, and metrics.md shows those.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/reference/curves.json"
HEALTHY, SICK = "#15803d", "#c2410c"


@dataclass(frozen=True)
class Picture:
    """One metric, a healthy run and a sick one, and what was wrong."""

    key: str
    healthy: str  # name of a run
    sick: str
    wrong: str
    logarithmic: bool = False

    @property
    def file(self) -> str:
        """Name of its picture."""
        return f"{self.key.replace('/', '-')}.png"


PICTURES = (
    Picture("train/loss", "sft", "sft-rate", "learning rate 0.5 in place of 0.002", True),
    Picture("train/loss_ce", "sft", "sft-rate", "learning rate 0.5 in place of 0.002", True),
    Picture("train/grad_norm", "sft", "sft-rate", "learning rate 0.5 in place of 0.002", True),
    Picture("train/loss_info_nce_disc", "sft", "sft-temperature", "temperature 5 in place of 0.05"),
    Picture("train/loss_info_nce_gen", "sft", "sft-temperature", "temperature 5 in place of 0.05"),
    Picture("train/loss_cma", "cma", "cma-rate", "learning rate 0.000001 in place of 0.001"),
    Picture("train/loss_decisive", "cma", "cma-rate", "learning rate 0.000001 in place of 0.001"),
    Picture("val/trace/own-minus-empty", "cma", "cma-plain", "no decisive term (lambda_dec 0)"),
    Picture("train/k2", "refine-rl", "rl-rate", "learning rate 0.01 in place of 0.001", True),
    Picture("train/reward_format", "refine-rl", "rl-short", "max_new_tokens 4 in place of 32"),
    Picture("train/no_signal", "refine-rl", "rl-reward-temperature", "reward temperature 5 in place of 0.2"),
    Picture("train/entropy", "refine-rl", "rl-certain", "sampling temperature 0.1 in place of 1"),
)


def record(runs: dict[str, Path], date: str) -> None:
    """Record the curves of runs and what each was, next to those that are there."""
    from rime_pl.report.events import read_events

    there = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    keys = {one.key for one in PICTURES}
    for name, folder in runs.items():
        scalars = read_events(folder / "tensorboard").scalars
        curves = {
            key: [[step, round(value, 5)] for step, value in scalars[key]] for key in keys & scalars.keys()
        }
        there[name] = {"date": date, "curves": dict(sorted(curves.items()))}
    RECORD.write_text(
        json.dumps(there, indent=None, separators=(",", ":")).replace('"date"', '\n"date"') + "\n"
    )


def draw(picture: Picture, recorded: dict[str, Any], target: Path) -> None:
    """Draw the curves of a metric in the two runs.

    Raises:
        KeyError: If a run or its curve was not recorded.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.4, 2.6), dpi=110)
    for name, colour, label in (
        (picture.healthy, HEALTHY, "healthy"),
        (picture.sick, SICK, f"sick: {picture.wrong}"),
    ):
        steps, values = zip(*recorded[name]["curves"][picture.key], strict=True)
        marker = "o" if len(steps) < 8 else None
        axes.plot(steps, values, color=colour, label=label, marker=marker, linewidth=1.8)
    if picture.logarithmic:
        axes.set_yscale("symlog", linthresh=0.01) if picture.key == "train/k2" else axes.set_yscale("log")
    axes.set_title(picture.key, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Software": None})
    plt.close(figure)


def drawable(recorded: dict[str, Any]) -> list[Picture]:
    """Return the pictures whose curves were recorded in both runs."""
    return [
        one
        for one in PICTURES
        if all(one.key in recorded.get(name, {"curves": {}})["curves"] for name in (one.healthy, one.sick))
    ]


def main() -> None:
    """Record curves, then draw all pictures whose runs were recorded."""
    parser = argparse.ArgumentParser(description="Record and draw the curves of docs/reference/metrics.md.")
    parser.add_argument("--date", required=True, help="Day of the runs")
    parser.add_argument("--from", nargs="*", default=[], dest="runs", help="NAME=RUN_FOLDER ...")
    given = parser.parse_args()
    record({name: Path(run) for name, run in (one.split("=", 1) for one in given.runs)}, given.date)
    recorded = json.loads(RECORD.read_text())
    for picture in drawable(recorded):
        draw(picture, recorded, ROOT / "docs/reference/metrics" / picture.file)


if __name__ == "__main__":
    main()
