"""The page of `rime claims`: each claim with its bars, its figure and its tables, whatever they say.

Called by rime_pl/commands/claims.py with the numbers of `rime compare`, pooled over the seeds. A *record* is
what the page says of one stage on one corpus; records are kept beside the page, so that one can be made anew
without the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.study.comparison import COMPARISONS, comparison_markdown, differences_table, verdict

#: Stage -> its section; the order of the page.
TITLES = {
    "sft": "Rewrite, or steps of reasoning?",
    "cma": "Alignment and the decisive term",
    "refine_rl": "Reinforcement learning of the rewrite",
}
#: Where `make claims` checks it.
CORPORA = {"sft": ("scenes",), "cma": ("openmoji", "scenes"), "refine_rl": ("openmoji", "scenes")}
#: What a reader of the section must know.
SETUPS = {
    "sft": (
        "The steps of the corpus' own texts stand in for reasoning: a study of the mechanism. On the scenes "
        "alone: what OpenMoji asks is seen at a glance, and its texts have no steps."
    ),
    "cma": "From an SFT run that saw every rewrite; all controls start from the same one.",
    "refine_rl": (
        "From SFT and CMA runs that saw the rewrites of a tenth of the pairs, as it is where annotation is "
        "dear: so what is there before is less than in section 2. RL runs on the other pairs. On the scenes "
        "the reward's temperature is .2 (.05 on OpenMoji) and each group is divided by its own spread: the "
        "recipe of OpenMoji gained nothing reliable there. Three controls change what a rewrite is compared "
        "with: discriminative embeddings of the batch alone, without the table; the other side's rollouts "
        "in their place, all else being equal; and *the ancestor's reward*, which differs from the latter "
        "in form and embedder, in that all groups count, each divided by its own spread (as in all runs on "
        "the scenes). Its rewards are cosines, not nats, so its spread compares with the others' in no way. "
        "That ours is better is no part of the claim. As many seconds are counted from the quickest step of "
        "either kind, RL with shuffled rewards and further CMA for as many steps included: s/step in the "
        "table is of each line's own runs. This rule was changed after a first result on OpenMoji (+.017, "
        "-.0005 to +.033, not shown) was known: take that part as a tie with a tendency. What was tried: "
        "[decision 7](../decisions/0007-refine-rl-recipe.md); how it works: [Refine-RL, step by "
        "step](refine-rl.md)."
    ),
}
CORPUS_COLOURS = ("#2f6bde", "#e08a00", "#0f9d76")
MARKS = {"holds": "o", "not shown": "D", "does not hold": "X"}
INK, GRID = "#1f2933", "#e4e8ee"
INTRODUCTION = """\
Made by `rime claims`; `make claims` trains what is missing before. The verdicts follow from
the numbers by a rule, whatever they say. Test split; where a recipe was settled with it in sight, the
[decisions](../decisions/) say so. The model is the tiny one of this repository (2.3 M parameters, NF4 +
LoRA): what holds here is shown for this miniature alone, and what does not hold here may hold for a 2B
model.

