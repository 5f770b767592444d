"""``summary.png``: the four modes before and after, the curves of the run, and the rewrite ablation.

Called by ``report.stage``. It draws on matplotlib's Agg canvas, so it needs no display and leaves pyplot's
global state alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.report.tables import REWRITES
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

INK, SOFT, GRID, WARN = "#1f2933", "#6b7785", "#e4e8ee", "#c94f4f"
BEFORE, AFTER = "#b8c2cf", "#2f6bde"
#: Blue and green are readable together for the colour-blind; the cross modes are the warm pair.
CURVES = {"disc-disc": "#2f6bde", "gen-gen": "#0f9d76", "gen-disc": "#e08a00", "disc-gen": "#c2417c"}
ABLATION = {"own": "#0f9d76", "reference": "#2f6bde", "shuffled": "#e08a00", "empty": WARN}


def summary_figure(summary: Mapping[str, Any], title: str = "") -> Figure:
    """Draw the three panels; a panel without numbers says why it is empty."""
    figure = Figure(figsize=(16, 5.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    bars, curves, ablation = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.25, 1.1, 0.95]})
    draw_modes(bars, summary)
    draw_curves(curves, summary["history"])
    draw_ablation(ablation, summary)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.012, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 1), w_pad=2.5)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG without a date in it, so equal numbers give equal bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_modes(axes: Axes, summary: Mapping[str, Any]) -> None:
    """recall@1 of each mode pair as bars, with the 95 % interval as whiskers and chance as a line."""
    if not summary["after"]:
        _share_axis(axes, "recall@1, test split")
        _nothing(axes, "not tested (data.test_modes)")
        return
    now = "after" if summary["before"] else "this run"
    runs = [("before", summary["before"], BEFORE), (now, summary["after"], AFTER)]
    runs = [run for run in runs if run[1] is not None]
    width = 0.8 / len(runs)
    for place, (label, results, colour) in enumerate(runs):
        pairs = [pair for pair in MODE_PAIRS if pair in results["recall@1"]]
        xs = [MODE_PAIRS.index(pair) + (place - (len(runs) - 1) / 2) * width for pair in pairs]
        values = [results["recall@1"][pair] for pair in pairs]
        bounds = [results["ci"][pair] for pair in pairs]
        whiskers = [[max(0.0, v - low) for v, (low, _) in zip(values, bounds, strict=True)]]
        whiskers.append([max(0.0, high - v) for v, (_, high) in zip(values, bounds, strict=True)])
        style = {"ecolor": INK, "elinewidth": 1.1, "capsize": 3}
        axes.bar(xs, values, width * 0.92, color=colour, label=label, yerr=whiskers, error_kw=style, zorder=2)
        for x, value, (_, high) in zip(xs, values, bounds, strict=True):
            axes.text(x, max(value, high) + 0.018, f"{value:.2f}", ha="center", fontsize=9, color=INK)
    label = f"chance ({summary['chance']:.3f})"
    axes.axhline(summary["chance"], color=WARN, linestyle=(0, (4, 3)), linewidth=1.4, zorder=3, label=label)
    axes.set_xticks(range(len(MODE_PAIRS)), MODE_PAIRS)
    axes.set_xlim(-0.55, 3.55)
    _share_axis(axes, f"recall@1, test split, gallery {summary['gallery']} (bars: 95 % interval)")
    axes.set_xlabel("query mode - target mode", color=SOFT, fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.01), frameon=False, fontsize=9, ncols=3)


def draw_curves(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    """recall@1 of each mode pair at each validation."""
    sizes = {entry.get("gallery_left_out", 0) for entry in history}
    limited = f", gallery without {' / '.join(f'{n:.0f}' for n in sorted(sizes))} items" if any(sizes) else ""
    _share_axis(axes, f"recall@1 per epoch, validation split{limited}")
    axes.set_xlabel("training batch", color=SOFT, fontsize=9)
    if not history:
        _nothing(axes, "no validation during training")
        return
    steps = [entry["step"] for entry in history]
    for pair, colour in CURVES.items():
        found = [(entry["step"], entry[name]) for entry in history if (name := f"recall@1/{pair}") in entry]
        style = "o-" if pair in ("disc-disc", "gen-gen") else "o--"
        if found:  # data.val_modes may leave it out
            xs, ys = zip(*found, strict=True)
            axes.plot(xs, ys, style, color=colour, markersize=4.5, linewidth=1.9, label=pair)
    if all("trace/empty" in entry for entry in history):
        values = [entry["trace/empty"] for entry in history]
        axes.plot(
            steps,
            values,
            ":",
            color=ABLATION["empty"],
            marker=".",
            linewidth=1.5,
            label="gen-gen, empty rewrite",
        )
    axes.set_xticks(steps if len(steps) <= 8 else steps[:: len(steps) // 6 + 1])
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5)


def draw_ablation(axes: Axes, summary: Mapping[str, Any]) -> None:
    """recall@1 of gen-gen with each rewrite on the query side; a line across the bar is the run before."""
    _share_axis(axes, "rewrite ablation: gen-gen recall@1 by the query's rewrite")
    axes.set_xlabel("rewrite on the query side", color=SOFT, fontsize=9)
    after, before = summary["after"].get("trace"), (summary["before"] or {}).get("trace")
    if after is None:
        _nothing(axes, "rewrite ablation is switched off" if summary["after"] else "not tested")
        return
    for place, name in enumerate(REWRITE_ABLATION):
        if after[name] is None:
            axes.text(place, 0.015, "-", ha="center", fontsize=9, color=INK)
            continue
        axes.bar(place, after[name], 0.62, color=ABLATION[name], zorder=2)
        axes.text(place, after[name] + 0.015, f"{after[name]:.2f}", ha="center", fontsize=9, color=INK)
        if before and before[name] is not None:
            label = "before" if place == 0 else "_more"  # matplotlib leaves "_..." out of the legend
            axes.hlines(
                before[name], place - 0.38, place + 0.38, color=INK, linewidth=2, zorder=3, label=label
            )
    axes.set_xticks(range(len(REWRITE_ABLATION)), [short_name(name) for name in REWRITE_ABLATION])
    worth = ("own-minus-empty", "own-minus-shuffled")
    values = {name: "-" if after[name] is None else f"{after[name]:+.2f}" for name in worth}
    note = "\n".join(f"{REWRITES[name]:<21} {value}" for name, value in values.items())
    axes.text(
        0.98,
        0.97,
        note,
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
        color=INK,
        family="monospace",
    )
    if before:
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.01), frameon=False, fontsize=9)


def short_name(rewrite: str) -> str:
    """Return the printed name of a rewrite without that word, for an axis: ``another query's``."""
    return REWRITES[rewrite].removesuffix(" rewrite")


def _share_axis(axes: Axes, title: str) -> None:
    """Give a panel the look of all: values from 0 to 1, a quiet grid, no box."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=6)
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=SOFT)
