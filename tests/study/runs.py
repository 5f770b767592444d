"""Finished runs and records written by hand, for the tests of the study."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rime_pl.run_folder import RunFolder
from rime_pl.study.design import COMPARISONS
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION


def run_folder(
    path: Path,
    ranks: list[int],
    steps_timed: int = 5,
    stage: str = "cma",
    before: RunFolder | None = None,
    seed: int = 3,
    recall: float = 0.5,
    **settings: Any,
) -> RunFolder:
    """As much of a finished run as the study reads. It trained 9 steps; the timed ones took 10 s.

    Ranks are those of the queries in each mode. The settings are added to those of ``data``.
    """
    path.mkdir(parents=True)
    after: dict[str, Any] = {
        "recall@1": dict.fromkeys(MODE_PAIRS, recall),
        "trace": dict.fromkeys(REWRITE_ABLATION, recall),
        "rewrite": {"slot_f1": recall, "mean_length": 4.0},
    }
    summary = {"after": after, "per_task": {"twin": after}, "gallery": 4, "chance": 0.25}
    (path / "summary.json").write_text(json.dumps(summary | {"seconds": {"fit": 10.0}}))
    manifest: dict[str, Any] = {
        "stage": stage,
        "seed": seed,
        "data": "data/mine",
        "steps": 9,
        "steps_timed": steps_timed,
    }
    manifest["data_hash"] = "of mine"
    (path / "manifest.json").write_text(json.dumps(manifest))
    rows = [
        {"key": str(n), "task": "twin", "ranks": dict.fromkeys([*MODE_PAIRS, "trace/empty"], rank)}
        for n, rank in enumerate(ranks)
    ]
    (path / "ranks.json").write_text(json.dumps(rows[::-1]))  # the file's order says nothing
    adapter = str(before.adapter) if before else None
    config: dict[str, Any] = {"recall": {"headline_tasks": ["twin"]}, "model": {"init_adapter_from": adapter}}
    config["model"] |= {"backbone": {"name_or_path": "models/mine"}, "lambda_ce": 4.0}
    config |= {"data": settings, "trainer": {"max_epochs": 3}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "done.json").write_text("{}")
    return RunFolder(path)


def trained(words: list[str], **facts: Any) -> RunFolder:
    """What a control leaves that was trained by these words, whose settings it keeps."""
    run = run_folder(Path(words[-1]), [1], **facts)
    config = yaml.safe_load(run.config.read_text())
    for option, word in pairwise(words):
        if option.startswith("--model."):
            *above, name = option[2:].split(".")
            place = config
            for part in above:
                place = place.setdefault(part, {})
            place[name] = yaml.safe_load(word)
    run.config.write_text(yaml.safe_dump(config))
    return RunFolder(run.path)


def change(run: RunFolder, name: str, **values: Any) -> RunFolder:
    """The run with other values in one of its JSON files, read anew."""
    file = run.path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return RunFolder(run.path)


def record(stage: str, *recalls: float, corpus: str = "mine") -> dict[str, Any]:
    """A record in which each variant of each seed has this recall everywhere, and each difference is 0.02."""
    spread = [sum(recalls) / len(recalls), min(recalls), max(recalls)]
    variant = {
        "steps": 7,
        "seconds_per_step": 1.5,
        "recall@1": dict.fromkeys(MODE_PAIRS, spread),
        "trace": dict.fromkeys(REWRITE_ABLATION, spread),
        "slot_f1": None if stage == "sft" else spread,
        "tokens": 10 * spread[0],
        "curves": {},
    }
    shown = COMPARISONS[stage]
    found = {
        "stage": stage,
        "corpus": corpus,
        "date": "2026-01-01",
        "seeds": list(range(len(recalls))),
        "gallery": 40,
        "chance": 1 / 40,
        "variants": {name: dict(variant) for name in shown.variants},
        "crossed": {},
        "tasks": {"twin": dict.fromkeys(MODE_PAIRS, spread)},
        "differences": {
            d.key: {"mean": 0.02, "lower": -0.01, "upper": 0.05, "seeds": [0.01, 0.03, 0.02][: len(recalls)]}
            for d in shown.differences
        },
    }
    if stage == "refine_rl":
        crossed = {"old-old": 0.5, "new-old": 0.6, "old-new": 0.51, "new-new": 0.62}
        found["crossed"] = {key: [value] * 3 for key, value in crossed.items()}
        found["variants"]["refine_rl"]["curves"] = {"reward_spread": 0.25, "kl": 0.125}
    return found
