"""Collects the scores of an evaluation, writes all its files, and makes its tables.

Called by `rime eval`. Our own file, result.json, says under which protocol each number was measured. Tasks of
earlier calls stay in it, if they were measured in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rime_pl.datamodules.benchmarks.task import MissingTask
from rime_pl.evaluation.averages import (
    UVRB_ABILITIES,
    Place,
    mmeb_v2_averages,
    mrmr_averages,
    uvrb_averages,
)
from rime_pl.evaluation.official import (
    Metadata,
    plain_report,
    report,
    task_scores,
    write_task,
    write_whole,
)
from rime_pl.evaluation.published import PUBLISHED
from rime_pl.evaluation.records import Evaluated, Record, earlier, record_of
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
_SIDES: tuple[Side, Side] = ("query", "target")


@dataclass
class Results:
    """The results of an evaluation; every task that is added is written at once.

    Args:
        benchmark: "mmeb-v2", "mrmr" or "uvrb".
        output: Folder of all files; results of earlier calls that lie there stay.
        pairs: Pairs of modes.
        metadata: Head of the reports.
        protocol: What decides the numbers, such as model, modes, frames and padding, as plain data.
        call: What else is known of this call, such as the folder of the benchmark.
        names: All tasks of the benchmark.
        table: All tasks of MMEB-V2 in the order of the report; () for the others.
        limit: Number of queries that each task was cut to; None: all.

    Raises:
        RimeError: If the folder holds results that were measured in another way.
    """

    benchmark: str
    output: Path
    pairs: Sequence[str]
    metadata: Metadata
    protocol: Mapping[str, Any]
    call: Mapping[str, Any]
    names: Sequence[str]
    table: Sequence[Place] = ()
    limit: int | None = None
    done: dict[str, Record] = field(default_factory=dict)
    missing: dict[str, Record] = field(default_factory=dict)  # name -> code, and reason
    scored: list[str] = field(default_factory=list)  # tasks of this call

    def __post_init__(self) -> None:
        self.done, self.missing = earlier(self.output / "result.json", self.protocol)

    def add(self, evaluated: Evaluated, rankings: Mapping[str, Ranking]) -> None:
        """Add a task and write its files and all summaries."""
        task = evaluated.task
        self.done[task.name] = record_of(evaluated, str(self.call["root"]))
        self.missing.pop(task.name, None)
        self.scored.append(task.name)
        for pair, found in rankings.items():
            write_task(self.output / pair / task.modality, task, evaluated.scored[pair], found)
        self.write()

    def miss(self, task: MissingTask) -> None:
        """Add a task that has no scores; scores of an earlier call stay."""
        if task.name not in self.done:
            self.missing[task.name] = {"code": task.code, "reason": task.reason}

    def averages(self, pair: str) -> dict[str, Any]:
        """Return the averages of a pair of modes. Tasks that were cut count as missing."""
        found = {} if self.limit else {name: one["results"][pair] for name, one in self.done.items()}
        values = {name: one["main"] for name, one in found.items()}
        if self.benchmark == "mmeb-v2":
            return mmeb_v2_averages(values, self.table)
        if self.benchmark == "uvrb":
            return uvrb_averages(values)
        return mrmr_averages(values, {name: one.get("categories", {}) for name, one in found.items()})

    def write(self) -> None:
        """Write result.json, the table and the report of each pair of modes.

        Another command may have scored other tasks into the same folder by now: they stay.
        """
        others, _ = earlier(self.output / "result.json", self.protocol)
        self.done = {**others, **self.done}
        self.missing = {name: one for name, one in self.missing.items() if name not in self.done}
        write_whole(self.output / "result.json", json.dumps(self.result(), indent=2))
        tables = [table.markdown() for table in self.tables()]
        write_whole(self.output / "table.md", "\n\n".join(tables) + "\n")
        if self.limit:  # a report of cut tasks could be taken for a whole one
            return
        codes = {name: one["code"] for name, one in self.missing.items()}
        for pair in self.pairs:
            scores = {
                name: task_scores(one["results"][pair]["scores"], one["queries"])
                for name, one in self.done.items()
            }
            if self.benchmark == "mmeb-v2":
                told = report(self.metadata, self.table, scores, codes)
            else:
                more = {"averages": self.averages(pair), "protocol": self.protocol}
                more["texts_cut"] = {name: one["texts_cut"] for name, one in self.done.items()}
                told = plain_report(self.metadata, self.benchmark, scores, codes, **more)
            file = self.output / pair / f"{self.metadata.model_name}.json"
            write_whole(file, json.dumps(told, indent=4))

    def result(self) -> dict[str, Any]:
        """Return what result.json holds."""
        return {
            "model": asdict(self.metadata),
            "protocol": self.protocol,
            "last_call": self.call,
            "tie_rule": TIE_RULE,
            "averages": {pair: self.averages(pair) for pair in self.pairs},
            "tasks": self.done,
            "missing": self.missing,
            "not_asked_for": self._not_asked_for(),
        }

    def _not_asked_for(self) -> list[str]:
        return [name for name in self.names if name not in self.done and name not in self.missing]

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
        none = ["-"] * len(published)
        rows = [["tasks", *(found["tasks"] for found in averages.values()), *none]]
        for name in (*_COLUMNS[self.benchmark], *groups):
            ours = [_shown(flat[pair].get(name)) for pair in self.pairs]
            rows.append([name, *ours, *(_shown(row.values.get(name)) for row in published)])
        costs = [self._cost(pair) for pair in self.pairs]
        for number, name in enumerate(("rewrite tokens", "ms a query", "ms a candidate")):
            rows.append([name, *(cost[number] for cost in costs), *none])
        cut = sum(_cut(one) for one in self.done.values())
        rows.append(["texts cut", *[f"{cut:,}"] * len(self.pairs), *none])
        head = ["average", *self.pairs, *(row.model for row in published)]
        title = f"{self.benchmark}: averages of {self.metadata.model_name}"
        return Table(title, head, rows, note="\n".join(self._notes()))

    def _notes(self) -> list[str]:
        """Return what the averages are of, and how they were measured."""
        missing, other = len(self.missing), len(self._not_asked_for())
        settings = ", ".join(
            f"{name} {value}" for name, value in self.protocol.items() if not isinstance(value, dict | list)
        )
        notes = [
            f"Scored tasks: {len(self.done)}; without scores: {missing}; not asked for: {other}. A mean with "
            "a missing task is not shown.",
            f"Settings: {settings}.",
            "ms: time of the model for an item, measured in its batches, without opening media. With both "
            "modes in one pass, the discriminative time ends with the prompt. Rewrite tokens: the mean of "
            f"the sides that write. {self._measured()}",
        ]
        notes += [
            f"{row.model}: {row.source}{row.note and f'; {row.note}'}." for row in PUBLISHED[self.benchmark]
        ]
        if self.limit:
            notes.append(f"Each task was cut to {self.limit} queries, so there are no averages.")
        return notes

    def _measured(self) -> str:
        """Return when the times were measured: embeddings of an earlier call keep theirs."""
        costs = [one["cost"][side] for one in self.done.values() for side in _SIDES]
        if not costs:
            return "Nothing was measured."
        first, last = min(cost["measured_from"] for cost in costs), max(cost["measured_to"] for cost in costs)
        sizes = sorted({size for cost in costs for size in cost["batch_sizes"]})
        return f"Measured from {first} to {last}, with batch size {' and '.join(map(str, sizes))}."

    def _cost(self, pair: str) -> tuple[str, str, str]:
        """Return mean rewrite tokens of the sides that write, ms a query and ms a candidate."""
        times: list[str] = []
        tokens: list[float] = []
        for side, half in zip(_SIDES, pair.split("-"), strict=True):
            mode = _MODES[half]
            costs = [one["cost"][side] for one in self.done.values()]
            times.append(f"{fmean(cost['ms_per_item'][mode] for cost in costs):.1f}" if costs else "-")
            if mode == "generative":
                tokens += [cost["rewrite_tokens"] for cost in costs if cost["rewrite_tokens"] is not None]
        return (f"{fmean(tokens):.1f}" if tokens else "-", *times)  # type: ignore[return-value]

    def _tasks(self) -> Table:
        rows = []
        for name, one in self.done.items():
            found = [one["results"][pair] for pair in self.pairs]
            ties = max(result["queries_with_ties"] for result in found)
            scores = [f"{result['main']:.4f}" for result in found]
            rows.append([name, one["metric"], *scores, str(ties), f"{_cut(one):,}"])
        rows += [
            [name, one["code"], *["-"] * len(self.pairs), "-", "-"] for name, one in self.missing.items()
        ]
        head = ["task", "metric", *self.pairs, "queries with ties", "texts cut"]
        notes = [f"{name}: {note}." for name, one in self.done.items() for note in one["notes"]]
        if any(map(_cut, self.done.values())):
            notes.append("Texts cut: items whose text the model read in part (prompt.max_text_tokens).")
        return Table(f"{self.benchmark}: tasks", head, rows, note="\n".join(notes))


def _cut(record: Record) -> int:
    return sum(record["texts_cut"].values())


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
