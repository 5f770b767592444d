"""The table a person reads in the terminal at the end of a run; every number under its exact name.

Called by ``report.stage``; takes the dictionary of ``summary.json`` and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

_SOFT = "dim"
_DIFFERENCES = ("own-minus-empty", "own-minus-shuffled", "room")
_MEANING = {
    "own": "the rewrite that the model wrote",
    "reference": "the annotated rewrite",
    "shuffled": "another query's rewrite",
    "empty": "no rewrite",
    "own-minus-empty": "what a rewrite is worth",
    "own-minus-shuffled": "what the right rewrite is worth",
    "room": "reference - own: left to win",
}


def summary_tables(summary: Mapping[str, Any]) -> RenderableType:
    """All tables of a summary, one below the other."""
    parts: list[RenderableType] = [recall_table(summary), _gallery_line(summary)]
    if summary["all_gallery"]:
        parts.append(_all_gallery_table(summary["all_gallery"]))
    if "trace" in summary["after"]:
        parts.append(trace_table(summary))
    if "crossed" in summary["after"]:
        parts.append(crossed_table(summary))
    parts += [cost_table(summary), task_table(summary)]
    return Group(*parts)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print all tables."""
    (console or Console()).print(summary_tables(summary))


def summary_text(summary: Mapping[str, Any], width: int = 110) -> str:
    """All tables as plain text, for ``summary.txt``."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(summary_tables(summary))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"  # type: ignore[attr-defined]


def recall_table(summary: Mapping[str, Any]) -> Table:
    """recall@k of the four modes (before -> after), the oracle, and the interval of recall@1."""
    before, after = summary["before"], summary["after"]
    ks = sorted((name for name in after if name.startswith("recall@")), key=lambda name: int(name[7:]))
    change = "before -> after, " if before else ""
    table = _table(f"Retrieval on the test split ({change}mean over tasks)", "query mode -\ntarget mode")
    for name in ks:
        table.add_column(name, justify="right", no_wrap=True)
        if name == "recall@1":
            table.add_column("95 %\ninterval", justify="center", style=_SOFT, no_wrap=True)
    for pair in MODE_PAIRS:
        cells: list[str | Text] = []
        for name in ks:
            cells.append(_change(before, after, name, pair))
            if name == "recall@1":
                low, high = after["ci"][pair]
                cells.append(f"{low:.2f} - {high:.2f}")
        table.add_row(pair, *cells)
    table.add_section()
    cells = []
    for name in ks:
        cells += [_change(before, after, "oracle", name)] + ([""] if name == "recall@1" else [])
    table.add_row("oracle", *cells)
    return table


def _gallery_line(summary: Mapping[str, Any]) -> Text:
    return Text(
        f"gallery: {summary['gallery']} distinct contents (the smallest of the tasks), "
        f"{summary['queries']} queries\n"
        f"chance of recall@1: {summary['chance']:.4f}   "
        f"oracle: per query the better of disc-disc and gen-gen\n",
        style=_SOFT,
    )


def _all_gallery_table(results: Mapping[str, Any]) -> Table:
    """The same queries against all pictures there are."""
    sizes = f"smallest gallery {results['gallery']}, chance {results['chance']:.5f}"
    title = f"The same queries among all distractors ({sizes})"
    table = _table(title, "query mode - target mode")
    names = [name for name in results if name.startswith("recall@")]
    for name in names:
        table.add_column(name, justify="right")
    for pair in MODE_PAIRS:
        table.add_row(pair, *(f"{results[name][pair]:.3f}" for name in names))
    return table


def trace_table(summary: Mapping[str, Any]) -> Table:
    """recall@1 of gen-gen with the query's rewrite exchanged, the target keeping its own."""
    before, after = summary["before"], summary["after"]
    table = _table("Trace probe: recall@1 of gen-gen with this rewrite on the query side", "rewrite")
    if before:
        table.add_column("before", justify="right", style=_SOFT)
    table.add_column("after", justify="right")
    table.add_column("", style=_SOFT)
    for name in (*REWRITE_ABLATION, *_DIFFERENCES):
        if name == _DIFFERENCES[0]:
            table.add_section()
        cells = [_number(before, "trace", name)] if before else []
        table.add_row(name, *cells, _bold(after["trace"][name]), _MEANING[name])
    return table


def crossed_table(summary: Mapping[str, Any]) -> Table:
    """Who wrote the rewrites by who embeds them: a better rewrite, or a moved embedding?"""
    crossed = summary["after"]["crossed"]
    table = _table("recall@1 of gen-gen, rewriter by embedder (old: before this stage)", "rewriter")
    for embedder in ("old", "new"):
        table.add_column(f"{embedder} embedder", justify="right")
    for rewriter in ("old", "new"):
        table.add_row(rewriter, *(f"{crossed[f'{rewriter}-{embedder}']:.3f}" for embedder in ("old", "new")))
    return table


def cost_table(summary: Mapping[str, Any]) -> Table:
    """What the rewrites look like, and what an embedding costs in each mode."""
    before, after = summary["before"], summary["after"]
    table = _table("Rewrites and their cost", "")
    if before:
        table.add_column("before", justify="right", style=_SOFT)
    table.add_column("after", justify="right")
    rows = [
        ("mean rewrite length (tokens)", "rewrite", "mean_length", "{:.1f}"),
        ("share of well-formed rewrites", "rewrite", "well_formed", "{:.3f}"),
        (
            "slot F1 of the query's rewrite (content words against the reference)",
            "rewrite",
            "slot_f1",
            "{:.3f}",
        ),
        ("share of the reference's content words that it names", "rewrite", "slot_recall", "{:.3f}"),
        ("ms per embedding, discriminative", "milliseconds", "discriminative", "{:.1f}"),
        ("ms per embedding, generative (writing included)", "milliseconds", "generative", "{:.1f}"),
    ]
    for label, group, name, form in rows:
        cells = [_number(before, group, name, form)] if before else []
        table.add_row(label, *cells, _number(after, group, name, form))
    return table


def task_table(summary: Mapping[str, Any]) -> Table:
    """recall@1 of each task, also of those outside the overall numbers."""
    after = ", after" if summary["before"] else ""
    table = _table(f"recall@1 of each task{after} (chance = 1 / gallery)", "task")
    for name in ("gallery", *MODE_PAIRS):
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    traced = "trace" in summary["after"]
    if traced:
        for name in _DIFFERENCES[:2]:
            table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for task, results in summary["per_task"].items():
        cells = [str(results["gallery"])]
        cells += [f"{results['recall@1'][pair]:.3f}" for pair in MODE_PAIRS]
        if traced:
            cells += [f"{results['trace'][name]:.3f}" for name in _DIFFERENCES[:2]]
        table.add_row(task, *cells)
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(first)
    return table


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any], group: str, name: str) -> Text:
    text = Text(f"{_number(before, group, name)} -> " if before else "", style=_SOFT)
    return text.append(f"{after[group][name]:.3f}", style="not dim bold")


def _bold(value: float) -> Text:
    return Text(f"{value:.3f}", style="bold")


def _number(results: Mapping[str, Any], group: str, name: str, form: str = "{:.3f}") -> str:
    """A number of an earlier run, which may have been measured with other settings."""
    value = results.get(group, {}).get(name)
    return "-" if value is None else form.format(value)
