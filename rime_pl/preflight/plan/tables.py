"""The tables of `rime plan`: memory by part for each stage, time on each GPU, what to change.

Takes the dictionary of `rime plan --json` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rime_pl.preflight.plan.arithmetic import GIB, UTILISATION

MIB = 2**20


def print_plan(plan: Mapping[str, Any], console: Console | None = None) -> None:
    """Print facts, memory, hours and changes."""
    (console or Console()).print(plan_tables(plan))


def plan_tables(plan: Mapping[str, Any]) -> RenderableType:
    """All tables, one below the other."""
    tables: list[RenderableType] = [fact_table(plan), memory_table(plan), hour_table(plan)]
    if plan["memory_gib"] is not None:
        tables.append(change_table(plan))
    return Group(*tables)


def fact_table(plan: Mapping[str, Any]) -> Table:
    """What the plan stands on."""
    table = _table(f"Plan of {plan['stage']} on {plan['checkpoint']}", ("", "left"), ("", "left"))
    disk = plan["disk_bytes"]
    own = next(stage for stage in plan["stages"] if stage["stage"] == plan["stage"])
    negatives = "-" if plan["negatives_per_query"] is None else plan["negatives_per_query"]
    rows = {
        "parameters, trained": f"{plan['parameters']:,}, {plan['trained_parameters']:,}",
        "processes": f"{plan['processes']} ({plan['strategy']})",
        "negatives per query": f"{negatives} (batch of {plan['batch_size']} pairs)",
        "tokens per step": f"{plan['tokens_per_step']:,}, longest row {plan['longest_row']}",
        "lengths": plan["lengths"],
        "steps": "not known: give --steps or a corpus" if plan["steps"] is None else f"{plan['steps']:,}",
        "disk": f"adapter {_size(disk['adapter'])}, checkpoint to resume from {_size(disk['checkpoint'])}",
        "largest tensor of a step": f"{_size(own['largest'])}: {own['largest_operation']}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def memory_table(plan: Mapping[str, Any]) -> Table:
    """Bytes at the peak, by part; a column for each stage."""
    stages = plan["stages"]
    table = _table(
        "Memory of one process at the peak of a step (predicted)",
        ("part", "left"),
        *((stage["stage"], "right") for stage in stages),
    )
    for part in dict.fromkeys(part for stage in stages for part in stage["parts"]):
        sizes = [stage["parts"].get(part, 0) for stage in stages]
        if any(sizes):
            table.add_row(part, *map(_size, sizes))
    table.add_section()
    table.add_row("peak", *(_size(stage["peak"]) for stage in stages), style="bold")
    return table


def hour_table(plan: Mapping[str, Any]) -> Table:
    """Where it fits and how long it takes there."""
    drawing = ", drawing not counted" if plan["stage"] == "refine_rl" else ""
    rate = f"{UTILISATION:.0%} of the data sheet{drawing}"
    title = f"Time (from {plan['flops_per_step']:.2g} FLOP a step at {rate})"
    table = _table(
        title, ("GPU", "left"), ("fits", "left"), ("s a step", "right"), ("run", "right"), ("", "left")
    )
    for row in plan["hours"]:
        fits = "yes" if row["fits"] else "no"
        table.add_row(row["gpu"], fits, f"{row['seconds_per_step']:.2f}", row["class"], row["source"])
    return table


def change_table(plan: Mapping[str, Any]) -> RenderableType:
    """Each setting by itself."""
    limit = plan["memory_gib"]
    own = next(stage for stage in plan["stages"] if stage["stage"] == plan["stage"])
    if own["peak"] <= limit * GIB:
        return Text(f"{plan['stage']} fits in {limit:g} GiB: {_size(own['peak'])} at the peak.", "bold")
    title = f"{plan['stage']} does not fit in {limit:g} GiB. Each change by itself:"
    table = _table(title, ("change", "left"), ("peak", "right"), ("fits", "left"))
    for change in plan["changes"]:
        table.add_row(
            change["setting"], _size(change["peak"]), "yes" if change["peak"] <= limit * GIB else "no"
        )
    return table


def _table(title: str, *columns: tuple[str, Any]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify=side)
    return table


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
