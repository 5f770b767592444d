"""`rime plan`: what a run will need, before it starts and without weights; what to change if it does not fit.

rime plan --config configs/cma.yaml --config configs/data/openmoji/cma.yaml --memory 24 --data.batch_size 64
"""

from __future__ import annotations

from collections.abc import Mapping
from json import dumps
from typing import Any

from rich.console import Console

from rime_pl.commands.settings import StageWords
from rime_pl.commands.settings import parse_with_settings as parse  # noqa: F401 - parses this command
from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.options.words import options_given
from rime_pl.preflight.plan.planning import GIB, UTILISATION, fits, make_plan
from rime_pl.report.table import Table


def run(
    settings: StageWords,
    *,
    memory: float | None = None,
    steps: int | None = None,
    image_tokens: int = 256,
    rewrite_tokens: int | None = None,
    json: bool = False,
) -> int:
    """Predict memory, time and disk of a run; no weights are read and nothing is trained.

    Args:
        settings: Settings of the run, read from --config.
        memory: Memory of a GPU in GiB. The plan then says whether the run fits, and what to change if not.
        steps: Batches of the run, for its hours (default: from settings and corpus).
        image_tokens: Visual tokens of an item, where the corpus is not built yet.
        rewrite_tokens: Tokens of a rewrite, where the corpus is not built yet (default: the budget).
        json: Whether to print JSON instead of tables.
    """
    given = settings.read()
    if any(option.name == "data.path" for option in options_given(settings.words)):
        for path in Corpora.of(given.values.data.path).weights:
            read_corpus(path)  # a recipe's own need not be built yet, but this one was typed
    plan = make_plan(given, memory, steps, (image_tokens, rewrite_tokens))
    if json:
        print(dumps(plan, indent=1))
    else:
        tables = [facts(plan), memory_by_part(plan), hours(plan)]
        tables += [] if memory is None else [changes(plan)]
        Console().print(*(table.terminal() for table in tables))
    return 0


def facts(plan: Mapping[str, Any]) -> Table:
    """Return what the plan stands on."""
    disk = plan["disk_bytes"]
    negatives = "-" if plan["negatives_per_query"] is None else plan["negatives_per_query"]
    rows = [
        ("parameters, trained", f"{plan['parameters']:,}, {plan['trained_parameters']:,}"),
        ("processes", f"{plan['processes']} ({plan['strategy']})"),
        ("negatives per query", f"{negatives} (batch of {plan['batch_size']} pairs)"),
        ("tokens of a batch", f"{plan['tokens_per_batch']:,} on average, longest row {plan['longest_row']}"),
        ("lengths", plan["lengths"]),
        ("batches", f"{plan['steps']:,}" if plan["steps"] else "not known: give --steps or a corpus"),
        ("disk", f"adapter {_size(disk['adapter'])}, checkpoint to resume from {_size(disk['checkpoint'])}"),
    ]
    return Table(f"Plan of {plan['stage']} on {plan['checkpoint']}", ["", ""], rows)


def memory_by_part(plan: Mapping[str, Any]) -> Table:
    """Return the bytes at the peak, by part; a column for each stage."""
    stages = plan["stages"]
    parts = dict.fromkeys(part for stage in stages for part in stage["parts"])
    sizes = {part: [stage["parts"].get(part, 0) for stage in stages] for part in parts}
    rows = [[part, *map(_size, row)] for part, row in sizes.items() if any(row)]
    rows.append(["peak", *(_size(stage["peak_bytes"]) for stage in stages)])
    title = "Memory of one process at the peak of a step on the longest pairs (predicted)"
    return Table(title, ["part", *(stage["stage"] for stage in stages)], rows)


def hours(plan: Mapping[str, Any]) -> Table:
    """Return where the run fits and how long it takes there."""
    rows = [
        [row["gpu"], "yes" if row["fits"] else "no", f"{row['seconds_per_step']:.2f}", row["class"]]
        for row in plan["hours"]
    ]
    rate = f"{UTILISATION:.0%} of the data sheet's rate"
    title = f"Time, predicted from {plan['flops_per_step']:.2g} FLOP of a mean batch at {rate}"
    note = "Not in it: start, reading and decoding of data, evaluation, checkpoints, LoRA's float32 copies."
    if plan["stage"] == "refine_rl":
        note += " Sampling takes longer than its FLOPs say: memory bandwidth and kernel launches limit it."
    head = ["GPU", "fits", "seconds per step", "run"]
    return Table(title, head, rows, note=note)


def changes(plan: Mapping[str, Any]) -> Table:
    """Return whether the run fits in the memory given, or each change that brings its peak down."""
    limit, peaks = plan["memory_gib"], {one["stage"]: one["peak_bytes"] for one in plan["stages"]}
    if fits(peak := peaks[plan["stage"]], limit):
        title = f"{plan['stage']} fits in {limit:g} GiB: {_size(peak)} at the peak."
        return Table(title, ["stage", "peak"], [[plan["stage"], _size(peak)]])
    rows = [
        [change["setting"], _size(change["peak_bytes"]), "yes" if fits(change["peak_bytes"], limit) else "no"]
        for change in plan["changes"]
    ]
    title = f"{plan['stage']} does not fit in {limit:g} GiB. Each change by itself:"
    return Table(title, ["change", "peak", "fits"], rows)


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
