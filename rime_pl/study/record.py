"""From the results of several seeds to a *record* (ours): the results of one stage on one corpus.

Tables, pictures and pages are made from records, so they can be made again without the runs. A record keeps
the result of each seed, so a further seed can join it later. Records lie in ``compare.json`` and in
``docs/results/claims/*.json``. Called by `rime compare` and `rime claims`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import macro_mean, paired_bootstrap
from rime_pl.run_files import read_facts
from rime_pl.study.design import COMPARISONS, MEAN, OF_TIME, Difference
from rime_pl.study.measure import SeedResult
from rime_pl.study.tuning import ARMS
from rime_pl.types import MODE_PAIRS

Record = dict[str, Any]


def record_of(results: Iterable[SeedResult]) -> Record:
    """Return the record of the seeds: each result as mean, lowest and highest seed.

    A variant that one of the seeds lacks is left out, and named in ``lacking`` with these seeds.

    Raises:
        RimeError: If a seed is there twice, or if the seeds are of different corpora, queries, recipes or
            numbers of steps.
    """
    seeds = sorted(results, key=lambda one: (one["seed"] is None, one["seed"] or 0))
    first = seeds[0]
    shown = COMPARISONS[first["stage"]]
    for before, one in pairwise(seeds):
        name = f"seed {one['seed']} of {first['stage']} on {first['corpus']}"
        if before["seed"] == one["seed"]:
            raise RimeError(f"each seed can be averaged once, but {name} is there twice.")
        if other := unlike(one, first):
            raise RimeError(f"{name} cannot be averaged with seed {first['seed']}: it has {other}.")
    variants = [one["variants"] for one in seeds]
    names = [name for name in shown.variants if all(name in one for one in variants)]
    compared = [d for d in shown.differences if all(_has(one, d) for one in seeds)]
    adaptive, dates = [one["adaptive"] for one in seeds], sorted(one["date"] for one in seeds)
    tasks = [task for task in first["tasks"] if all(task in one["tasks"] for one in seeds)]
    # seconds of two machines say nothing about two variants
    machine = Counter(str(one["machine"]) for one in seeds).most_common(1)[0][0]
    timed = [str(one["machine"]) == machine for one in seeds]
    return {
        "stage": first["stage"],
        "corpus": first["corpus"],
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "commits": list(dict.fromkeys(one["commit"] for one in seeds if one["commit"])),
        "seeds": [one["seed"] for one in seeds],
        "base_models": len({one["base_model"] for one in seeds}),
        "annotated_seeds": sorted({one["annotated_seed"] for one in seeds}),
        "gallery": first["gallery"],
        "chance": first["chance"],
        "variants": {name: _variant([one[name] for one in variants], timed) for name in names},
        "lacking": lacking(seeds),
        "adaptive": _spreads(adaptive) if all(adaptive) else {},
        "crossed": _spreads([one["crossed"] for one in seeds]),
        "tasks": {task: _spreads([one["tasks"][task] for one in seeds]) for task in tasks},
        "differences": {d.key: paired_difference(seeds, d) for d in compared},
        "tuned": first["tuned"],
        "of_seeds": seeds,
    }


def unlike(one: SeedResult, other: SeedResult) -> str:
    """Return what keeps two seeds out of one record; nothing if they can be averaged."""
    mine, theirs = one["recipes"], other["recipes"]
    names = ["another corpus"] * (one["data_hash"] is None or one["data_hash"] != other["data_hash"])
    names += ["other test queries or candidates"] * (one["queries"] != other["queries"])
    names += [
        "another kind of base model" if stage == "base" else f"other settings of {stage}"
        for stage in {**theirs, **mine}
        if mine.get(stage) != theirs.get(stage)
    ]
    names += ["other weights of `rime tune`"] * (_chosen(one) != _chosen(other))
    for name in sorted(one["variants"].keys() & other["variants"].keys() - OF_TIME):
        steps = [seed["variants"][name]["steps"] for seed in (one, other)]
        names += [f"{steps[0]} instead of {steps[1]} training steps of {name}"] * (steps[0] != steps[1])
    return ", ".join(names)


def _chosen(one: SeedResult) -> list[Any]:
    return [one["tuned"][arm] for arm in ARMS] if one["tuned"] else []


def lacking(seeds: Sequence[SeedResult]) -> dict[str, list[Any]]:
    """Return what some of the seeds have and others lack: variant, or ``adaptive`` -> seeds that lack it."""
    have = [[*one["variants"], *(["adaptive"] if one["adaptive"] else [])] for one in seeds]
    names = dict.fromkeys(name for one in have for name in one)
    found = {
        name: [one["seed"] for one, own in zip(seeds, have, strict=True) if name not in own] for name in names
    }
    return {name: without for name, without in found.items() if without}


def _variant(found: Sequence[dict[str, Any]], timed: Sequence[bool]) -> dict[str, Any]:
    steps = sorted({one["steps"] for one in found})
    seconds = [one["seconds_per_step"] for one, is_timed in zip(found, timed, strict=True) if is_timed]
    slots = all(one["slot_f1"] is not None for one in found)
    curves = [key for key in found[0]["curves"] if all(key in one["curves"] for one in found)]
    return {
        "steps": steps[0] if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
        "seconds_per_step": min(filter(None, seconds), default=None),  # of the run that was disturbed least
        "recall@1": _spreads([one["recall@1"] for one in found]),
        "trace": _spreads([one["trace"] for one in found]),
        "slot_f1": spread(one["slot_f1"] for one in found) if slots else None,
        "tokens": mean(one["tokens"] for one in found),
        "curves": {key: mean(one["curves"][key] for one in found) for key in curves},
    }


def _spreads(found: Sequence[Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Return the spread of all that each seed has."""
    shared = [key for key in found[0] if all(key in one for one in found)]
    return {key: spread(one[key] for one in found) for key in shared}


