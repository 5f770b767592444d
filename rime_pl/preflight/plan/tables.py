"""The tables of `rime plan`: facts, memory by part for each stage, time on each GPU, what to change.

Takes the dictionary of `rime plan --json` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rime_pl.preflight.plan.arithmetic import GIB, UTILISATION
from rime_pl.report.table import Table

MIB = 2**20


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """Return all tables, in the order of reading."""
    tables = [facts(plan), memory(plan), hours(plan)]
    return tables if plan["memory_gib"] is None else [*tables, changes(plan)]


def facts(plan: Mapping[str, Any]) -> Table:
    """Return what the plan stands on."""
    disk, own = plan["disk_bytes"], _own(plan)
    negatives = "-" if plan["negatives_per_query"] is None else plan["negatives_per_query"]
    rows = [
        ("parameters, trained", f"{plan['parameters']:,}, {plan['trained_parameters']:,}"),
        ("processes", f"{plan['processes']} ({plan['strategy']})"),
        ("negatives per query", f"{negatives} (batch of {plan['batch_size']} pairs)"),
        ("tokens of a batch", f"{plan['tokens_per_batch']:,}, longest row {plan['longest_row']}"),
        ("lengths", plan["lengths"]),
        ("steps", f"{plan['steps']:,}" if plan["steps"] else "not known: give --steps or a corpus"),
        ("disk", f"adapter {_size(disk['adapter'])}, checkpoint to resume from {_size(disk['checkpoint'])}"),
        ("largest tensor of a step", f"{_size(own['largest'])}: {own['largest_operation']}"),
    ]
    return Table(f"Plan of {plan['stage']} on {plan['checkpoint']}", ["", ""], rows)


def memory(plan: Mapping[str, Any]) -> Table:
    """Return the bytes at the peak, by part; a column for each stage."""
    stages = plan["stages"]
    parts = dict.fromkeys(part for stage in stages for part in stage["parts"])
    sizes = {part: [stage["parts"].get(part, 0) for stage in stages] for part in parts}
    rows = [[part, *map(_size, row)] for part, row in sizes.items() if any(row)]
    rows.append(["peak", *(_size(stage["peak"]) for stage in stages)])
    title = "Memory of one process at the peak of a step (predicted)"
    return Table(title, ["part", *(stage["stage"] for stage in stages)], rows)


def hours(plan: Mapping[str, Any]) -> Table:
    """Return where the run fits and how long it takes there."""
    rows = [
        [row["gpu"], "yes" if row["fits"] else "no", f"{row['seconds_per_step']:.2f}", row["class"]]
        for row in plan["hours"]
    ]
    rate = f"{UTILISATION:.0%} of the data sheet's rate"
    title = f"Time, predicted from {plan['flops_per_step']:.2g} FLOP per step at {rate}"
    note = (
        "Sampling is limited by memory bandwidth and kernel launches, so it takes longer than its FLOPs say."
    )
    head = ["GPU", "fits", "seconds per step", "run"]
    return Table(title, head, rows, note=note if plan["stage"] == "refine_rl" else "")


def changes(plan: Mapping[str, Any]) -> Table:
    """Return whether the run fits in the memory given, or each change that brings its peak down."""
    limit, own = plan["memory_gib"], _own(plan)
    if own["peak"] <= limit * GIB:
        title = f"{plan['stage']} fits in {limit:g} GiB: {_size(own['peak'])} at the peak."
        return Table(title, ["stage", "peak"], [[plan["stage"], _size(own["peak"])]])
    rows = [
        [change["setting"], _size(change["peak"]), "yes" if change["peak"] <= limit * GIB else "no"]
        for change in plan["changes"]
    ]
    title = f"{plan['stage']} does not fit in {limit:g} GiB. Each change by itself:"
    return Table(title, ["change", "peak", "fits"], rows)


def _own(plan: Mapping[str, Any]) -> Any:
    return next(stage for stage in plan["stages"] if stage["stage"] == plan["stage"])


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
