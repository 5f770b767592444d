"""What result.json keeps of each task, and when an earlier result.json can be added to.

Called by results.py. A record is plain data, so that a task of an earlier call and one of this call are the
same to all summaries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.errors import RimeError
from rime_pl.evaluation.scoring import Scored
from rime_pl.evaluation.store import Cost
from rime_pl.types import Side

#: A task in result.json.
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """What is known of a task once it is ranked."""

    task: BenchmarkTask
    scored: dict[str, Scored]  # pair of modes -> scores
    cost: dict[Side, Cost]
    texts_cut: Mapping[Side, int]  # items whose text the model has read in part


def record_of(one: Evaluated, root: str) -> Record:
    """Return what result.json keeps of a task that was read below ``root``."""
    task = one.task
    return {
        "modality": task.modality,
        "group": task.group,
        "metric": task.metric,
        "queries": len(task.queries),
        "candidates": len(task.candidates),
        "texts_cut": dict(one.texts_cut),
        "version": task.version,
        "notes": list(task.notes),
        "root": root,
        "scored_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cost": {side: asdict(cost) for side, cost in one.cost.items()},
        "results": {pair: _of_pair(scored) for pair, scored in one.scored.items()},
    }


def _of_pair(scored: Scored) -> Record:
    told: Record = {
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


def earlier(file: Path, protocol: Mapping[str, Any]) -> tuple[dict[str, Record], dict[str, Record]]:
    """Return the tasks that an earlier result.json holds, and those that it says are missing.

    Args:
        file: It need not exist.
        protocol: What decides the numbers of this call, as plain data.

    Raises:
        RimeError: If the file cannot be read, or its numbers were measured in another way.
    """
    if not file.is_file():
        return {}, {}
    remedy = f"Give another --output, or remove {file.parent}."
    try:
        found = json.loads(file.read_text("utf-8"))
        before, tasks, missing = found["protocol"], found["tasks"], found["missing"]
        names = [*protocol, *(name for name in before if name not in protocol)]
        other = [name for name in names if before.get(name) != protocol.get(name)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RimeError(
            f"{file} must be results of `rime eval`, but cannot be read: {error!r}. {remedy}"
        ) from error
    if other:
        raise RimeError(
            f"{file} holds results of other settings: {other[0]} was {before.get(other[0])!r:.90}, and is "
            f"{protocol.get(other[0])!r:.90} now. One summary must not mix them. {remedy}"
        )
    return tasks, missing
