"""Draws recall@1 over the share of queries that get a rewrite, from never to always.

Called by `rime search --calibrate` and benchmarks/search.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.report.figures import AFTER, GRID, INK, SOFT, WARN

_COLOURS = ("#0f9d76", "#e08a00", AFTER)


class Shown(NamedTuple):
    """A point of a curve; recalls from 0 to 1."""

    share: float  # of queries with a rewrite, from 0 to 1
    recall: float
    low: float  # interval
    high: float


def adaptive_figure(
    curves: Mapping[str, Sequence[Shown]], chosen: Sequence[Shown] = (), title: str = ""
) -> Figure:
    """Draw the curves with their intervals as bands, and the points that were chosen."""
    figure = Figure(figsize=(7.2, 4.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        shares = [100 * point.share for point in points]
        axes.plot(shares, [p.recall for p in points], "o-", color=colour, markersize=4, label=name)
        axes.fill_between(
            shares, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.13, linewidth=0
        )
    if chosen:
        axes.plot(
            [100 * one.share for one in chosen],
            [one.recall for one in chosen],
            "o",
            color=WARN,
            markersize=10,
            fillstyle="none",
            label="chosen",
        )
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=6)
    axes.set_xlabel("queries that get a rewrite, in % (0: never, 100: always)", color=SOFT, fontsize=9)
    axes.set_ylabel("recall@1 (bands: 95 % interval)", color=SOFT, fontsize=9)
    axes.grid(axis="y", color=GRID)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
    figure.tight_layout()
    return figure