def spread(values: Iterable[float | None]) -> list[float]:
    """Return the mean, the lowest and the highest of the seeds; nothing if it was measured in none."""
    found = [value for value in values if value is not None]
    return [mean(found), min(found), max(found)] if found else []


def paired_difference(seeds: Sequence[SeedResult], difference: Difference) -> dict[str, Any]:
    """Return mean, 95 % interval and each seed of a difference.

    The seeds share their test queries: a resampled query comes with the results of all seeds.
    """
    high = [_hits(one, difference.first, difference.mode) for one in seeds]
    low = [_hits(one, difference.second, difference.second_mode or difference.mode) for one in seeds]
    before, after = ([torch.stack(one).mean(0) for one in zip(*side, strict=True)] for side in (low, high))
    middle, lower, upper = paired_bootstrap(before, after)
    each = [macro_mean(a) - macro_mean(b) for a, b in zip(high, low, strict=True)]
    return {"mean": middle, "lower": lower, "upper": upper, "seeds": each}


def _has(seed: SeedResult, d: Difference) -> bool:
    """Return whether a seed has all that a difference needs."""
    needed = [(d.first, column) for column in _columns(d.mode)]
    needed += [(d.second, column) for column in _columns(d.second_mode or d.mode)]
    return all(column in seed["hits"].get(name, {}) for name, column in needed)


def _hits(seed: SeedResult, variant: str, mode: str) -> list[Tensor]:
    """Return a (Q,) tensor for each headline task; with MEAN the share of the modes that hit."""
    columns = [seed["hits"][variant][column] for column in _columns(mode)]
    return [
        torch.tensor([[hit == "1" for hit in found[task]] for found in columns]).float().mean(0)
        for task in columns[0]
    ]


def _columns(mode: str) -> tuple[str, ...]:
    return MODE_PAIRS if mode == MEAN else (mode,)


def pool(folders: Sequence[Path], kept: Iterable[Record] = ()) -> tuple[list[Record], list[str]]:
    """Return a record for each stage and corpus that the folders hold, and what was left out of them.

    Args:
        folders: Written by `rime compare`.
        kept: Earlier records. A seed of theirs that no folder holds joins the new ones if it was trained in
            the same way.

    Raises:
        RimeError: If a folder holds no comparison of this version, a seed is there from two runs, or new
            seeds cannot be averaged.
    """
    new: dict[tuple[str, str], dict[Any, SeedResult]] = {}
    for folder in folders:
        for one in _read(folder):
            seeds = new.setdefault((one["stage"], one["corpus"]), {})
            known = seeds.setdefault(one["seed"], one)
            if any(known["hits"][name] != one["hits"][name] for name in known["hits"].keys() & one["hits"]):
                raise RimeError(
                    f"--compared must name each seed once, but {folder} holds seed {one['seed']} of "
                    f"{one['stage']} on {one['corpus']}, which was given already from another run."
                )
            if (len(one["variants"]), one["date"]) > (len(known["variants"]), known["date"]):
                seeds[one["seed"]] = one  # the same run, compared with more, or later
    told: list[str] = []
    for record in kept:
        if seeds := new.get((record["stage"], record["corpus"]), {}):
            told += _join(seeds, record)
    records = [record_of(seeds.values()) for seeds in new.values()]
    for record in records:
        for name, without in record["lacking"].items():
            told.append(f"{_name(record)}: {name}, which not all seeds have (not seed {_listed(without)})")
    return records, told


def _join(seeds: dict[Any, SeedResult], record: Record) -> list[str]:
    """Add the seeds of an earlier record that can be averaged with the new ones; return the others, told."""
    told, new = [], next(iter(seeds.values()))
    earlier = record.get("of_seeds") or ()
    if not earlier and set(record["seeds"]) - set(seeds):
        without = _listed(seed for seed in record["seeds"] if seed not in seeds)
        told.append(f"{_name(record)}: kept seed {without}; an earlier version did not keep its results")
    for one in earlier:
        if one["seed"] in seeds:
            continue
        if other := unlike(one, new):
            told.append(f"{_name(record)}: kept seed {one['seed']}, which has {other}")
        else:
            seeds[one["seed"]] = one
    return told


def _name(record: Record) -> str:
    return f"{record['stage']} on {record['corpus']}"


def _listed(seeds: Iterable[Any]) -> str:
    return ", ".join(map(str, seeds))


def _read(folder: Path) -> list[SeedResult]:
    """Return the seeds of one comparison."""
    file = folder / "compare.json"
    compared = read_facts(file) if file.is_file() else {}
    if not isinstance(compared, dict) or not compared.get("of_seeds"):
        raise RimeError(
            f"--compared must name folders with a compare.json of this version, but {folder} has none. "
            f"Give it as --output of `rime compare`."
        )
    return list(compared["of_seeds"])