Each claim is cut into differences of recall@1 between runs that share seed, data and base; what each
has to reach stands beside it (the bars of section 2 were written into the code after its runs). A
difference **holds** when its whole 95 % interval and every seed are above that, **does not hold** when
the whole interval is below, and is **not shown** otherwise. Queries are resampled, paired, each with what all
seeds made of it; the spread between seeds is not in the interval: see *each seed*.
"""
Record = Mapping[str, Any]  # of one stage and corpus


def make_record(result: Mapping[str, Any], date: str) -> dict[str, Any]:
    """What the page says of one stage on one corpus.

    Args:
        result: Numbers as in compare.json.
        date: When they were put together.
    """
    return {
        "stage": result["stage"],
        "date": date,
        "num_seeds": len(result["runs"]),
        "differences": result["differences"],
        "numbers": comparison_markdown(result, differences=False).splitlines(),
    }


def claims_page(records: Mapping[str, Mapping[str, Record]]) -> str:
    """The whole page.

    Args:
        records: Stage -> corpus -> record.
    """
    lines = [
        "# Three claims, checked in miniature",
        "",
        INTRODUCTION,
        "| claim | corpus | seeds | holds | not shown | does not hold |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, stage in enumerate(TITLES, 1):
        missing = [corpus for corpus in CORPORA[stage] if corpus not in records.get(stage, {})]
        lines += [f"| {number}. {TITLES[stage]} | {corpus} | not run | | | |" for corpus in missing]
        for corpus, record in records.get(stage, {}).items():
            counts = [str(list(verdicts(record).values()).count(name)) for name in MARKS]
            seeds = record["num_seeds"]
            lines.append(f"| {number}. {TITLES[stage]} | {corpus} | {seeds} | {' | '.join(counts)} |")
    for number, (stage, title) in enumerate(TITLES.items(), 1):
        lines += ["", f"## {number}. {title}", "", f"*Claim:* {COMPARISONS[stage].claim}", ""]
        lines += [SETUPS[stage], ""]
        if stage not in records:
            lines += ["Not run."]
            continue
        lines += [f"![differences and what the claim needs]({figure_name(stage)})"]
        for corpus, record in records[stage].items():
            lines += ["", f"### {corpus}", "", *differences_table(record), "", *in_words(record), ""]
            lines += [f"![recall of each run]({figure_name(stage, corpus)})", ""]
            summary = f"<details><summary>All numbers, measured {record['date']}</summary>"
            lines += [summary, "", *record["numbers"], "", "</details>"]
    return "\n".join(lines) + "\n"


def figure_name(stage: str, corpus: str = "") -> str:
    return "-".join(["claims", stage.replace("_", "-"), *([corpus] if corpus else [])]) + ".png"


def verdicts(record: Record) -> dict[str, str]:
    """Label of each difference that the claim needs and that was measured -> its verdict."""
    return {
        d.label: verdict(d, record["differences"][d.name])
        for d in COMPARISONS[record["stage"]].differences
        if d.at_least is not None and d.name in record["differences"]
    }


def in_words(record: Record) -> list[str]:
    """What a reader should take away."""
    found = verdicts(record)
    missing = [d for d in COMPARISONS[record["stage"]].differences if d.name not in record["differences"]]
    parts = len(found) + sum(d.at_least is not None for d in missing)
    failed = {name: [label for label, v in found.items() if v == name] for name in MARKS}
    if len(failed["holds"]) == parts:
        lines = ["The claim holds on this corpus, in all its parts."]
    else:
        lines = [f"{len(failed['holds'])} of {parts} parts of the claim hold."]
    for name, lead in (
        ("does not hold", "Does not hold"),
        ("not shown", "Not shown, the interval or a seed lies on the other side"),
    ):
        if failed[name]:
            lines.append(f"{lead}: {'; '.join(failed[name])}.")
    if missing:
        lines.append(f"Not run: {'; '.join(d.label for d in missing)}.")
    return lines


def claims_figure(records: Mapping[str, Record]) -> Figure:
    """A line for each difference of one stage: interval, seeds as dots, and what the claim needs.

    Args:
        records: Corpus -> record, of the same stage.
    """
    stage = next(iter(records.values()))["stage"]
    shown = [
        d
        for d in COMPARISONS[stage].differences
        if d.at_least is not None and any(d.name in r["differences"] for r in records.values())
    ]
    figure = Figure(figsize=(12, 1.2 + 0.62 * len(shown)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.7 / len(records)
    for row, difference in enumerate(shown):
        needed = float(difference.at_least or 0)
        axes.plot([needed, needed], [row - 0.42, row + 0.42], color=INK, linewidth=1.4, zorder=2)
        for place, (_, record) in enumerate(records.items()):
            if found := record["differences"].get(difference.name):
                y = row + (place - (len(records) - 1) / 2) * height
                colour = CORPUS_COLOURS[place % len(CORPUS_COLOURS)]
                _interval(axes, y, verdict(difference, found), found, colour)
    axes.axvline(0, color=GRID, zorder=0)
    axes.set_yticks(range(len(shown)), [d.label for d in shown], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(
        "difference of recall@1, 95 % interval; dots: seeds; upright line: what the claim needs at least"
    )
    _legend(axes, records)
    figure.tight_layout()
    return figure


def _interval(axes: Any, y: float, found: str, difference: Mapping[str, Any], colour: str) -> None:
    axes.plot([difference["lower"], difference["upper"]], [y, y], color=colour, linewidth=2.5, zorder=3)
    axes.plot(difference["seeds"], [y] * len(difference["seeds"]), ".", color=INK, markersize=4, zorder=5)
    axes.plot([difference["mean"]], [y], MARKS[found], color=colour, markersize=9, zorder=4)


def _legend(axes: Any, records: Mapping[str, Record]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=2.5, label=corpus)
        for corpus, colour in zip(records, CORPUS_COLOURS, strict=False)
    ]
    handles += [
        Line2D([], [], color="#6b7785", marker=mark, linestyle="", label=name) for name, mark in MARKS.items()
    ]
    axes.legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
    )
