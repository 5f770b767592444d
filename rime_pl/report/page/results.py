"""What a run reaches on the test split: four modes, tasks and modalities, cost, rewrite ablation.

Called by page.py. Each function returns the content of one section for all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any
from xml.etree.ElementTree import Element

from rime_pl.report.elements import el
from rime_pl.report.page import charts
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.parts import figure, of_each
from rime_pl.report.table import Table
from rime_pl.report.tables import cost_table, gallery_tables, rewrite_tables
from rime_pl.run_folder import headline_tasks
from rime_pl.types import MODE_PAIRS

NOT_TESTED = "This run has no results of the test split yet."
ONE_MODE = "The generative mode was not tested (data.test_modes), so there is nothing to show here."


def four_modes(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall@k of the four mode pairs, before and after this stage, with intervals."""
    return of_each(runs, _modes_of)


def _modes_of(run: RunFacts) -> list[Element]:
    if not run.tested:
        return [el("p", NOT_TESTED)]
    summary, after = run.summary, run.summary["after"]
    counted = ", ".join(name for name in summary["per_task"] if in_the_mean(run, name))
    text = f"{summary['queries']} queries; the smallest gallery has {summary['gallery']} distinct contents. "
    text += f"Chance of recall@1 is {summary['chance']:.4f}. All are means over the tasks {counted}."
    start = "" if run.before else " There is no run before it that was tested on the same data."
    ks = sorted((name for name in after if name.startswith("recall@")), key=lambda name: int(name[7:]))
    tables = [recall_table(run, k).html() for k in ks]
    further = [table.html() for table in gallery_tables(summary)]
    both = el("div", figure(charts.modes(run)), *tables, *further, class_="grid")
    return [el("p", sentence(run)), el("p", text + start), both]


def sentence(run: RunFacts) -> str:
    """Return the results of a run in a sentence."""
    after = run.summary["after"]["recall@1"]
    best = max(after, key=lambda pair: after[pair])
    found = f"{best} finds the most: its recall@1 is {after[best]:.3f}."
    before = (run.before or {}).get("recall@1", {})
    if "gen-gen" not in after or "gen-gen" not in before:
        return found
    change = 100 * (after["gen-gen"] - before["gen-gen"])
    way = "rose" if change > 0 else "fell"
    told = f" gen-gen {way} by {abs(change):.1f} points in this stage." if round(change, 1) else ""
    return found + (told or " gen-gen did not change in this stage.")


def recall_table(run: RunFacts, k: str) -> Table:
    """Return recall@k of each mode pair: before and after, with intervals; with the oracle below."""
    after, before = run.summary["after"], run.before
    sides = {"before": before, "after": after} if before else {"after": after}
    head = ["query - target"]
    for side in sides:
        head += [side if before else k, "95 % interval"]
    rows = []
    for pair in MODE_PAIRS:
        if pair in after[k]:
            cells = []
            for side, results in sides.items():
                cells += [_number(results, k, pair), _interval(run, side, results, k, pair)]
            rows.append([pair, *cells])
    if "oracle" in after:
        cells = [cell for results in sides.values() for cell in (_number(results, "oracle", k), "-")]
        rows.append(["oracle", *cells])
    note = "oracle: the better of disc-disc and gen-gen for each query" if "oracle" in after else ""
    return Table(k, head, rows, note=note if k == "recall@1" else "")


def _interval(run: RunFacts, side: str, results: Mapping[str, Any], k: str, pair: str) -> str:
    """Return an interval in words; the summary keeps that of recall@1."""
    kept = results.get("ci", {}) if k == "recall@1" else run.intervals.get(side, {}).get(k, {})
    bounds: Any = kept.get(pair)
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "-"


def _number(results: Mapping[str, Any], group: str, key: str, form: str = ".3f") -> str:
    value = results.get(group, {}).get(key)
    return "-" if value is None else format(value, form)


def in_the_mean(run: RunFacts, task: str) -> bool:
    """Return whether a task counts in the results of a run: no memory task, no control."""
    tasks = set(run.summary["per_task"])
    return task in headline_tasks(run.settings, tasks - set(run.summary.get("memory", ())) or tasks)


