"""The page of `rime claims`: results of all stages and corpora, filled into a template of prose.

The template, ``claims.template.md``, names its parts as ``$overview``, ``$sft``, ``$cma`` and ``$refine_rl``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rime_pl.errors import RimeError
from rime_pl.report.figures import GRID, INK, SOFT
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder
from rime_pl.study.comparison import comparison_tables, differences_table
from rime_pl.study.design import COMPARISONS
from rime_pl.study.measure import Record, measure

Records = Mapping[str, Mapping[str, Record]]  # stage -> corpus -> record
MARKS = {"holds": "o", "not shown": "D", "does not hold": "X"}
COLOURS = ("#2f6bde", "#e08a00", "#0f9d76")  # of the corpora


def pool(folders: Sequence[Path]) -> list[Record]:
    """Return a record per stage and corpus, over all seeds in the folders that `rime compare` wrote."""
    seeds: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for folder in folders:
        file = folder / "compare.json"
        compared = json.loads(file.read_text()) if file.is_file() else {}
        if "folders" not in compared:
            raise RimeError(
                f"--compared must name folders with a compare.json of this version, but {folder} has none. "
                f"Run `rime compare --output {folder}`."
            )
        stage = compared["stage"]
        for variants in compared["folders"]:
            run = RunFolder(variants[COMPARISONS[stage].subject])
            seed, corpus = run.manifest["seed"], Path(run.manifest["data"]).name
            if seeds.setdefault((stage, corpus), {}).setdefault(seed, variants) != variants:
                raise RimeError(
                    f"--compared must name each seed once, but {folder} holds seed {seed} of {stage} on "
                    f"{corpus}, which was given already from another run."
                )
    return [
        measure(stage, [{name: RunFolder(run) for name, run in runs[seed].items()} for seed in sorted(runs)])
        for (stage, _), runs in seeds.items()
    ]


def read_records(folder: Path) -> dict[str, dict[str, Record]]:
    """Return the records in a folder, in the order of the page."""
    records: dict[str, dict[str, Record]] = {stage: {} for stage in COMPARISONS}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
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
        parts += [f"### {corpus}", differences_table(record).markdown()]
        parts += [f"![recall of each run]({picture(stage, corpus)})"]
        parts += [f"<details><summary>All results, measured {record['date']}</summary>"]
        parts += [*(table.markdown() for table in comparison_tables(record)), "</details>"]
    return "\n\n".join(parts)


def picture(stage: str, corpus: str = "") -> str:
    """Return the file name of a picture: ``claims-refine-rl-scenes.png``."""
    return "-".join(filter(None, ("claims", stage.replace("_", "-"), corpus))) + ".png"


def claims_figure(records: Mapping[str, Record]) -> Figure:
    """Draw each difference of a stage: interval, seeds as dots, and what the claim needs.

    Args:
        records: Corpus -> record, all of one stage.
    """
    shown = COMPARISONS[next(iter(records.values()))["stage"]]
    measured = {key for record in records.values() for key in record["differences"]}
    needed = [d for d in shown.differences if d.at_least is not None and d.key in measured]
    figure = Figure(figsize=(12, 1.4 + 0.62 * len(needed)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
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
    axes.set_xlabel(
        "difference of recall@1 and its 95 % interval; dots: seeds; vertical line: what the claim needs"
    )
    lines = [
        Line2D([], [], color=c, linewidth=2.5, label=name) for name, c in zip(records, COLOURS, strict=False)
    ]
    lines += [
        Line2D([], [], color=SOFT, marker=mark, linestyle="", label=name) for name, mark in MARKS.items()
    ]
    axes.legend(handles=lines, frameon=False, fontsize=9, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0))
    figure.tight_layout()
    return figure
