"""The result files of the official code of MMEB-V2, key by key, and reports of the same form for the others.

Called by `rime eval`. Embeddings are not written as pickles; they are in the store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.evaluation.averages import Place
from rime_pl.evaluation.scoring import Scored
from rime_pl.metrics.ranking import Ranking

#: What a report holds in the place of a task that was not asked for.
NOT_RUN = "FILE_N/A"


@dataclass(frozen=True)
class Metadata:
    """The head of a report for the leaderboard."""

    model_name: str
    model_backbone: str
    model_size: float  # billions of parameters
    embedding_dimension: int
    max_length_tokens: int
    model_release_date: str = ""
    data_source: str = "Self-Reported"
    url: str = ""


def write_whole(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f"{file.name}.half")
    half.write_text(text, encoding="utf-8")
    half.replace(file)


def task_scores(scores: Mapping[str, float], queries: int) -> dict[str, float | int]:
    """Return what a score file holds: fractions, then the number of queries, twice as officially."""
    return {**scores, "num_pred": queries, "num_data": queries}


def write_task(folder: Path, task: BenchmarkTask, scored: Scored, found: Ranking) -> None:
    """Write the three files of a task: scores, predictions and info.

    A prediction lists the names in rank order: all of a local pool, and of a larger one the first 1,000.

    Args:
        folder: Folder of the modality.
        task: The task.
        scored: Its scores.
        found: Its ranking.
    """
    scores = task_scores(scored.scores, len(task.queries))
    write_whole(folder / f"{task.name}_score.json", json.dumps(scores, indent=4))
    write_whole(folder / f"{task.name}_pred.jsonl", _lines(_predictions(task, found)))
    info = task.info or [{}] * len(task.queries)
    write_whole(folder / f"{task.name}_info.jsonl", _lines(info))


def _predictions(task: BenchmarkTask, found: Ranking) -> Iterable[dict[str, Any]]:
    graded = task.modality == "visdoc" or any(set(right.values()) != {1.0} for right in task.labels)
    for first, right in zip(found.first.tolist(), task.labels, strict=True):
        grades = [int(grade) if grade == int(grade) else grade for grade in right.values()]
        yield {
            "prediction": [task.names[place] for place in first if place >= 0],
            "label": [task.names[place] for place in right],
            "rel_scores": grades if graded else None,
        }


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def report(
    metadata: Metadata,
    table: Sequence[Place],
    scores: Mapping[str, Mapping[str, float | int]],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """Return the report that the leaderboard of MMEB-V2 takes.

    Args:
        metadata: Its head.
        table: All tasks of the official report, in its order.
        scores: Task -> what its score file holds.
        missing: Task without scores -> the code that its place holds.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for place in table:
        absent = missing.get(place.name, NOT_RUN)
        metrics.setdefault(place.modality, {})[place.name] = scores.get(place.name, absent)
    return {"metadata": _dated(metadata), "metrics": metrics}


def plain_report(
    metadata: Metadata,
    benchmark: str,
    scores: Mapping[str, Mapping[str, float | int]],
    missing: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Return a report of MRMR or UVRB, which have no official one: head and scores, and what ``more`` has."""
    metrics = {**scores, **missing}
    return {"metadata": _dated(metadata), "benchmark": benchmark, "metrics": metrics, **more}


def _dated(metadata: Metadata) -> dict[str, Any]:
    return {**asdict(metadata), "report_generated_date": datetime.now(UTC).replace(tzinfo=None).isoformat()}
