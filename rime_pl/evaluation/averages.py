"""The averages that the benchmarks publish, from the main scores of their tasks.

Called by results.py. A mean over tasks of which some are missing would be another number, so it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rime_pl.errors import RimeError


class Place(NamedTuple):
    """Where a task of MMEB-V2 stands in the official report."""

    modality: str  # "image", "video" or "visdoc"
    group: str  # the meta-task, such as "I-CLS"
    name: str  # key of the report


#: Abilities of UVRB, and the data sets whose plain mean each is.
_UVRB = {
    "CG": ("MSRVTT", "DiDeMo", "CRB-G"),
    "S": ("CRB-S", "VDC-O"),
    "T": ("CRB-T", "CMRB"),
    "PR": ("DREAM-E", "LoVR-TH", "PEV-K"),
    "LC": ("LoVR-V", "VDC-D"),
    "CMP": ("MS-TI", "MS-TV"),
    "VIS": ("MSRVTT-I2V", "LoVR-C2V"),
}
#: Abilities of UVRB that are means of abilities; A-AVG weighs some twice, as its paper does.
_UVRB_MEANS = {
    "FG": ("S", "T", "PR"),
    "TXT": ("CG", "FG", "LC"),
    "A-AVG": ("TXT", "CMP", "VIS", "CG", "FG", "LC"),
}
#: The order in which the abilities are printed.
UVRB_ABILITIES = ("A-AVG", "D-AVG", "TXT", "CMP", "VIS", "CG", "FG", "LC", "S", "T", "PR")
#: Data sets of MRMR, and the columns that each has in the tables of its paper; () is the data set itself.
_MRMR: dict[str, tuple[str, ...]] = {
    "knowledge": ("Art", "Humanities", "Medicine", "Science"),
    "theorem": ("Business", "Engineering", "Math", "Physics"),
    "traffic": (),
    "design": (),
    "negation": (),
}


def mean_of(values: Mapping[str, float], names: Iterable[str]) -> float | None:
    """Return the plain mean of some values; None if one of them is missing.

    Example:
        >>> mean_of({"a": 0.5, "b": 1.0}, ["a", "b"]), mean_of({"a": 0.5}, ["a", "b"])
        (0.75, None)
    """
    chosen = [values.get(name) for name in names]
    there = [value for value in chosen if value is not None]
    return fmean(there) if chosen and len(there) == len(chosen) else None


def mmeb_v2_averages(values: Mapping[str, float], table: Sequence[Place]) -> dict[str, Any]:
    """Return the means of meta-tasks, modalities and all tasks of MMEB-V2.

    The overall is the plain mean over the tasks, not over modalities.

    Args:
        values: Task -> hit@1 (image, video) or ndcg_linear@5 (documents).
        table: All tasks of the official report.

    Returns:
        ``tasks`` is "n of 78"; a mean with a missing task is None.
    """
    by_group: dict[str, list[str]] = {}
    by_modality: dict[str, list[str]] = {}
    for place in table:
        by_group.setdefault(place.group, []).append(place.name)
        by_modality.setdefault(place.modality, []).append(place.name)
    there = sum(place.name in values for place in table)
    return {
        "tasks": f"{there} of {len(table)}",
        "overall": mean_of(values, [place.name for place in table]),
        "modalities": {name: mean_of(values, tasks) for name, tasks in by_modality.items()},
        "meta_tasks": {name: mean_of(values, tasks) for name, tasks in by_group.items()},
    }


def mrmr_averages(
    values: Mapping[str, float], categories: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Return the columns of MRMR's tables and two candidates for its overall number.

    Which mean the paper's overall is has not been confirmed, so both have a name that says what they are.

    Args:
        values: Data set -> nDCG@10; negation: hit@1.
        categories: Data set -> category -> mean over its queries.
    """
    columns: dict[str, float | None] = {}
    for name, parts in _MRMR.items():
        for part in parts:
            columns[f"{name}/{part}"] = categories.get(name, {}).get(part)
        if not parts:
            columns[name] = values.get(name)
    known = {name: value for name, value in columns.items() if value is not None}
    return {
        "tasks": f"{sum(name in values for name in _MRMR)} of {len(_MRMR)}",
        "columns": columns,
        "mean_over_11_columns": mean_of(known, columns),
        "mean_over_5_datasets": mean_of(values, _MRMR),
    }


def uvrb_averages(values: Mapping[str, float]) -> dict[str, Any]:
    """Return the abilities of UVRB, A-AVG and D-AVG.

    FG is the mean of S, T and PR, not of their seven data sets. ``A-AVG = mean(TXT, CMP, VIS, CG, FG, LC)``;
    ``D-AVG`` is the mean over the 16 data sets.

    Args:
        values: Data set -> its score.

    Raises:
        RimeError: If a data set is not one of the 16.
    """
    datasets = [name for names in _UVRB.values() for name in names]
    if unknown := [name for name in values if name not in datasets]:
        raise RimeError(f"A data set of UVRB must be one of {', '.join(datasets)}, but is {unknown[0]!r}.")
    found = {name: mean_of(values, parts) for name, parts in _UVRB.items()}
    for name, parts in _UVRB_MEANS.items():
        found[name] = mean_of({one: value for one, value in found.items() if value is not None}, parts)
    found["D-AVG"] = mean_of(values, datasets)
    return {
        "tasks": f"{len(values)} of {len(datasets)}",
        **{ability: found[ability] for ability in UVRB_ABILITIES},
    }
