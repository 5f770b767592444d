"""From finished runs to a *record* (ours): all results of one stage on one corpus, as plain data.

Tables, pictures and pages are made from records, so they can be made again without the runs. Records lie in
``compare.json`` and ``docs/results/claims/*.json``. Called by `rime compare` and `rime claims`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, mode
from typing import Any

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import macro_mean, paired_bootstrap
from rime_pl.report.events import read_events
from rime_pl.run_folder import RunFolder, headline_tasks
from rime_pl.study.design import COMPARISONS, MEAN, Difference
from rime_pl.study.switching import RESULTS, known_adaptive
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

Variants = dict[str, RunFolder]  # of one seed: "before", the controls, the run under study
Record = dict[str, Any]
#: Curves of Refine-RL in a record (docs/reference/metrics.md); of the last two also the highest value.
CURVES = ("reward_spread", "no_signal", "entropy", "kl", "grad_norm")


def measure(stage: str, seeds: Sequence[Variants]) -> Record:
    """Return the record of a stage: each result as mean, lowest and highest seed."""
    shown = COMPARISONS[stage]
    shared = set.intersection(*(set(variants) for variants in seeds))
    runs = {name: [variants[name] for variants in seeds] for name in shown.variants if name in shared}
    for of_variant in runs.values():
        refuse_unlike(of_variant)
        for run in of_variant:
            run.need_both_modes()
    subject = runs[shown.subject]
    first, threads = subject[0], mode(run.threads for run in subject)
    compared = [d for d in shown.differences if {d.first, d.second} <= shared]
    crossed = [run.summary["after"].get("crossed") or {} for run in subject]
    tasks = {
        task: {p: spread(run.summary["per_task"][task]["recall@1"][p] for run in subject) for p in MODE_PAIRS}
        for task in sorted(first.summary["per_task"])
    }
    return {
        "stage": stage,
        "corpus": Path(first.manifest["data"]).name,
        "date": date.today().isoformat(),
        "seeds": [run.manifest["seed"] for run in subject],
        "base_models": len({base_of(run) for run in subject}),
        "annotated_seeds": sorted({_annotated_seed(run) for run in subject}),
        "gallery": first.summary["gallery"],
        "chance": first.summary["chance"],
        "variants": {name: _variant(stage, name, found, threads) for name, found in runs.items()},
        "adaptive": _adaptive(subject),
        "crossed": {key: spread(one[key] for one in crossed) for key in crossed[0]},
        "tasks": tasks,
        "differences": {d.key: paired_difference(seeds, d) for d in compared},
    }


def base_of(run: RunFolder) -> str:
    """Return what tells the base model of a run from another one: the hash of its files, or else its name."""
    return str(run.origin.get("base_files") or run.settings["model"]["backbone"]["name_or_path"])


def _annotated_seed(run: RunFolder) -> int:
    return int(run.settings["data"].get("annotated_seed") or 0)  # an earlier version had none


def _adaptive(runs: Sequence[RunFolder]) -> dict[str, list[float]]:
    """Return the results of an adaptive search; empty unless it was measured of all seeds."""
    known = [known_adaptive(run) for run in runs]
    found = [one for one in known if one is not None]
    return {name: spread(one[name] for one in found) for name in RESULTS} if len(found) == len(known) else {}


def _variant(stage: str, name: str, runs: Sequence[RunFolder], threads: int | None) -> dict[str, Any]:
    results = [run.summary["after"] for run in runs]
    written = [one["rewrite"] for one in results]
    curves = [curve_means(run) for run in runs]
    timed = [run.seconds_per_step for run in runs if run.threads == threads]
    # no slot F1 beside SFT: each variant there is measured against what it was taught to write
    slots = stage != "sft" and all("slot_f1" in one for one in written)
    return {
        "steps": runs[0].manifest["steps"],
        "seconds_per_step": min(filter(None, timed), default=None),  # of the run that was disturbed least
        "recall@1": {pair: spread(one["recall@1"][pair] for one in results) for pair in MODE_PAIRS},
        "trace": {key: spread(one["trace"][key] for one in results) for key in REWRITE_ABLATION},
        "slot_f1": spread(one["slot_f1"] for one in written) if slots else None,
        # a model that learnt no rewrite is used in its discriminative mode, which generates nothing
        "tokens": 0.0 if name == "discriminative_only" else mean(one["mean_length"] for one in written),
        "curves": {key: mean(one[key] for one in curves) for key in curves[0]},
    }


def spread(values: Iterable[float | None]) -> list[float]:
    """Return the mean, the lowest and the highest of the seeds; nothing if it was measured in none."""
    found = [value for value in values if value is not None]
    return [mean(found), min(found), max(found)] if found else []


def refuse_unlike(runs: Sequence[RunFolder]) -> None:
    """Raise if runs that are to be averaged over seeds have different numbers of steps."""
    steps = {str(run.path): run.manifest["steps"] for run in runs}
    if len(set(steps.values())) > 1:
        raise RimeError(
            "these runs have different numbers of training steps and cannot be averaged: "
            f"{', '.join(f'{path}: {count}' for path, count in steps.items())}. If one of them is an old "
            "control, delete its folder and run `rime compare` again."
        )


def paired_difference(seeds: Sequence[Variants], difference: Difference) -> dict[str, Any]:
    """Return mean, 95 % interval and each seed of a difference.

    The seeds share their test queries: a resampled query comes with the results of all seeds.
    """
    high = [hits(one[difference.first], difference.mode) for one in seeds]
    low = [hits(one[difference.second], difference.second_mode or difference.mode) for one in seeds]
    before, after = ([torch.stack(one).mean(0) for one in zip(*side, strict=True)] for side in (low, high))
    middle, lower, upper = paired_bootstrap(before, after)
    each = [macro_mean(a) - macro_mean(b) for a, b in zip(high, low, strict=True)]
    return {"mean": middle, "lower": lower, "upper": upper, "seeds": each}


def hits(run: RunFolder, column: str, k: int = 1) -> list[Tensor]:
    """Return a (Q,) tensor for each headline task: 1 where a query ranked its answer among the first k.

    Queries are in the order of their keys. With MEAN it is the share of the modes in which it did.
    """
    columns = MODE_PAIRS if column == MEAN else (column,)
    found: dict[str, list[list[bool]]] = {}
    for row in sorted(run.ranks, key=lambda row: str(row["key"])):
        if missing := set(columns) - set(row["ranks"]):
            raise RimeError(
                f"{run.path}/ranks.json must hold {missing.pop()}, but does not: an older version wrote it. "
                "Train the run again."
            )
        found.setdefault(row["task"], []).append([0 < (row["ranks"][one] or 0) <= k for one in columns])
    tasks = headline_tasks(run.settings, found)
    return [torch.tensor(found[task]).float().mean(1) for task in tasks]


def curve_means(run: RunFolder) -> dict[str, float]:
    """Return the means of CURVES over the logged steps of a Refine-RL run; empty for other stages."""
    scalars = read_events(run.path / "tensorboard").scalars
    logged = [name for name in CURVES if f"train/{name}" in scalars]
    curves = {name: [value for _, value in scalars[f"train/{name}"]] for name in logged}
    means = {name: mean(values) for name, values in curves.items()}
    highest = {f"{name}_highest": max(curves[name]) for name in CURVES[-2:] if name in curves}
    return means | highest if "kl" in curves else {}
