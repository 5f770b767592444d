"""The scores of one task in one pair of modes, from embeddings.

Called by `rime eval`. All scores come from metrics/ranking.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rime_pl.datamodules.benchmarks.task import BenchmarkTask, Name
from rime_pl.errors import DataError
from rime_pl.metrics.ranking import Ranking, graded_scores, rank_graded

#: Candidates of a query that a prediction file lists at most. The lists of local pools are whole.
LISTED = 1000


@dataclass(frozen=True)
class Scored:
    """The scores of a task in a pair of modes."""

    pair: str  # query mode - target mode, such as "gen-disc"
    scores: dict[str, float]  # "hit@1" -> mean over the queries, in the order of the official files
    main: float  # the one that the task is judged by
    categories: dict[str, float]  # category -> mean of the main score over its queries
    ties: int  # pairs of a right and a wrong candidate with equal scores
    tied_queries: int
    #: scores as the official code computes them, where its order of labels gives others; empty if it does not
    compatible: dict[str, float] = field(default_factory=dict)
    compatible_note: str = ""


def check(task: BenchmarkTask) -> None:
    """Raise what would make a task's scores wrong.

    Raises:
        DataError: If names are not distinct, a query has no right answer or one that is not in its pool, or
            counts do not fit.
    """
    counts = {"labels": task.labels, "pools": task.pools, "categories": task.categories, "info": task.info}
    for name, rows in counts.items():
        if rows is not None and (len(rows) or name == "labels") and len(rows) != len(task.queries):
            raise DataError(
                f"{task.name}: {name} must be as many as the {len(task.queries)} queries, but are "
                f"{len(rows)}."
            )
    if len(task.names) != len(task.candidates) or len(set(task.names)) != len(task.names):
        raise DataError(
            f"{task.name}: each of {len(task.candidates)} candidates must have a name of its own, but there "
            f"are {len(set(task.names))} distinct names."
        )
    for number, right in enumerate(task.labels):
        pool = range(len(task.names)) if task.pools is None else set(task.pools[number])
        if not right or not all(place in pool and grade > 0 for place, grade in right.items()):
            raise DataError(
                f"{task.name}: query {number} must have right candidates, all in its pool and with grades "
                f"above 0, but has {dict(right)!r:.90}."
            )


def score(task: BenchmarkTask, pair: str, queries: Tensor, candidates: Tensor) -> tuple[Scored, Ranking]:
    """Return the scores of a task and the ranking that they come from.

    Args:
        task: Q queries, N candidates.
        pair: Query mode - target mode.
        queries: (Q, D) float32, L2-normalised.
        candidates: (N, D) float32, L2-normalised.

    Raises:
        DataError: If the task is judged by a score that is not known.
    """
    found = rank_graded(queries, candidates, task.labels, task.pools, LISTED)
    each = graded_scores(found)
    if task.metric not in each:
        raise DataError(f"{task.name}: its metric must be one of {', '.join(each)}, but is {task.metric!r}.")
    means = {name: float(values.mean()) for name, values in each.items()}
    official, note = _compatible(task, found)
    scored = Scored(
        pair,
        means,
        means[task.metric],
        _by_category(task, each[task.metric]),
        int(found.ties.sum()),
        int((found.ties > 0).sum()),
        official,
        note,
    )
    return scored, found


def _by_category(task: BenchmarkTask, values: Tensor) -> dict[str, float]:
    rows: dict[str, list[int]] = {}
    for number, category in enumerate(task.categories):
        rows.setdefault(category, []).append(number)
    return {category: float(values[numbers].mean()) for category, numbers in rows.items()}


def _compatible(task: BenchmarkTask, found: Ranking) -> tuple[dict[str, float], str]:
    """Return nDCG as the official code computes it, where that differs, and why it may be unknown.

    The official code sends labels through a set before it pairs them with their grades, which are still in
    the order of the file. Grades can land on another right candidate.
    """
    mixed = [number for number, right in enumerate(task.labels) if len(set(right.values())) > 1]
    if not mixed:
        return {}, ""
    names = {number: [task.names[place] for place in task.labels[number]] for number in mixed}
    if not all(isinstance(name, int) for row in names.values() for name in row):
        return {}, "names are texts, whose order in a set differs from process to process"
    shuffled = {number: official_grades(names[number], task.labels[number]) for number in mixed}
    if all(shuffled[number] == dict(task.labels[number]) for number in mixed):
        return {}, ""
    grades = found.grades.clone()
    for number, right in shuffled.items():
        for column, place in enumerate(found.places[number].tolist()):
            if place >= 0:
                grades[number, column] = right[place]
    other = Ranking(found.ranks, grades, found.places, found.ties, found.sizes, found.first)
    each = graded_scores(other)
    return {name: float(values.mean()) for name, values in each.items() if "ndcg" in name}, ""


def official_grades(names: Sequence[Name], right: Mapping[int, float]) -> dict[int, float]:
    """Return place -> grade as ``zip(list(set(labels)), grades)`` of the official code pairs them.

    Args:
        names: Names of the right candidates, in the order of the file.
        right: Place -> grade, in the same order.

    Example:
        >>> official_grades([9, 8], {0: 3.0, 1: 2.0})
        {1: 3.0, 0: 2.0}
    """
    place_of = dict(zip(names, right, strict=True))
    return {place_of[name]: grade for name, grade in zip(list(set(names)), right.values(), strict=True)}