def modalities(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall@1 by what queries and targets consist of, and of each task."""
    return of_each(runs, _modalities_of)


def _modalities_of(run: RunFacts) -> list[Element]:
    if not run.tested:
        return [el("p", NOT_TESTED)]
    tasks, memory = run.summary["per_task"], set(run.summary.get("memory", ()))
    pairs = [pair for pair in MODE_PAIRS if pair in run.summary["after"]["recall@1"]]
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, task in tasks.items():
        if in_the_mean(run, name) and (sides := task.get("modality")):
            kinds.setdefault((sides["query"], sides["target"]), []).append(task)
    rows = [
        [*kind, str(len(found)), *(f"{mean(one['recall@1'][pair] for one in found):.3f}" for pair in pairs)]
        for kind, found in sorted(kinds.items())
    ]
    title = "recall@1 by what is asked with and what is found, mean over tasks"
    head = ["query", "target", "tasks", *pairs]
    left_out = [name for name in tasks if not in_the_mean(run, name)]
    note = f"Not in these means: {', '.join(left_out)}." if left_out else ""
    by_kind = Table(title, head, rows, note=note).html()
    if not kinds:
        by_kind = el("p", "The run does not keep what the queries and targets of its tasks consist of.")
    of_task = []
    for name, task in tasks.items():
        sides = task.get("modality") or {"query": "-", "target": "-"}
        found = [_number(task, "recall@1", pair) for pair in pairs]
        label = name
        if name in left_out:
            label += " (memory)" if name in memory else " (not in the means)"
        of_task.append([label, sides["query"], sides["target"], str(task["gallery"]), *found])
    head = ["task", "query", "target", "gallery", *pairs]
    note = "Chance of recall@1 is 1 / gallery."
    return [by_kind, Table("recall@1 of each task", head, of_task, note=note).html()]


def cost(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall@1 against the tokens and the milliseconds of a query."""
    found = [one for run in runs if run.tested for one in costs_of(run)]
    if not found:
        return [el("p", "No run has results of the test split yet.")]
    both = [charts.costs(found, "tokens", "tokens written for a query, mean")]
    if any(one.milliseconds is not None for one in found):
        both.append(charts.costs(found, "milliseconds", "ms to embed a query, mean"))
    rows = [
        [
            *(one.run.letter, one.pair, f"{one.tokens:.1f}"),
            *("-" if one.milliseconds is None else f"{one.milliseconds:.1f}", f"{one.recall:.3f}"),
        ]
        for one in found
    ]
    note = "The gallery is embedded once, so a search pays for its query alone. Tokens and milliseconds are "
    note += (
        "means over queries and targets, measured in evaluation batches; compare times of one machine only."
    )
    head = ["run", "query - target", "tokens", "ms", "recall@1"]
    table = Table("What a query costs, and what it finds", head, rows, note=note).html()
    pictures = el("div", *map(figure, both), class_="grid")
    tested = [run for run in runs if run.tested]
    detail = [el("div", el("h3", run.heading), cost_table(run.summary).html()) for run in tested]
    untested = [el("p", f"{run.heading}: {NOT_TESTED}") for run in runs if not run.tested]
    return [pictures, table, el("div", *detail, class_="grid"), *untested]


def costs_of(run: RunFacts) -> list[charts.Cost]:
    """Return the cost and the recall@1 of each mode pair that was tested."""
    after = run.summary["after"]
    length, times = after.get("rewrite", {}).get("mean_length", 0.0), after.get("milliseconds", {})
    found = []
    for pair in MODE_PAIRS:
        if pair in after["recall@1"]:
            writes = pair.startswith("gen")
            ms = times.get("generative" if writes else "discriminative")
            found.append(charts.Cost(run, pair, length if writes else 0.0, ms, after["recall@1"][pair]))
    return found


def ablation(runs: Sequence[RunFacts]) -> list[Element]:
    """Return recall@1 of gen-gen with the own rewrite, the reference, another query's and none."""
    return of_each(runs, _ablation_of)


def _ablation_of(run: RunFacts) -> list[Element]:
    if not run.tested:
        return [el("p", NOT_TESTED)]
    tables = [table.html() for table in rewrite_tables(run.summary)]
    if "trace" not in run.summary["after"]:
        generative = "gen-gen" in run.summary["after"]["recall@1"]
        off = "The rewrite ablation was switched off (recall.rewrite_ablation)."
        return [el("p", off if generative else ONE_MODE), *tables]
    trace = run.summary["after"]["trace"]
    worth = trace.get("own-minus-empty")
    said = (
        "" if worth is None else f"Without its rewrite, gen-gen loses {100 * worth:.1f} points of recall@1."
    )
    both = el("div", figure(charts.ablation(run)), el("div", *tables), class_="grid")
    return [*([el("p", said)] if said else []), both]
