"""The tables that a run prints at its end, from what it writes to ``summary.json``; see ``report.stage``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rime_pl.report.summary import Summary, not_measured
from rime_pl.report.table import Table
from rime_pl.types import MODE_PAIRS

#: Key of ``trace`` in summary.json -> the name that is printed.
REWRITES = {
    "own": "own rewrite",
    "reference": "reference rewrite",
    "shuffled": "another query's rewrite",
    "empty": "empty rewrite",
    "own-minus-empty": "own - empty",
    "own-minus-shuffled": "own - another query's",
    "room": "headroom (reference - own)",
}
_COST = (
    ("mean rewrite length (tokens)", "rewrite", "mean_length", ".1f"),
    ("share of well-formed rewrites", "rewrite", "well_formed"),
    ("slot F1: content words shared with the reference", "rewrite", "slot_f1"),
    ("slot recall: share of the reference's content words", "rewrite", "slot_recall"),
    ("ms per embedding, discriminative", "milliseconds", "discriminative", ".1f"),
    ("ms per embedding, generative (writing included)", "milliseconds", "generative", ".1f"),
)


def summary_tables(summary: Summary) -> list[Table]:
    """Return all tables of a summary, in the order of reading."""
    if not summary["after"]:
        return []  # not tested
    tables = [_recalls(summary), *gallery_tables(summary), *rewrite_tables(summary)]
    return [*tables, cost_table(summary), _tasks(summary)]


def gallery_tables(summary: Summary) -> list[Table]:
    """Return the recalls among all distractors, and those of each memory task, where they were measured."""
    tables = []
    if everything := summary["all_gallery"]:
        note = f"smallest gallery {everything['gallery']}, chance {everything['chance']:.5f}"
        tables.append(_modes("The same queries among all distractors", everything, note))
    for name in summary.get("memory", ()):
        task = summary["per_task"][name]
        note = "Training showed these targets, and asked for them in other words. Not in the mean above.\n"
        note += f"{task['queries']} queries; gallery: {task['gallery']} distinct contents"
        tables.append(_modes(f"Memory of things seen: {name}", task, note))
    return tables


def rewrite_tables(summary: Summary) -> list[Table]:
    """Return the rewrite ablation, and who writes by who embeds, where they were measured."""
    after, tables = summary["after"], []
    if "trace" in after:
        title = "Rewrite ablation: recall@1 of gen-gen with this rewrite on the query side"
        rewrites = [(label, "trace", key) for key, label in REWRITES.items()]
        tables.append(_before_after(summary, title, rewrites, not_measured(summary)))
    if "crossed" in after:
        tables.append(crossed_table({key: f"{value:.3f}" for key, value in after["crossed"].items()}))
    return tables


def cost_table(summary: Summary) -> Table:
    """Return length, form and time of the rewrites."""
    return _before_after(summary, "Rewrites and their cost", _COST)


def crossed_table(cells: Mapping[str, str]) -> Table:
    """recall@1 of gen-gen by "rewriter-embedder": a better rewrite, or a moved embedding?"""
    rows = [[f"{who} rewrites", cells[f"{who}-old"], cells[f"{who}-new"]] for who in ("old", "new")]
    title = "recall@1 of gen-gen by who writes and who embeds (old: before this stage)"
    return Table(title, ["", "old embedder", "new embedder"], rows)


def _recalls(summary: Summary) -> Table:
    """Return recall@k of the four modes, the interval of recall@1, and the oracle."""
    before, after = summary["before"], summary["after"]
    ks = sorted((name for name in after if name.startswith("recall@")), key=lambda name: int(name[7:]))
    rows, runs = [], [run for run in (before, after) if run]
    for pair in (*_pairs(after), *(("oracle",) if "oracle" in after else ())):
        found = [("oracle", k) if pair == "oracle" else (k, pair) for k in ks]
        first, *others = (" -> ".join(_number(run, *where) for run in runs) for where in found)
        rows.append([pair, first, " - ".join(f"{bound:.2f}" for bound in after["ci"].get(pair, ())), *others])
    title = f"Retrieval on the test split ({'before -> after, ' if before else ''}mean over tasks)"
    note = f"{summary['queries']} queries; gallery: {summary['gallery']} distinct contents (smallest task)\n"
    note += f"chance of recall@1: {summary['chance']:.4f}; "
    note += (
        "oracle: the better of disc-disc and gen-gen per query"
        if "oracle" in after
        else "the generative mode was not tested (data.test_modes)"
    )
    return Table(title, ["query mode -\ntarget mode", ks[0], "95 %\ninterval", *ks[1:]], rows, note=note)


def _modes(title: str, results: Mapping[str, Any], note: str) -> Table:
    """Return recall@k of the four modes."""
    names = [name for name in results if name.startswith("recall@")]
    rows = [[pair, *(f"{results[name][pair]:.3f}" for name in names)] for pair in _pairs(results)]
    return Table(title, ["mode", *names], rows, note=note)


def _tasks(summary: Summary) -> Table:
    worth = ("own-minus-empty", "own-minus-shuffled") if "trace" in summary["after"] else ()
    where = [*(("recall@1", pair) for pair in _pairs(summary["after"])), *(("trace", key) for key in worth)]
    tasks = summary["per_task"].items()
    rows = [
        [name, _modality(task), str(task["gallery"]), *(_number(task, *place) for place in where)]
        for name, task in tasks
    ]
    names = [REWRITES.get(key, key).replace("- ", "-").replace("-", "-\n") for _, key in where]
    title = f"recall@1 of each task{', after' if summary['before'] else ''} (chance = 1 / gallery)"
    return Table(title, ["task", "query -\ntarget", "gallery", *names], rows)


def _modality(task: Mapping[str, Any]) -> str:
    """Return what is asked and what is found; an earlier run did not keep it."""
    sides = task.get("modality", {})
    return " -\n".join(sides[side] for side in ("query", "target")) if sides else "-"


def _before_after(summary: Summary, title: str, rows: Sequence[tuple[str, ...]], note: str = "") -> Table:
    runs = ["before", "after"] if summary["before"] else ["after"]
    cells = [[label, *(_number(summary[run], *where) for run in runs)] for label, *where in rows]
    return Table(title, ["", *runs], cells, note=note)


def _pairs(results: Mapping[str, Any]) -> list[str]:
    """Return the mode pairs that were measured."""
    return [pair for pair in MODE_PAIRS if pair in results["recall@1"]]


def _number(results: Summary, group: str, key: str, form: str = ".3f") -> str:
    value = results.get(group, {}).get(key)
    return "-" if value is None else format(value, form)  # an earlier run may not have measured it
