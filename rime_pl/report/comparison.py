"""What alignment does, in one table and one picture: before, control, plain alignment, decisive alignment.

Called by `rime compare` with the numbers of one or several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.types import MODE_PAIRS, TRACES

#: variant -> how a reader should call it, and its colour
VARIANTS = {
    "before": ("SFT (before)", "#b8c2cf"),
    "control": ("as many further SFT steps", "#6b7785"),
    "plain": ("CMA, plain", "#e08a00"),
    "decisive": ("CMA, decisive", "#2f6bde"),
}


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """A Markdown table, means over the seeds with the lowest and highest seed, and the paired differences."""
    runs = result["runs"]
    gallery, chance = runs[0]["decisive"]["gallery"], runs[0]["decisive"]["chance"]
    seeds = ", ".join(str(run["decisive"]["seed"]) for run in runs)
    lines = [
        f"recall@1 on the test split, mean over the headline tasks; gallery {gallery}, chance {chance:.4f}; "
        f"seeds {seeds}."
        + (" In brackets lowest and highest seed; s/step: the least disturbed." if len(runs) > 1 else ""),
        "",
        "| run | steps | s/step | "
        + " | ".join(MODE_PAIRS)
        + " | "
        + " | ".join(f"trace {t}" for t in TRACES)
        + " |",
        "|---" * (3 + len(MODE_PAIRS) + len(TRACES)) + "|",
    ]
    for name, (label, _) in VARIANTS.items():
        of_seeds = [run[name] for run in runs]
        timed = [v["seconds_per_step"] for v in of_seeds if v["seconds_per_step"] is not None]
        cells = [label, str(of_seeds[0]["steps"]), f"{min(timed):.2f}" if timed else "-"]
        cells += [_spread([v["recall@1"][pair] for v in of_seeds]) for pair in MODE_PAIRS]
        cells += [_spread([v["trace"][trace] for v in of_seeds]) for trace in TRACES]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| difference of recall@1, queries paired | mean | 95 % bootstrap |", "|---|---|---|"]
    labels = {
        "disc_minus_control": "disc-disc after decisive CMA minus after as many further SFT steps",
        "disc_minus_before": "disc-disc after decisive CMA minus before",
        "gen_minus_disc": "gen-gen minus disc-disc, both after decisive CMA",
    }
    for key, label in labels.items():
        d = result[key]
        lines.append(f"| {label} | {d['mean']:+.3f} | {d['lower']:+.3f} to {d['upper']:+.3f} |")
    lines += [
        "",
        "recall@1 of each task after decisive CMA:",
        "",
        "| task | " + " | ".join(MODE_PAIRS) + " |",
        "|---|---|---|---|---|",
    ]
    for task in sorted(runs[0]["decisive"]["per_task"]):
        cells = [_spread([run["decisive"]["per_task"][task][pair] for run in runs]) for pair in MODE_PAIRS]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def comparison_figure(result: Mapping[str, Any]) -> Figure:
    """Bars of the four modes and of the trace probe for each variant; dots are the seeds."""
    figure = Figure(figsize=(14, 5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    modes, probe = figure.subplots(1, 2, sharey=True)
    for axes, field, names, title in (
        (modes, "recall@1", MODE_PAIRS, "recall@1: query mode - target mode"),
        (probe, "trace", TRACES, "gen-gen recall@1 by the query's rewrite"),
    ):
        width = 0.8 / len(VARIANTS)
        for place, (variant, (label, colour)) in enumerate(VARIANTS.items()):
            xs = [i + (place - 1.5) * width for i in range(len(names))]
            values = [[run[variant][field][name] for run in result["runs"]] for name in names]
            axes.bar(xs, [mean(v) for v in values], width * 0.92, color=colour, label=label, zorder=2)
            for x, dots in zip(xs, values, strict=True):
                axes.plot([x] * len(dots), dots, ".", color="#1f2933", markersize=4, zorder=3)
                axes.text(x, max(dots) + 0.015, f"{mean(dots):.2f}", ha="center", fontsize=7.5)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, 1.12)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(axis="y", color="#e4e8ee", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    modes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    figure.tight_layout()
    return figure
