"""One finished run against another: differences of recall@1 on the same test queries, with intervals.

Called by `rime runs --against`. The studies of the claims average over seeds first (measure.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import paired_bootstrap
from rime_pl.report.table import Table
from rime_pl.run_folder import RunFolder, headline_tasks
from rime_pl.study.design import MEAN
from rime_pl.study.measure import hits
from rime_pl.types import MODE_PAIRS

#: Columns of the table: recall@1 of each mode pair, and the mean of all four.
COLUMNS = (*MODE_PAIRS, MEAN)


def differences(runs: Iterable[tuple[str, RunFolder]], other: RunFolder) -> Table:
    """Return recall@1 of each named run minus that of another one; untested runs are left out."""
    rows = []
    for name, one in runs:
        if one.path.resolve() == other.path.resolve() or not (one.reported and one.tested):
            continue
        try:
            refuse_other_queries(one, other)
            rows.append([name, *(difference(one, other, column) for column in COLUMNS), unlike(one, other)])
        except (RimeError, KeyError, TypeError, AttributeError) as error:  # the others are still compared
            rows.append([name, *("-" for _ in COLUMNS), str(error)])
    return Table(
        f"recall@1 minus that of {other.path}",
        ["run", *(pair.replace("-", "-\n") for pair in MODE_PAIRS), "mean of\nthe four", "also differs"],
        rows,
        conclusion="" if rows else "There is no other tested run here.",
        note="Below each difference is its 95 % interval: what it might be with other test queries. If 0 "
        "lies in it, no difference is shown. It says nothing about other seeds: train them, too.",
    )


def refuse_other_queries(one: RunFolder, other: RunFolder) -> None:
    """Raise a RimeError unless both were tested on the same queries, among as many candidates."""
    if _queries(one) != _queries(other):
        raise RimeError("tested on other queries or among other candidates: it cannot be compared")


def difference(one: RunFolder, other: RunFolder, column: str) -> str:
    """Return a difference of recall@1 and its interval; - where one of the runs has not measured the mode."""
    needed = set(MODE_PAIRS if column == MEAN else (column,))
    if any(needed - set(query["ranks"]) for run in (one, other) for query in run.ranks):
        return "-"
    middle, low, high = paired_bootstrap(hits(other, column), hits(one, column))
    return f"{middle:+.3f}\n{low:+.3f} to {high:+.3f}"


def unlike(one: RunFolder, other: RunFolder) -> str:
    """Return what differs besides the settings, and so may be the reason; - if nothing does."""
    told = [
        f"{label} {mine} instead of {theirs}"
        for name, label in (("stage", "stage"), ("seed", "seed"), ("steps", "training steps"))
        if (mine := one.manifest.get(name)) != (theirs := other.manifest.get(name))
    ]
    told += ["another base model"] * _other_base(one, other)
    told += ["another corpus"] * (one.manifest.get("data_hash") != other.manifest.get("data_hash"))
    return "; ".join(told) or "-"


def _queries(one: RunFolder) -> list[tuple[str, str, int]]:
    """Return task, key and gallery size of each headline query, in the order of ``hits``."""
    tasks = set(headline_tasks(one.settings, (query["task"] for query in one.ranks)))
    found = (query for query in one.ranks if query["task"] in tasks)
    return sorted((query["task"], str(query["key"]), query.get("gallery", 0)) for query in found)


def _other_base(one: RunFolder, other: RunFolder) -> bool:
    """Return whether the base models differ: the hash of their files where both runs know it, or the name."""
    files = [run.origin.get("base_files") for run in (one, other)]
    names = [run.settings["model"]["backbone"]["name_or_path"] for run in (one, other)]
    return files[0] != files[1] if all(files) else names[0] != names[1]
