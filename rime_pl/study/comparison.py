"""A record as tables and as a picture: before, the controls, the run under study.

Called by `rime compare` and `rime claims`; measure.py says what a record is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.report.figures import GRID, INK, short_name
from rime_pl.report.table import Table
from rime_pl.report.tables import REWRITES, crossed_table
from rime_pl.study.design import COMPARISONS
from rime_pl.study.measure import Record
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION


def comparison_tables(record: Record) -> list[Table]:
    """Return all results of a record but the differences, in the order of reading."""
    shown, many = COMPARISONS[record["stage"]], len(record["seeds"]) > 1
    variants = {shown.variants[name][0]: one for name, one in record["variants"].items()}
    slots = [("slot_f1", "slot F1")] if all(one["slot_f1"] for one in variants.values()) else []
    note = f"Test split, mean over the headline tasks. Gallery {record['gallery']}, "
    note += f"chance {record['chance']:.4f}, seeds {', '.join(map(str, record['seeds']))}."
    if many:
        note += " In brackets: the lowest and the highest seed. Seconds: of the run that was disturbed least."

    def cells(spreads: Iterable[Sequence[float]]) -> list[str]:
        return [f"{middle:.3f}" + f" ({low:.2f}-{high:.2f})" * many for middle, low, high in spreads]

    recalls, ablation = [], []
    for label, one in variants.items():
        seconds = f"{one['seconds_per_step']:.2f}" if one["seconds_per_step"] else "-"
        found = cells(one["recall@1"].values())
        recalls.append([label, str(one["steps"]), seconds, *found, f"{one['tokens']:.1f}"])
        ablation.append([label, *cells([*one["trace"].values(), *(one[key] for key, _ in slots)])])
    head = ["run", "training\nsteps", "seconds\nper step", *MODE_PAIRS, "tokens of\na rewrite"]
    tables = [Table("recall@1 by query mode - target mode", head, recalls, note=note)]
    title = "Rewrite ablation: recall@1 of gen-gen with this rewrite on the query side"
    head = ["run", *(REWRITES[key] for key in REWRITE_ABLATION), *(name for _, name in slots)]
    tables.append(Table(title, head, ablation))
    if record["crossed"]:
        tables.append(crossed_table({key: cells([one])[0] for key, one in record["crossed"].items()}))
    if curves := {label: one["curves"] for label, one in variants.items() if one["curves"]}:
        rows = [[label, *(f"{value:.3f}" for value in means.values())] for label, means in curves.items()]
        tables.append(Table("Means over the logged steps", ["run", *next(iter(curves.values()))], rows))
    title = f"recall@1 of each task, {shown.variants[shown.subject][0]}"
    rows = [[task, *cells(found.values())] for task, found in record["tasks"].items()]
    return [*tables, Table(title, ["task", *MODE_PAIRS], rows)]


def differences_table(record: Record) -> Table:
    """Return each difference, what the claim needs of it, and the verdict; above it the verdicts in words."""
    shown, rows, missing = COMPARISONS[record["stage"]], [], []
    labels: dict[str, list[str]] = {"holds": [], "does not hold": [], "not shown": [], "-": []}
    for d in shown.differences:
        if d.key not in record["differences"]:
            missing.append(shown.label(d))
            continue
        found = record["differences"][d.key]
        labels[d.verdict(found)].append(shown.label(d))
        interval = f"{found['lower']:+.3f} to {found['upper']:+.3f}"
        needed = "-" if d.at_least is None else f"more than {d.at_least:.2f}"
        each = [f"{value:+.3f}" for value in found["seeds"]]
        rows.append([shown.label(d), f"{found['mean']:+.3f}", interval, *each, needed, d.verdict(found)])
    parts, holds = sum(d.at_least is not None for d in shown.differences), len(labels["holds"])
    words = f"{'All' if holds == parts else f'{holds} of {parts}'} parts of the claim hold."
    for lead, names in (
        ("Does not hold", labels["does not hold"]),
        ("Not shown, because the interval or a seed lies on the other side", labels["not shown"]),
        ("Not run", missing),
    ):
        words += f" {lead}: {'; '.join(names)}." if names else ""
    seeds = [f"seed {seed}" for seed in record["seeds"]]
    head = ["difference of recall@1", "mean", "95 % interval", *seeds, "the claim needs", "verdict"]
    return Table("", head, rows, conclusion=words)


def comparison_figure(record: Record) -> Figure:
    """Draw the four modes and the rewrite ablation as bars; a line spans the lowest and the highest seed."""
    looks, variants = COMPARISONS[record["stage"]].variants, record["variants"]
    num, by_length = len(variants), record["stage"] == "sft"
    figure = Figure(figsize=(14 + 1.5 * max(0, num - 4) + 5 * by_length, 5.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    modes, ablation, *more = figure.subplots(1, 2 + by_length, sharey=True)
    for place, (name, one) in enumerate(variants.items()):
        label, colour = looks[name]
        for axes, spreads in ((modes, one["recall@1"].values()), (ablation, one["trace"].values())):
            xs = [group + (place - (num - 1) / 2) * 0.8 / num for group in range(len(spreads))]
            look = {"width": 0.74 / num, "color": colour, "label": label, "zorder": 2, "ecolor": INK}
            bars = axes.bar(xs, [one[0] for one in spreads], yerr=_errors(spreads), **look)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7.5, rotation=90 if num > 5 else 0)
        for axes in more:  # a model that learnt no rewrite is used in its discriminative mode
            point = one["recall@1"]["disc-disc" if name == "discriminative_only" else "gen-gen"]
            axes.errorbar(one["tokens"], point[0], _errors([point]), fmt="o", color=colour, markersize=8)
            axes.set_title("recall@1 by length", fontsize=11, loc="left")
            axes.set_xlabel("generated tokens of a query and of a target, mean")
    modes.set_xticks(range(len(MODE_PAIRS)), MODE_PAIRS)
    modes.set_title("recall@1: query mode - target mode (lines: range of seeds)", fontsize=11, loc="left")
    ablation.set_xticks(range(len(REWRITE_ABLATION)), map(short_name, REWRITE_ABLATION))
    ablation.set_title("recall@1 of gen-gen by the rewrite of the query", fontsize=11, loc="left")
    for axes in (modes, ablation, *more):
        axes.set_ylim(0, 1.08)
        axes.grid(axis="y", color=GRID, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*modes.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.12 if num > 4 else 0.07, 1, 1))
    return figure


def _errors(spreads: Iterable[Sequence[float]]) -> list[list[float]]:
    """Return the distances from the mean to the lowest and to the highest seed."""
    return [[max(0.0, one[0] - one[1]) for one in spreads], [max(0.0, one[2] - one[0]) for one in spreads]]
