"""``summary.json``: the table for machines.

Built from what ``RetrievalRecall`` measured on the test split, and from the summary of the stage before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Summary = dict[str, Any]


def build_summary(
    results: Mapping[str, Any] | None,
    history: Sequence[Mapping[str, float]],
    seconds: Mapping[str, float],
    before: Mapping[str, Any] | None = None,
    stage: str = "",
) -> Summary:
    """One summary of a stage.

    Args:
        results: ``RetrievalRecall.results`` after a test: overall, per_task, all_gallery, gallery, chance,
            queries; None without a test.
        history: ``RetrievalRecall.history``: one entry per validation.
        seconds: Wall seconds of each part of the run.
        before: Summary of the stage that this one started from, on the same data; None without one.
        stage: ``sft``, ``cma``.

    Returns:
        ``before`` (overall numbers or None), ``after``, ``per_task``, ``per_task_before``, ``all_gallery``
        (None without distractors), ``memory`` (tasks of ``per_task`` whose targets training showed),
        ``gallery`` (distinct contents; the smallest among the tasks), ``chance`` of recall@1, ``queries``,
        ``seconds``, ``history``. Without a test ``after`` is empty.
    """
    if results is None:
        results = {"overall": {}, "per_task": {}, "all_gallery": None, "memory": []}
        results |= {"gallery": None, "chance": None, "queries": 0}
    return {
        "stage": stage,
        "before": dict(before["after"]) if before else None,
        "after": dict(results["overall"]),
        "per_task": dict(results["per_task"]),
        "per_task_before": dict(before["per_task"]) if before else None,
        "all_gallery": results["all_gallery"],
        "memory": list(results["memory"]),
        "gallery": results["gallery"],
        "chance": results["chance"],
        "queries": results["queries"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "history": [dict(entry) for entry in history],
    }


#: Rewrite that not every query has -> what is said of the queries that have it.
_HAVE = {
    "reference": "have a reference rewrite: its row and the headroom count only these.",
    "shuffled": "have another query of the same task with other content: its rows count only these.",
}


def not_measured(summary: Summary) -> str:
    """Return how many queries the rewrite ablation measured, in words; "" if it measured all."""
    trace, queries = summary["after"]["trace"], summary["queries"]
    counts = ((key, trace.get(f"num_{key}", queries)) for key in ("reference", "shuffled"))
    return "\n".join(f"{count} of {queries} queries {_HAVE[key]}" for key, count in counts if count < queries)
