"""From the finished runs of one seed to a *seed result* (ours): what a record needs of them, as plain data.

So the seeds of a record may be trained at different times, on different machines. Called by `rime compare`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from rime_pl.corpus_places import BASE_RECORD
from rime_pl.errors import RimeError
from rime_pl.report.events import read_events
from rime_pl.report.page.parts import flat
from rime_pl.run_files import read_facts
from rime_pl.run_folder import OF_RUN, RunFolder, headline_tasks
from rime_pl.study.design import COMPARISONS, MEAN
from rime_pl.study.switching import RESULTS, known_adaptive
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

Variants = dict[str, RunFolder]  # of one seed: "before", the controls, the run under study
SeedResult = dict[str, Any]
#: Curves of Refine-RL in a record (docs/reference/metrics.md); of the last two also the highest value.
CURVES = ("reward_spread", "no_signal", "entropy", "kl", "grad_norm")
#: Settings that may differ between the seeds of a record, beside those of OF_RUN; or how they begin.
OF_MACHINE = ("num_threads", "ckpt_path", "data.num_workers", "data.cache.", "checkpoint.")


def seed_result(stage: str, variants: Variants, tuned: Any = None) -> SeedResult:
    """Return the results of the run under study and of its controls, all of one seed.

    Args:
        stage: Of the run under study.
        variants: Finished runs. What the stage compares and is not among them is left out.
        tuned: What `rime tune` found, if the weights come from it.

    Raises:
        RimeError: If a run has not measured what is compared.
    """
    shown = COMPARISONS[stage]
    runs = {name: variants[name] for name in shown.variants if name in variants}
    for run in runs.values():
        run.need_both_modes()
    subject = runs[shown.subject]
    manifest = subject.manifest
    adaptive = known_adaptive(subject)
    return {
        "stage": stage,
        "corpus": Path(manifest["data"]).name,
        "data_hash": manifest.get("data_hash"),
        "queries": _hash(queries(subject)),
        "recipes": recipes(subject),
        "tuned": tuned,
        "seed": manifest["seed"],
        "date": date.today().isoformat(),
        "commit": manifest.get("git_commit"),
        "base_model": base_of(subject),
        "annotated_seed": int(subject.settings["data"].get("annotated_seed") or 0),  # once there was none
        "machine": [(manifest.get("device") or {}).get("name"), subject.threads],
        "gallery": subject.summary["gallery"],
        "chance": subject.summary["chance"],
        "variants": {name: _variant(stage, name, run) for name, run in runs.items()},
        "adaptive": {key: adaptive[key] for key in RESULTS} if adaptive else {},
        "crossed": subject.summary["after"].get("crossed") or {},
        "tasks": {task: found["recall@1"] for task, found in sorted(subject.summary["per_task"].items())},
        "hits": {name: _compared_hits(stage, name, run) for name, run in runs.items()},
    }


def recipes(run: RunFolder) -> dict[str, str]:
    """Return a hash of the recipe of the base model, of each stage before the run, and of the run itself.

    A recipe is all that was set, but for the place of the run, its seed, and what only the machine decides.
    """
    if before := run.before():
        earlier = recipes(before) if before.config.is_file() else {"start": "unknown"}  # a copy without it
    else:
        record = Path(run.settings["model"]["backbone"]["name_or_path"]) / BASE_RECORD
        kept = read_facts(record) if record.is_file() else None
        made_with = kept.get("made_with") if isinstance(kept, dict) else None
        decided = made_with.items() if isinstance(made_with, dict) else {base_of(run): None}.items()
        earlier = {"base": _hash([pair for pair in decided if pair[0] != "num_threads"])}
    return earlier | {run.stage: _hash(_decided(run))}


def _decided(run: RunFolder) -> list[tuple[str, str]]:
    """Return what a recipe decides of the settings; one that is not set does not count."""
    found = []
    for name, value in sorted(flat(run.settings).items()):
        if name not in OF_RUN and not name.startswith(OF_MACHINE) and value not in ("null", "{}", "[]"):
            with suppress(ValueError):
                value = repr(float(value))  # 1 is 1.0
            found.append((name, value))
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def base_of(run: RunFolder) -> str:
    """Return what tells the base model of a run from another one: the hash of its files, or else its name."""
    return str(run.origin.get("base_files") or run.settings["model"]["backbone"]["name_or_path"])


def _variant(stage: str, name: str, run: RunFolder) -> dict[str, Any]:
    found = run.summary["after"]
    written = found["rewrite"]
    return {
        "run": str(run.path),
        "steps": run.manifest["steps"],
        "seconds_per_step": run.seconds_per_step,
        "recall@1": {pair: found["recall@1"][pair] for pair in MODE_PAIRS},
        "trace": {key: found["trace"][key] for key in REWRITE_ABLATION},
        # no slot F1 beside SFT: each variant there is measured against what it was taught to write
        "slot_f1": None if stage == "sft" else written.get("slot_f1"),
        # a model that learnt no rewrite is used in its discriminative mode, which generates nothing
        "tokens": 0.0 if name == "discriminative_only" else written["mean_length"],
        "curves": curve_means(run),
    }


def _compared_hits(stage: str, name: str, run: RunFolder) -> dict[str, dict[str, str]]:
    """Return the hits of the mode pairs and of all else that is compared: column -> task -> a text."""
    compared = {d.mode for d in COMPARISONS[stage].differences if d.first == name}
    compared |= {d.second_mode or d.mode for d in COMPARISONS[stage].differences if d.second == name}
    return {
        column: {task: as_text(found) for task, found in hits_of_tasks(run, column).items()}
        for column in (*MODE_PAIRS, *sorted(compared - {*MODE_PAIRS, MEAN}))
    }


def as_text(found: Tensor) -> str:
    """Return a (Q,) tensor of ones and zeros as a text, a character for each query.

    >>> as_text(torch.tensor([1.0, 0.0, 1.0]))
    '101'
    """
    return "".join("1" if hit else "0" for hit in found.tolist())


def hits(run: RunFolder, column: str, k: int = 1) -> list[Tensor]:
    """Return a (Q,) tensor for each headline task: 1 where a query ranked its answer among the first k.

    Queries are in the order of their keys. With MEAN it is the share of the modes in which it did.
    """
    return list(hits_of_tasks(run, column, k).values())


def hits_of_tasks(run: RunFolder, column: str, k: int = 1) -> dict[str, Tensor]:
    """Return ``hits`` by the names of their tasks."""
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
    return {task: torch.tensor(found[task]).float().mean(1) for task in tasks}


def queries(run: RunFolder) -> list[tuple[str, str, int, Any]]:
    """Return task, key, gallery size and target of each headline query, in the order of ``hits``."""
    tasks = set(headline_tasks(run.settings, (query["task"] for query in run.ranks)))
    found = (query for query in run.ranks if query["task"] in tasks)
    return sorted(
        ((query["task"], str(query["key"]), query.get("gallery", 0), query.get("target")) for query in found),
        key=lambda row: row[:2],  # a target may be None
    )


def refuse_unlike(steps: Iterable[tuple[str, int]]) -> None:
    """Raise if runs that are to be averaged over seeds have different numbers of steps.

    Args:
        steps: Name and number of training steps of each.
    """
    known = dict(steps)
    if len(set(known.values())) > 1:
        raise RimeError(
            "these runs have different numbers of training steps and cannot be averaged: "
            f"{', '.join(f'{path}: {count}' for path, count in known.items())}. If one of them is an old "
            "control, delete its folder and run `rime compare` again."
        )


def curve_means(run: RunFolder) -> dict[str, float]:
    """Return the means of CURVES over the logged steps of a Refine-RL run; empty for other stages."""
    scalars = read_events(run.path / "tensorboard").scalars
    logged = [name for name in CURVES if f"train/{name}" in scalars]
    curves = {name: [value for _, value in scalars[f"train/{name}"]] for name in logged}
    means = {name: mean(values) for name, values in curves.items()}
    highest = {f"{name}_highest": max(curves[name]) for name in CURVES[-2:] if name in curves}
    return means | highest if "kl" in curves else {}
