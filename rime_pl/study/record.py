"""From the results of several seeds to a *record* (ours): the results of one stage on one corpus.

Tables, pictures and pages are made from records, so they can be made again without the runs. A record keeps
the result of each seed, so a further seed can join it later. Records lie in ``compare.json`` and in
``docs/results/claims/*.json``. Called by `rime compare` and `rime claims`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, mode
from typing import Any

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import macro_mean, paired_bootstrap
from rime_pl.study.design import COMPARISONS, MEAN, Difference
from rime_pl.study.measure import SeedResult, refuse_unlike
from rime_pl.types import MODE_PAIRS

Record = dict[str, Any]
#: Variants that train for a given time: their number of steps differs from machine to machine.
OF_TIME = {"further_cma_same_seconds"}
#: What all seeds of a record share, and what a reader calls it.
SHARED = {
    "data_hash": "another corpus",
    "recipe": "other settings",
    "tuned": "another `rime compare --tuned`",
    "gallery": "another number of candidates",
}


def record_of(results: Iterable[SeedResult]) -> Record:
    """Return the record of the seeds: each result as mean, lowest and highest seed.

    A variant that one of the seeds lacks is left out.

    Raises:
        RimeError: If the seeds are of different corpora, recipes or numbers of steps.
    """
    seeds = sorted(results, key=lambda one: int(one["seed"]))
    first = seeds[0]
    shown = COMPARISONS[first["stage"]]
    for one in seeds[1:]:
        if other := unlike(one, first):
            raise RimeError(
                f"seeds {first['seed']} and {one['seed']} of {first['stage']} on {first['corpus']} cannot be "
                f"averaged: the second one has {other}. Train both in the same way."
            )
    present = set.intersection(*(set(one["variants"]) for one in seeds))
    names = [name for name in shown.variants if name in present]
    threads = mode(one["threads"] for one in seeds)
    compared = [d for d in shown.differences if {d.first, d.second} <= present]
    adaptive, dates = [one["adaptive"] for one in seeds], sorted(one["date"] for one in seeds)
    return {
        "stage": first["stage"],
        "corpus": first["corpus"],
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "seeds": [one["seed"] for one in seeds],
        "base_models": len({one["base_model"] for one in seeds}),
        "annotated_seeds": sorted({one["annotated_seed"] for one in seeds}),
        "gallery": first["gallery"],
        "chance": first["chance"],
        "variants": {
            name: _variant(name, [one["variants"][name] for one in seeds], threads) for name in names
        },
        "adaptive": _spreads(adaptive) if all(adaptive) else {},
        "crossed": _spreads([one["crossed"] for one in seeds]),
        "tasks": {task: _spreads([one["tasks"][task] for one in seeds]) for task in first["tasks"]},
        "differences": {d.key: paired_difference(seeds, d) for d in compared},
        "tuned": first["tuned"],
        "of_seeds": seeds,
    }


def unlike(one: SeedResult, other: SeedResult) -> str:
    """Return what keeps two seeds out of one record; nothing if they can be averaged."""
    return ", ".join(name for key, name in SHARED.items() if one[key] != other[key])


def _variant(name: str, found: Sequence[dict[str, Any]], threads: int | None) -> dict[str, Any]:
    steps = sorted({one["steps"] for one in found})
    if name not in OF_TIME:
        refuse_unlike((one["run"], one["steps"]) for one in found)
    timed = [one["seconds_per_step"] for one in found if one["threads"] == threads]
    slots = all(one["slot_f1"] is not None for one in found)
    return {
        "steps": steps[0] if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
        "seconds_per_step": min(filter(None, timed), default=None),  # of the run that was disturbed least
        "recall@1": _spreads([one["recall@1"] for one in found]),
        "trace": _spreads([one["trace"] for one in found]),
        "slot_f1": spread(one["slot_f1"] for one in found) if slots else None,
        "tokens": mean(one["tokens"] for one in found),
        "curves": {key: mean(one["curves"][key] for one in found) for key in found[0]["curves"]},
    }


def _spreads(found: Sequence[dict[str, float | None]]) -> dict[str, list[float]]:
    return {key: spread(one[key] for one in found) for key in found[0]}


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


def _hits(seed: SeedResult, variant: str, column: str) -> list[Tensor]:
    """Return a (Q,) tensor for each headline task; with MEAN the share of the modes that hit."""
    columns = MODE_PAIRS if column == MEAN else (column,)
    tasks = zip(*(seed["hits"][variant][one] for one in columns), strict=True)
    return [torch.tensor([[hit == "1" for hit in text] for text in task]).float().mean(0) for task in tasks]


def pool(folders: Sequence[Path], kept: Iterable[Record] = ()) -> tuple[list[Record], list[str]]:
    """Return a record for each stage and corpus that the folders hold, and which kept seeds were left out.

    Args:
        folders: Written by `rime compare`.
        kept: Earlier records. Their seeds that no folder holds join the new ones if they were trained in the
            same way.

    Raises:
        RimeError: If a folder holds no comparison of this version, or a seed is there twice.
    """
    new: dict[tuple[str, str], dict[int, SeedResult]] = {}
    for folder in folders:
        for one in _read(folder):
            seeds = new.setdefault((one["stage"], one["corpus"]), {})
            if seeds.setdefault(one["seed"], one) != one:
                raise RimeError(
                    f"--compared must name each seed once, but {folder} holds seed {one['seed']} of "
                    f"{one['stage']} on {one['corpus']}, which was given already from another run."
                )
    told: list[str] = []
    for record in kept:
        seeds = new.get((record["stage"], record["corpus"]), {})
        newest = next(iter(seeds.values()), None)
        for one in record.get("of_seeds", ()) if newest else ():
            if one["seed"] in seeds:
                continue
            if other := unlike(one, newest or one):
                told.append(f"{record['stage']} on {record['corpus']}: kept seed {one['seed']} has {other}")
                continue
            seeds[one["seed"]] = one
    return [record_of(seeds.values()) for seeds in new.values()], told


def _read(folder: Path) -> list[SeedResult]:
    """Return the seeds of one comparison."""
    file = folder / "compare.json"
    compared = json.loads(file.read_text()) if file.is_file() else {}
    if "of_seeds" not in compared:
        raise RimeError(
            f"--compared must name folders with a compare.json of this version, but {folder} has none. "
            f"Run `rime compare --output {folder}`."
        )
    return list(compared["of_seeds"])
