"""Collects the scores of an evaluation, writes all its files, and makes its tables.

Called by `rime eval`. Our own file, result.json, says under which protocol each number was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rime_pl.datamodules.benchmarks.task import BenchmarkTask, MissingTask
from rime_pl.evaluation.averages import (
    UVRB_ABILITIES,
    Place,
    mmeb_v2_averages,
    mrmr_averages,
    uvrb_averages,
)
from rime_pl.evaluation.official import Metadata, plain_report, report, task_scores, write_task, write_whole
from rime_pl.evaluation.published import PUBLISHED
from rime_pl.evaluation.scoring import Scored
from rime_pl.evaluation.store import Cost
from rime_pl.metrics.ranking import TIE_RULE, Ranking
from rime_pl.report.table import Table
from rime_pl.types import Mode, Side

#: Columns of the table beside published rows.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "mmeb-v2": ("overall", "image", "video", "visdoc"),
    "mrmr": ("mean_over_11_columns", "mean_over_5_datasets"),
    "uvrb": UVRB_ABILITIES,
}
_MODES: dict[str, Mode] = {"disc": "discriminative", "gen": "generative"}


@dataclass
class Evaluated:
    """What is known of a task once it is ranked."""

    task: BenchmarkTask
    scored: dict[str, Scored]  # pair of modes -> scores
    cost: dict[Side, Cost]


@dataclass
class Results:
    """The results of an evaluation; every task that is added is written at once.

    Args:
        benchmark: "mmeb-v2", "mrmr" or "uvrb".
        output: Folder of all files.
        pairs: Pairs of modes.
        metadata: Head of the reports.
        protocol: What decides the numbers beside the model, such as frames and padding.
        table: All tasks of MMEB-V2 in the order of the report; () for the others.
        limit: Number of queries that each task was cut to; None: all.
    """

    benchmark: str
    output: Path
    pairs: Sequence[str]
    metadata: Metadata
    protocol: Mapping[str, Any]
    table: Sequence[Place] = ()
    limit: int | None = None
    done: dict[str, Evaluated] = field(default_factory=dict)
    missing: dict[str, MissingTask] = field(default_factory=dict)

    def add(self, evaluated: Evaluated, rankings: Mapping[str, Ranking]) -> None:
        """Add a task and write its files and all summaries."""
        task = evaluated.task
        self.done[task.name] = evaluated
        for pair, found in rankings.items():
            write_task(self.output / pair / task.modality, task, evaluated.scored[pair], found)
        self.write()

    def averages(self, pair: str) -> dict[str, Any]:
        """Return the averages of a pair of modes. Tasks that were cut count as missing."""
        values = {} if self.limit else {name: one.scored[pair].main for name, one in self.done.items()}
        if self.benchmark == "mmeb-v2":
            return mmeb_v2_averages(values, self.table)
        if self.benchmark == "uvrb":
            return uvrb_averages(values)
        parts = {} if self.limit else {name: one.scored[pair].categories for name, one in self.done.items()}
        return mrmr_averages(values, parts)

    def write(self) -> None:
        """Write result.json, the table and the report of each pair of modes."""
        write_whole(self.output / "result.json", json.dumps(self.result(), indent=2))
        tables = [table.markdown() for table in self.tables()]
        write_whole(self.output / "table.md", "\n\n".join(tables) + "\n")
        if self.limit:  # a report of cut tasks could be taken for a whole one
            return
        for pair in self.pairs:
            scores = {name: task_scores(one.task, one.scored[pair]) for name, one in self.done.items()}
            if self.benchmark == "mmeb-v2":
                told = report(self.metadata, self.table, scores, self.missing)
            else:
                averages = self.averages(pair)
                told = plain_report(self.metadata, self.benchmark, scores, self.missing, averages)
            file = self.output / pair / f"{self.metadata.model_name}.json"
            write_whole(file, json.dumps(told, indent=4))

    def result(self) -> dict[str, Any]:
        """Return what result.json holds."""
        return {
            "benchmark": self.benchmark,
            "model": asdict(self.metadata),
            "protocol": dict(self.protocol),
            "tie_rule": TIE_RULE,
            "modes": list(self.pairs),
            "limit": self.limit,
            "averages": {pair: self.averages(pair) for pair in self.pairs},
            "tasks": {name: self._of_task(one) for name, one in self.done.items()},
            "missing": {name: {"code": m.code, "reason": m.reason} for name, m in self.missing.items()},
        }

    def _of_task(self, one: Evaluated) -> dict[str, Any]:
        task = one.task
        return {
            "modality": task.modality,
            "group": task.group,
            "metric": task.metric,
            "queries": len(task.queries),
            "candidates": len(task.candidates),
            "version": task.version,
            "notes": list(task.notes),
            "cost": {side: asdict(cost) for side, cost in one.cost.items()},
            "results": {pair: self._of_pair(scored) for pair, scored in one.scored.items()},
        }

    def _of_pair(self, scored: Scored) -> dict[str, Any]:
        told: dict[str, Any] = {
            "main": scored.main,
            "scores": scored.scores,
            "ties": scored.ties,
            "queries_with_ties": scored.tied_queries,
        }
        if scored.categories:
            told["categories"] = scored.categories
        if scored.compatible or scored.compatible_note:
            told["ndcg_by_the_label_order_of_the_official_code"] = scored.compatible or scored.compatible_note
            told["submitted"] = "the correct values, in 'scores'"
        return told

    def tables(self) -> list[Table]:
        """Return the averages beside published rows, and the main score of each task."""
        return [self._beside(), self._tasks()]

    def _beside(self) -> Table:
        """Return the averages of each pair of modes and what it costs, beside published numbers."""
        published = PUBLISHED[self.benchmark]
        averages = {pair: self.averages(pair) for pair in self.pairs}
        flat = {
            pair: {**found, **found.get("modalities", {}), **found.get("meta_tasks", {})}
            for pair, found in averages.items()
        }
        groups = dict.fromkeys(place.group for place in self.table)
        rows = [["tasks", *(found["tasks"] for found in averages.values()), *["-"] * len(published)]]
        for name in (*_COLUMNS[self.benchmark], *groups):
            ours = [_shown(flat[pair].get(name)) for pair in self.pairs]
            rows.append([name, *ours, *(_shown(row.values.get(name)) for row in published)])
        costs = [self._cost(pair) for pair in self.pairs]
        for number, name in enumerate(("rewrite tokens", "ms a query", "ms a candidate")):
            rows.append([name, *(cost[number] for cost in costs), *["-"] * len(published)])
        note = (
            "ms: time of the model for an item, measured in its batches here, without opening media. With "
            "both modes in one pass, the discriminative time ends with the prompt. Rewrite tokens: the mean "
            "of the sides that write. A mean with a missing task is not shown."
        )
        for row in published:
            note += f"\n{row.model}: {row.source}{row.note and f'; {row.note}'}."
        if self.limit:
            note += f"\nEach task was cut to {self.limit} queries, so there are no averages."
        head = ["average", *self.pairs, *(row.model for row in published)]
        return Table(f"{self.benchmark}: averages of {self.metadata.model_name}", head, rows, note=note)

    def _cost(self, pair: str) -> tuple[str, str, str]:
        """Return mean rewrite tokens of the sides that write, ms a query and ms a candidate."""
        times: list[str] = []
        tokens: list[float] = []
        sides: tuple[Side, Side] = ("query", "target")
        for side, half in zip(sides, pair.split("-"), strict=True):
            mode = _MODES[half]
            costs = [one.cost[side] for one in self.done.values()]
            times.append(f"{fmean(cost.ms_per_item[mode] for cost in costs):.1f}" if costs else "-")
            if mode == "generative":
                tokens += [cost.rewrite_tokens for cost in costs if cost.rewrite_tokens is not None]
        return (f"{fmean(tokens):.1f}" if tokens else "-", *times)  # type: ignore[return-value]

    def _tasks(self) -> Table:
        rows = [
            [
                *(name, one.task.metric, *(f"{one.scored[pair].main:.4f}" for pair in self.pairs)),
                str(max(one.scored[pair].tied_queries for pair in self.pairs)),
            ]
            for name, one in self.done.items()
        ]
        rows += [[name, task.code, *["-"] * len(self.pairs), "-"] for name, task in self.missing.items()]
        head = ["task", "metric", *self.pairs, "queries with ties"]
        notes = [f"{name}: {note}." for name, one in self.done.items() for note in one.task.notes]
        return Table(f"{self.benchmark}: tasks", head, rows, note="\n".join(notes))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
