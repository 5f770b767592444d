"""The pictures of the page: curves, the four modes, the rewrite ablation, and recall against its cost.

No text of a run is drawn: runs are called A, B and so on, and the page says which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from matplotlib.axes import Axes

from rime_pl.report.figures import CURVES, GRID, INK, SOFT, draw_ablation, draw_modes
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.svg import drawing, inline
from rime_pl.types import MODE_PAIRS

#: A curve has so many points at most; of more, neighbours are averaged.
MAX_POINTS = 200
MARKS = "oDs^vPX*"

Points = Sequence[tuple[float, float]]


@dataclass
class Line:
    """One curve of a panel."""

    label: str
    colour: str
    points: Points
    dashed: bool = False


def curves(title: str, lines: Sequence[Line]) -> Element:
    """Return a small panel of curves; a point in it may stand for several steps."""
    with drawing(3.5, 2.1) as figure:
        axes = figure.subplots()
        said = []
        for line in lines:
            xs, ys = zip(*thinned(line.points), strict=True)
            look: Any = {"color": line.colour, "linestyle": "--" if line.dashed else "-", "linewidth": 1.5}
            axes.plot(xs, ys, marker="o" if len(xs) < 16 else "", markersize=3, label=line.label, **look)
            first, last = line.points[0], line.points[-1]
            said.append(f"{line.label}: {first[1]:.4g} at step {first[0]:g}, {last[1]:.4g} at {last[0]:g}")
        _quiet(axes, "training step")
        if "recall@" in title:
            axes.set_ylim(0, 1.03)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=len(lines) if len(lines) < 5 else 4, **_ABOVE)
        return inline(figure, title, ". ".join(said) + ".")


_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0, "handlelength": 1.4}


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most ``most`` points: means of neighbours.

    >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], 2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    size = -(-len(points) // most)
    groups = [points[at : at + size] for at in range(0, len(points), size)] if size > 1 else []
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return means or list(points)


def modes(run: RunFacts) -> Element:
    """Return recall@1 of the four mode pairs, before and after, with intervals and chance."""
    after, before = run.summary["after"]["recall@1"], (run.before or {}).get("recall@1", {})
    said = [
        f"{pair} {after[pair]:.3f}" + (f", before {before[pair]:.3f}" if pair in before else "")
        for pair in MODE_PAIRS
        if pair in after
    ]
    with drawing(4.8, 3.4) as figure:
        draw_modes(figure.subplots(), run.summary)
        return inline(figure, "recall@1 of the four mode pairs", "; ".join(said) + ".")


def ablation(run: RunFacts) -> Element:
    """Return recall@1 of gen-gen for each rewrite on the query side."""
    trace = {name: value for name, value in run.summary["after"]["trace"].items() if value is not None}
    said = [
        f"{name} {trace[name]:.3f}" for name in ("own", "reference", "shuffled", "empty") if name in trace
    ]
    with drawing(4.8, 3.4) as figure:
        draw_ablation(figure.subplots(), run.summary)
        return inline(figure, "rewrite ablation: recall@1 of gen-gen by the rewrite", "; ".join(said) + ".")


@dataclass
class Cost:
    """What a search in one mode pair costs and finds."""

    run: RunFacts
    pair: str
    tokens: float  # written for a query
    milliseconds: float | None  # to embed a query; None: not measured
    recall: float


def costs(found: Sequence[Cost], column: str, axis: str) -> Element:
    """Return recall@1 against one kind of cost: a mark for each run, a colour for each mode pair."""
    shown = [(one, getattr(one, column)) for one in found if getattr(one, column) is not None]
    said = [f"{one.run.letter} {one.pair}: {one.recall:.3f} at {cost:.1f}" for one, cost in shown]
    letters = sorted({one.run.letter for one, _ in shown})
    with drawing(4.0, 3.0) as figure:
        axes = figure.subplots()
        for one, cost in shown:
            mark = MARKS[letters.index(one.run.letter) % len(MARKS)]
            axes.plot([cost], [one.recall], mark, color=CURVES[one.pair], markersize=8, alpha=0.85)
        for pair in dict.fromkeys(one.pair for one, _ in shown):
            axes.plot([], [], "o", color=CURVES[pair], label=pair)
        for letter in letters if len(letters) > 1 else ():
            axes.plot([], [], MARKS[letters.index(letter) % len(MARKS)], color=SOFT, label=f"run {letter}")
        _quiet(axes, axis)
        axes.set_ylabel("recall@1", color=SOFT, fontsize=9)
        axes.set_ylim(0, 1.03)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        axes.legend(frameon=False, fontsize=8, ncols=4, columnspacing=1, handletextpad=0.2, **_ABOVE)
        return inline(figure, f"recall@1 against {axis}", "; ".join(said) + ".")


def _quiet(axes: Axes, axis: str) -> None:
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.set_xlabel(axis, color=SOFT, fontsize=9)
