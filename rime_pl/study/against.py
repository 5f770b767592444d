"""One finished run against another: differences of recall@1 on the same test queries, with intervals.

Called by `rime runs --against`. The studies of the claims average over seeds first (record.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import paired_bootstrap
from rime_pl.report.page.parts import flat
from rime_pl.report.table import Table
from rime_pl.run_folder import OF_RUN, RunFolder
from rime_pl.study.design import MEAN
from rime_pl.study.measure import hits, queries
from rime_pl.types import MODE_PAIRS

#: Columns of the table: recall@1 of each mode pair, and the mean of all four.
COLUMNS = (*MODE_PAIRS, MEAN)


def differences(runs: Iterable[tuple[str, RunFolder]], other: RunFolder) -> Table:
    """Return recall@1 of each named run minus that of another one; untested runs are left out.

    Raises:
        RimeError: If the results of the other run cannot be read.
    """
    rows, _ = [], (other.ranks, other.settings, other.manifest)
    for name, one in runs:
        try:
            if one.path.resolve() == other.path.resolve() or not one.tested:
                continue
            refuse_other_queries(one, other)
            rows.append([name, *(difference(one, other, column) for column in COLUMNS), unlike(one, other)])
        except (RimeError, KeyError, TypeError, AttributeError) as error:  # the others are still compared
            rows.append([name, *("-" for _ in COLUMNS), str(error)])
    return Table(
        f"recall@1 minus that of {other.path}",
        ["run", *(pair.replace("-", "-\n") for pair in MODE_PAIRS), "mean of\nthe four", "differs in"],
        rows,
        conclusion="" if rows else "There is no other tested run here.",
        note="Below each difference is its 95 % interval, the range in which it would lie with other test "
        "queries. Where 0 is in it, the test does not show that the runs differ. About one interval in 20 "
        "misses the true difference. No interval tells about other seeds: train them, too.",
    )


def refuse_other_queries(one: RunFolder, other: RunFolder) -> None:
    """Raise a RimeError unless both were tested on the same queries, among as many candidates."""
    mine, theirs = queries(one), queries(other)
    # before 0.1.0, ranks.json did not say what a query looks for, and a key is only a place in a file
    if any(target is None for *_, target in mine + theirs):
        if not _same(one.manifest, other.manifest, "data_hash"):
            raise RimeError("tested on another corpus, whose queries may be others: it cannot be compared")
        mine, theirs = ([(*row[:3], None) for row in rows] for rows in (mine, theirs))
    if mine != theirs:
        raise RimeError("tested on other queries or among other candidates: it cannot be compared")


def difference(one: RunFolder, other: RunFolder, column: str) -> str:
    """Return a difference of recall@1 and its interval; - where one of the runs has not measured the mode."""
    needed = set(MODE_PAIRS if column == MEAN else (column,))
    if any(needed - set(query["ranks"]) for run in (one, other) for query in run.ranks):
        return "-"
    before, after = hits(other, column), hits(one, column)
    middle, *bounds = paired_bootstrap(before, after)
    if max(map(len, before)) == 1:  # one query a task: nothing to resample
        return f"{middle:+.3f}"
    exact = all(bound == 0 or abs(bound) >= 0.0005 for bound in bounds)  # "-0.000" does not tell a sign
    low, high = (f"{bound:+.{3 if exact else 4}f}" for bound in bounds)
    return f"{middle:+.3f}\n{low} to\n{high}"


def unlike(one: RunFolder, other: RunFolder) -> str:
    """Return all in which two runs differ, as far as it is known; - if in nothing."""
    mine, theirs = one.manifest, other.manifest
    told = [
        f"{label} {mine.get(name)} instead of {theirs.get(name)}"
        for name, label in (("stage", "stage"), ("seed", "seed"), ("steps", "training steps"))
        if mine.get(name) != theirs.get(name)
    ]
    told += ["another corpus"] * (not _same(mine, theirs, "data_hash"))
    told += ["another base model"] * _other_base(one, other)
    if one.stage == other.stage:  # the settings of two stages have different names
        told += ["another start"] * _other_start(one, other)
        told += _settings(flat(one.settings), flat(other.settings))
    return "; ".join(told) or "-"


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> bool:
    """Return whether both hold a value, and the same."""
    return mine.get(name) is not None and mine[name] == theirs.get(name)


def _other_base(one: RunFolder, other: RunFolder) -> bool:
    """Return whether the base models differ: the hash of their files where both runs know it, or the name."""
    files = [run.origin.get("base_files") for run in (one, other)]
    names = [run.settings["model"]["backbone"]["name_or_path"] for run in (one, other)]
    return files[0] != files[1] if all(files) else names[0] != names[1]


def _other_start(one: RunFolder, other: RunFolder) -> bool:
    """Return whether the runs started from different adapters: the hash where both know it, or the place."""
    hashes = [run.origin.get("start_hash") for run in (one, other)]
    starts = [run.before() for run in (one, other)]
    places = [None if run is None else run.path.resolve() for run in starts]
    return hashes[0] != hashes[1] if all(hashes) else places[0] != places[1]


def _settings(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the settings that differ, but for those that follow from the run's place."""
    unset = {"null", "{}", "-"}  # of the run, or of an earlier version that did not have the setting
    pairs = {name: (mine.get(name, "-"), theirs.get(name, "-")) for name in sorted({*mine, *theirs} - OF_RUN)}
    return [f"{name} {a} instead of {b}" for name, (a, b) in pairs.items() if a != b and not {a, b} <= unset]
