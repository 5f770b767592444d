"""`rime compare`: what alignment does and what it costs, with the controls beside it.

From the same SFT checkpoint as a finished CMA run it trains two controls of equal length: further SFT steps
(no alignment) and plain alignment (no decisive term); then it writes table, picture and JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rime_pl.metrics.bootstrap import paired_bootstrap
from rime_pl.report.comparison import comparison_figure, comparison_markdown
from rime_pl.report.figures import save_figure
from rime_pl.types import RimeError

#: name of a control -> what differs from the run beside which it stands
CONTROLS = {
    "control": ["--model.lambda_cma", "0", "--model.lambda_dec", "0"],
    "plain": ["--model.lambda_dec", "0"],
}
Variants = dict[str, Path]  # "before", "control", "plain", "decisive" -> run folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, nargs="+", required=True, help="finished CMA run folders, one per seed"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for compare.json, compare.md, compare.png"
    )


def run(args: argparse.Namespace) -> int:
    seeds = [train_controls(folder) for folder in args.run]
    result = {
        "runs": [{name: read_variant(folder) for name, folder in variants.items()} for variants in seeds],
        "disc_minus_control": pooled_difference(seeds, "decisive", "control", "disc-disc"),
        "disc_minus_before": pooled_difference(seeds, "decisive", "before", "disc-disc"),
        "gen_minus_disc": pooled_difference(seeds, "decisive", "decisive", "gen-gen", "disc-disc"),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    table = comparison_markdown(result)
    (args.output / "compare.md").write_text(table)
    save_figure(comparison_figure(result), args.output / "compare.png")
    print(f"{table}\nwritten: {args.output}/compare.{{json,md,png}}")
    return 0


def train_controls(folder: Path) -> Variants:
    """Run what is missing of the controls beside one CMA run; a finished one is taken as it is."""
    if not (folder / "done.json").is_file():
        raise RimeError(
            f"--run {folder}: no finished CMA run here (done.json is missing). Run `make train-cma` first."
        )
    variants = {"before": previous_run(folder)}
    for name, changes in CONTROLS.items():
        variants[name] = folder / "controls" / name
        command = [
            sys.executable,
            "-m",
            "rime_pl.main",
            "cma",
            "fit",
            "--config",
            str(folder / "config.yaml"),
        ]
        subprocess.run([*command, "--run_dir", str(variants[name]), *changes], check=True)
    return variants | {"decisive": folder}


def previous_run(folder: Path) -> Path:
    """The run whose adapter a CMA run started from."""
    import yaml

    adapter = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_adapter_from"]
    if not adapter:
        raise RimeError(
            f"--run {folder}: it started from no adapter (model.init_adapter_from), so there is no before."
        )
    return Path(adapter).parent


def read_variant(folder: Path) -> dict[str, Any]:
    """The numbers of one run, as its summary has them, and its seconds per step."""
    summary, manifest = (
        json.loads((folder / name).read_text()) for name in ("summary.json", "manifest.json")
    )
    steps = manifest.get("steps_timed", manifest["steps"])  # fewer than all when the run was resumed
    step = summary["seconds"]["fit"] / steps if steps else None
    return {
        "seed": manifest["seed"],
        "recall@1": summary["after"]["recall@1"],
        "trace": summary["after"]["trace"],
        "per_task": {task: values["recall@1"] for task, values in summary["per_task"].items()},
        "gallery": summary["gallery"],
        "chance": summary["chance"],
        "seconds_per_step": step,
        "steps": manifest["steps"],
    }


def pooled_difference(
    seeds: list[Variants], first: str, second: str, pair: str, other_pair: str | None = None
) -> dict[str, float]:
    """recall@1 of one variant minus another, queries of all seeds paired, with its 95 % interval."""
    hits = [(headline_hits(v[second], other_pair or pair), headline_hits(v[first], pair)) for v in seeds]
    tasks = sorted(hits[0][0])
    low = [torch.cat([of_seed[0][task] for of_seed in hits]) for task in tasks]
    high = [torch.cat([of_seed[1][task] for of_seed in hits]) for task in tasks]
    mean, lower, upper = paired_bootstrap(low, high)
    return {"mean": mean, "lower": lower, "upper": upper}


def headline_hits(folder: Path, pair: str) -> dict[str, Tensor]:
    """Per headline task, for each test query in a fixed order, whether the right answer ranked first."""
    import yaml

    headline = yaml.safe_load((folder / "config.yaml").read_text())["recall"]["headline_tasks"]
    rows = sorted(json.loads((folder / "ranks.json").read_text()), key=lambda row: row["key"])
    names = headline or sorted({row["task"] for row in rows})
    return {
        name: torch.tensor([float(row["ranks"][pair] == 1) for row in rows if row["task"] == name])
        for name in names
    }
