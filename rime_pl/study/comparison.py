"""Records as tables, as pictures, and as the page of the claims; record.py says what a record is.

Called by `rime compare` and `rime claims`. The template of the page, ``claims.template.md``, names its parts
as ``$overview``, ``$sft``, ``$cma`` and ``$refine_rl``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rime_pl.report.figures import GRID, INK, SOFT, short_name
from rime_pl.report.table import Table
from rime_pl.report.tables import REWRITES, crossed_table
from rime_pl.run_files import read_facts
from rime_pl.study.design import COMPARISONS
from rime_pl.study.record import Record
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

Records = Mapping[str, Mapping[str, Record]]  # stage -> corpus -> record
MARKS = {"holds": "o", "not shown": "D", "does not hold": "X"}
COLOURS = ("#2f6bde", "#e08a00", "#0f9d76")  # of the corpora


def comparison_tables(record: Record) -> list[Table]:
    """Return all results of a record but the differences, in the order of reading."""
    shown, many = COMPARISONS[record["stage"]], len(record["seeds"]) > 1
    variants = {shown.variants[name][0]: one for name, one in record["variants"].items()}
    slots = [("slot_f1", "slot F1")] if all(one["slot_f1"] for one in variants.values()) else []
    note = f"Test split, mean over the headline tasks. Gallery {record['gallery']}, "
    note += f"chance {record['chance']:.4f}, seeds {', '.join(map(str, record['seeds']))}."
    if record.get("commits"):
        note += f" Code: commit {', '.join(commit[:7] for commit in record['commits'])}."
    if many:
        note += " In brackets: the lowest and the highest seed. Seconds: of the run that was disturbed least."

    def cells(spreads: Iterable[Sequence[float]]) -> list[str]:
        return [f"{one[0]:.3f}" + f" ({one[1]:.2f}-{one[2]:.2f})" * many if one else "-" for one in spreads]

    recalls, ablation, adaptive = [], [], record.get("adaptive")
    if adaptive:
        note += " Adaptive search: in place of gen-gen; a query gets a rewrite only where its discriminative "
        note += f"margin is below a threshold from validation ({adaptive['share'][0]:.0%} of the queries)."
    for label, one in variants.items():
        seconds = f"{one['seconds_per_step']:.2f}" if one["seconds_per_step"] else "-"
        found = cells(one["recall@1"].values())
        recalls.append([label, str(one["steps"]), seconds, *found, f"{one['tokens']:.1f}"])
        if adaptive and one is record["variants"][shown.subject]:
            tokens = adaptive["share"][0] * one["tokens"]
            mixed = ["-", *cells([adaptive["recall@1"]]), "-", "-"]  # in the column of gen-gen
            recalls.append([f"{label}, adaptive search", "-", "-", *mixed, f"{tokens:.1f}"])
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
    if record.get("tuned"):
        tables.append(tuning_table(record["tuned"]))
    title = f"recall@1 of each task, {shown.variants[shown.subject][0]}"
    rows = [[task, *cells(found.values())] for task, found in record["tasks"].items()]
    return [*tables, Table(title, ["task", *MODE_PAIRS], rows)]


def tuning_table(tuned: Mapping[str, Any]) -> Table:
    """Return what `rime tune` found for both arms, and which weight it chose."""
    values = list(tuned["rewrite"]["tried"])
    rows = [
        [
            arm.replace("_", " "),
            *(f"{tuned[arm]['tried'][v]:.3f}" for v in values),
            f"{tuned[arm]['chosen']:g}",
        ]
        for arm in ("rewrite", "chain_of_thought")
    ]
    note = f"{tuned['measure']} of all validation queries ({tuned['queries']} are annotated), seed "
    note += f"{tuned['seed']}. The chosen weights are those of all seeds, and of both chains of thought. No "
    note += "run of this table read the test split."
    if any(
        tuned[arm]["chosen"] in (float(values[0]), float(values[-1]))
        for arm in ("rewrite", "chain_of_thought")
    ):
        note += " A weight at the end of the grid was chosen, so a better one may lie beyond it."
    return Table("Weight of the cross-entropy", ["arm", *values, "chosen"], rows, note=note)


def seeds_vary(record: Record) -> str:
    """Return in a sentence what the seeds of a record vary."""
    seeds, bases = len(record["seeds"]), record.get("base_models", 1)
    if seeds < 2:
        return "One seed."
    shared = [] if bases == seeds else [f"{bases} base model{'s' * (bases > 1)} for {seeds} seeds"]
    if len(record.get("annotated_seeds", [0])) < seeds and record["stage"] == "refine_rl":
        shared.append("the same annotated pairs for several seeds")
    return f"These runs have {' and '.join(shared)}." if shared else "Each seed has its own base model."


def differences_table(record: Record) -> Table:
    """Return each difference, what the claim needs of it, and the verdict; above it the verdicts in words."""
    shown, rows, missing = COMPARISONS[record["stage"]], [], []
    labels: dict[str, list[str]] = {"holds": [], "does not hold": [], "not shown": [], "-": []}
    for d in shown.differences:
        if d.key not in record["differences"]:
            without = [
                seed for name in (d.first, d.second) for seed in record.get("lacking", {}).get(name, ())
            ]
            only_some = f" (not in seed {', '.join(map(str, sorted(set(without))))})" if without else ""
            missing.append(shown.label(d) + only_some)
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
    modes, ablation, *more = figure.subplots(1, 2 + by_length, sharey=True)
    for place, (name, one) in enumerate(variants.items()):
        label, colour = looks[name]
        for axes, found in ((modes, one["recall@1"].values()), (ablation, one["trace"].values())):
            spreads = [seeds or [float("nan")] * 3 for seeds in found]  # not measured: not drawn
            xs = [group + (place - (num - 1) / 2) * 0.8 / num for group in range(len(spreads))]
            look = {"width": 0.74 / num, "color": colour, "label": label, "zorder": 2, "ecolor": INK}
            bars = axes.bar(xs, [one[0] for one in spreads], yerr=_errors(spreads), **look)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7.5, rotation=90 if num > 5 else 0)
        for axes in more:  # a model that learnt no rewrite is used in its discriminative mode
            point = one["recall@1"]["disc-disc" if name == "discriminative_only" else "gen-gen"]
            axes.errorbar(one["tokens"], point[0], _errors([point]), fmt="o", color=colour, markersize=8)
            axes.set_title("recall@1 by length", fontsize=11, loc="left")
            axes.set_xlabel("tokens after the prompt, mean (latent ones are fed, all others are generated)")
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


def read_records(folder: Path) -> dict[str, dict[str, Record]]:
    """Return the records in a folder, in the order of the page."""
    records: dict[str, dict[str, Record]] = {stage: {} for stage in COMPARISONS}
    for file in sorted(folder.glob("*.json")):
        record = read_facts(file)
        records[record["stage"]][record["corpus"]] = record
    return records


def claims_page(template: str, records: Records) -> str:
    """Return the template with the results of the records in it."""
    parts = {stage: _section(stage, found) if found else "Not run." for stage, found in records.items()}
    return Template(template).substitute(parts, overview=overview(records).markdown())


def overview(records: Records) -> Table:
    """Return how many parts of each claim hold on each corpus."""
    rows = []
    for number, (stage, shown) in enumerate(COMPARISONS.items(), 1):
        for corpus in dict.fromkeys((*shown.corpora, *records[stage])):
            cells = ["not run", *"---"]
            if record := records[stage].get(corpus):
                found = record["differences"]
                verdicts = [d.verdict(found[d.key]) for d in shown.differences if d.key in found]
                cells = [str(len(record["seeds"])), *(str(verdicts.count(verdict)) for verdict in MARKS)]
            rows.append([f"{number}. {shown.title}", corpus, *cells])
    return Table("", ["claim", "corpus", "seeds", *MARKS], rows)


def _section(stage: str, records: Mapping[str, Record]) -> str:
    parts = [f"![each difference, and what the claim needs]({picture(stage)})"]
    for corpus, record in records.items():
        parts += [f"### {corpus}", seeds_vary(record), differences_table(record).markdown()]
        parts += [f"![recall of each run]({picture(stage, corpus)})"]
        parts += [f"<details><summary>All results, measured {record['date']}</summary>"]
        parts += [*(table.markdown() for table in comparison_tables(record)), "</details>"]
    return "\n\n".join(parts)


def picture(stage: str, corpus: str = "") -> str:
    """Return the file name of a picture: ``claims-refine-rl-scenes.png``."""
    return "-".join(filter(None, ("claims", stage.replace("_", "-"), corpus))) + ".png"


def claims_figure(records: Mapping[str, Record]) -> Figure:
    """Draw each difference of a stage on each corpus: interval, seeds as dots, and what the claim needs."""
    shown = COMPARISONS[next(iter(records.values()))["stage"]]
    measured = {key for record in records.values() for key in record["differences"]}
    needed = [d for d in shown.differences if d.at_least is not None and d.key in measured]
    figure = Figure(figsize=(12, 1.4 + 0.62 * len(needed)), dpi=110, facecolor="white")
    axes = figure.subplots()
    for row, d in enumerate(needed):
        axes.vlines(d.at_least or 0.0, row - 0.42, row + 0.42, color=INK, linewidth=1.4, zorder=2)
        for place, (record, colour) in enumerate(zip(records.values(), COLOURS, strict=False)):
            if found := record["differences"].get(d.key):
                y = row + (place - (len(records) - 1) / 2) * 0.7 / len(records)
                axes.plot([found["lower"], found["upper"]], [y, y], color=colour, linewidth=2.5, zorder=3)
                axes.plot(found["seeds"], [y] * len(found["seeds"]), ".", color=INK, markersize=4, zorder=5)
                axes.plot([found["mean"]], [y], MARKS[d.verdict(found)], color=colour, markersize=9, zorder=4)
    axes.axvline(0, color=GRID, zorder=0)
    axes.set_yticks(range(len(needed)), [textwrap.fill(shown.label(d), 62) for d in needed], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    shows = "difference of recall@1 and its 95 % interval; dots: seeds; vertical line: what the claim needs"
    axes.set_xlabel(shows)
    looks: dict[str, Any] = {name: {"marker": mark, "linestyle": ""} for name, mark in MARKS.items()}
    corpora = {name: {"color": c, "linewidth": 2.5} for name, c in zip(records, COLOURS, strict=False)}
    lines = [Line2D([], [], label=name, **{"color": SOFT} | look) for name, look in (corpora | looks).items()]
    axes.legend(handles=lines, frameon=False, fontsize=9, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0))
    figure.tight_layout()
    return figure
