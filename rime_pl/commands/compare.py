"""`rime compare`: what a stage does and what it costs, with the controls beside it.

Beside a finished run it trains, where they are missing:

- SFT: runs that write something else before they embed, namely steps and then the rewrite (for as many steps,
  and for as many training tokens), pauses, and nothing (the discriminative loss alone);
- CMA: from the same SFT adapter and for as many steps, further SFT and plain alignment;
- Refine-RL: from the same CMA adapter, further CMA for as many steps and for as many seconds, RL with
  shuffled rewards, with other anchors (discriminative ones of the batch alone; rollouts), and the ancestor's.

Then it writes table, picture and JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rime_pl.datamodules.annotation import Written
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import macro_mean, paired_bootstrap
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.report.figures import save_figure
from rime_pl.run_folder import RunFolder
from rime_pl.study.comparison import COMPARISONS, MEAN, comparison_figure, comparison_markdown
from rime_pl.study.curves import curve_means
from rime_pl.types import MODE_PAIRS

Controls = Iterator[tuple[str, list[str]]]
Variants = dict[str, Path]  # "before", the controls, the run itself -> run folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, nargs="+", required=True, help="finished runs of one stage, one per seed"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for compare.json, compare.md, compare.png"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="CONTROL", help="controls to leave out")


def run(args: argparse.Namespace) -> int:
    stage = stage_of(args.run)
    known = [
        name for name in COMPARISONS[stage].variants if name not in ("before", COMPARISONS[stage].subject)
    ]
    if unknown := set(args.skip) - set(known):
        raise RimeError(f"--skip {' '.join(sorted(unknown))}: the controls are {', '.join(known)}.")
    result = measured(stage, train_controls(stage, args.run, args.skip))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    table = comparison_markdown(result)
    (args.output / "compare.md").write_text(table)
    save_figure(comparison_figure(result), args.output / "compare.png")
    print(f"{table}\nwritten: {args.output}/compare.{{json,md,png}}")
    return 0


def measured(stage: str, seeds: list[Variants]) -> dict[str, Any]:
    """What ``compare.json`` holds: the numbers of each variant of each seed, and the pooled differences."""
    return {
        "stage": stage,
        "folders": [{name: str(folder) for name, folder in variants.items()} for variants in seeds],
        "runs": [{name: read_variant(folder) for name, folder in variants.items()} for variants in seeds],
        "differences": {
            d.name: pooled_difference(seeds, d.variant, d.other, d.pair, d.other_pair)
            for d in COMPARISONS[stage].differences
            if {d.variant, d.other} <= seeds[0].keys()
        },
    }


def stage_of(folders: list[Path]) -> str:
    """The stage that all runs are of."""
    stages = set()
    for folder in folders:
        if not RunFolder(folder).finished:
            raise RimeError(
                f"--run {folder}: no finished run here (done.json is missing). Run `make train-sft`, "
                "`make train-cma` or `make train-refine-rl` first."
            )
        stages.add(manifest_of(folder)["stage"])
    if len(stages) != 1 or not stages <= set(COMPARISONS):
        raise RimeError(
            f"--run: these are of {', '.join(sorted(stages))}; give runs of one stage, "
            f"{' or '.join(COMPARISONS)}."
        )
    return str(stages.pop())


def controls(stage: str, folder: Path, skip: Sequence[str] = (), seeds: Sequence[Path] = ()) -> Controls:
    """Name of each control, and the words after `rime` that train it, without its folder.

    One after the other, since the first may have measured what the next one needs.

    Args:
        stage: Of the run.
        folder: Of the run.
        skip: Controls to leave out.
        seeds: The same run with each seed, where seconds are compared.
    """
    config = ["--config", str(folder / "config.yaml"), "--ckpt_path", "null"]
    if stage == "refine_rl":
        made = _without_reward(folder, config, skip, seeds or [folder])
    else:
        made = {"sft": _other_writing, "cma": _without_alignment}[stage](folder, config, skip)
    return ((name, words) for name, words in made if name not in skip)


def _other_writing(folder: Path, config: list[str], skip: Sequence[str]) -> Controls:
    again = ["sft", "fit", *config]
    bare = ["--data.annotated_share", "1e-9", "--data.rewrites", "unannotated"]
    yield "disc_only", [*again, *bare, "--data.require_rewrites", "false"]
    yield "pause", [*again, "--data.written", "pause"]
    if {"cot", "cot_tokens"} <= set(skip):
        return
    budget, share = _room_for_steps(folder)
    cot = [*again, "--data.written", "cot", "--model.backbone.prompt.max_rewrite_tokens", str(budget)]
    length = str(round(manifest_of(folder)["steps"] * share))
    yield "cot_tokens", [*cot, "--data.steps_per_epoch", length, "--trainer.max_epochs", "1"]
    yield "cot", cot


def _without_alignment(folder: Path, config: list[str], skip: Sequence[str]) -> Controls:
    again = ["cma", "fit", *config]
    yield "control", [*again, "--model.lambda_cma", "0", "--model.lambda_dec", "0"]
    yield "plain", [*again, "--model.lambda_dec", "0"]


def _without_reward(folder: Path, config: list[str], skip: Sequence[str], seeds: Sequence[Path]) -> Controls:
    before = previous_run(folder)
    further = ["cma", "fit", "--config", str(before / "config.yaml"), "--ckpt_path", "null"]
    further += ["--model.init_adapter_from", str(before / "adapter"), "--trainer.max_epochs", "1"]
    further += ["--data.steps_per_epoch"]
    steps, again = int(manifest_of(folder)["steps"]), ["refine-rl", "fit", *config]
    rollouts = ["--model.anchors", "rollouts", "--model.sides", "both"]
    ancestor = [*rollouts, "--model.reward", "rank_margin", "--model.embedder", "policy"]
    yield "further_steps", [*further, str(steps)]
    yield "shuffled", [*again, "--model.shuffle_rewards", "true"]
    if "further_seconds" not in skip:  # a step's own time, not the load of the machine: of two runs a seed
        threads = read_variant(seeds[0])["threads"]
        reinforced = [run for seed in seeds for run in (seed, seed / "controls" / "shuffled")]
        aligned = [run for seed in seeds for run in (previous_run(seed), seed / "controls" / "further_steps")]
        ratio = fastest_step(reinforced, threads) / fastest_step(aligned, threads)
        yield "further_seconds", [*further, str(max(1, round(steps * ratio)))]
    yield "batch_anchors", [*again, "--model.num_anchors", "0"]
    yield "rollout_anchors", [*again, *rollouts]
    yield "ancestor", [*again, *ancestor, "--model.scaling", "std", "--model.min_spread", "0"]


def _room_for_steps(folder: Path, num_pairs: int = 512) -> tuple[int, float]:
    """Budget of tokens that the corpus' steps need; tokens of a pair with the rewrite over with the steps."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    data, backbone = config["data"], config["model"]["backbone"]
    prompt = PromptConfig(**backbone["prompt"] | {"max_rewrite_tokens": 1 << 20})
    processor = RimeProcessor.from_pretrained(backbone["name_or_path"], prompt)
    entries = [e for e in read_split(data["path"], "train") if e.dataset in (data["tasks"] or [e.dataset])]
    entries = entries[:: max(1, len(entries) // num_pairs)]
    tokens, longest = {}, 0
    for written in ("rewrite", "cot"):
        reader = ShardReader(entries, written=cast(Written, written))
        batches = (processor.training_batch([reader.read(n)]) for n in range(len(entries)))
        lengths = torch.stack([side.lengths()[0] for b in batches for side in (b.query, b.target)])
        tokens[written], longest = int(lengths.sum()), int(lengths[:, 1].max())
    return 2 * longest, tokens["rewrite"] / tokens["cot"]


def train_controls(stage: str, folders: list[Path], skip: list[str]) -> list[Variants]:
    """Run what is missing of the controls beside each seed's run; a finished one is taken as it is."""
    seeds: list[Variants] = [{} if stage == "sft" else {"before": previous_run(one)} for one in folders]
    # one control of all seeds, then the next: what it measured counts for all alike
    for turn in zip(*(controls(stage, one, skip, folders) for one in folders), strict=True):
        for folder, variants, (name, words) in zip(folders, seeds, turn, strict=True):
            variants[name] = folder / "controls" / name
            if not RunFolder(variants[name]).finished:
                _train(folder, name, [*words, "--run_dir", str(variants[name])])
        refuse_unlike([variants[name] for variants in seeds])
    return [
        variants | {COMPARISONS[stage].subject: one} for one, variants in zip(folders, seeds, strict=True)
    ]


def refuse_unlike(folders: list[Path]) -> None:
    """Seeds are averaged over runs of one length; a control may be left from a comparison of fewer seeds."""
    steps = {folder: manifest_of(folder)["steps"] for folder in folders}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"{folder}: {count}" for folder, count in steps.items())
        raise RimeError(
            f"runs of unlike numbers of steps are not averaged: {told}. Of a control, remove the folders and "
            "compare again."
        )


def _train(folder: Path, name: str, words: list[str]) -> None:
    if subprocess.run([sys.executable, "-m", "rime_pl.__main__", *words]).returncode:
        raise RimeError(
            f"--run {folder}: the control {name!r} failed (its message is above). The others are kept; "
            f"`--skip {name}` goes on without it."
        )


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a run that a comparison needs."""
    if not (folder / "manifest.json").is_file():
        raise RimeError(
            f"{folder}: no manifest.json here. A comparison needs this run's folder where it was; relative "
            "paths count from the folder that the runs were started in."
        )
    return dict(json.loads((folder / "manifest.json").read_text()))


def previous_run(folder: Path) -> Path:
    """The run whose adapter a run started from."""
    import yaml

    adapter = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_adapter_from"]
    if not adapter:
        raise RimeError(
            f"--run {folder}: it started from no adapter (model.init_adapter_from), so there is no before."
        )
    return Path(adapter).parent


def fastest_step(folders: list[Path], threads: int | None) -> float:
    """Seconds of a step in the least disturbed of the runs that are there and took as many threads."""
    runs = [read_variant(folder) for folder in folders if RunFolder(folder).finished]
    timed = [run["seconds_per_step"] for run in runs if run["threads"] == threads]
    if not any(timed):
        raise RimeError(
            f"--run {folders[0]}: neither it nor a control beside it was timed with num_threads={threads}, "
            "as the runs of --run were (a run that was resumed after its last step is not timed at all). "
            "Add --skip further_seconds."
        )
    return min(filter(None, timed))


def read_variant(folder: Path) -> dict[str, Any]:
    """The numbers of one run, as its summary has them, and its seconds per step."""
    manifest, summary = manifest_of(folder), json.loads((folder / "summary.json").read_text())
    steps = manifest.get("steps_timed", manifest["steps"])  # fewer than all when the run was resumed
    step = summary["seconds"]["fit"] / steps if steps else None
    return {
        "seed": manifest["seed"],
        "recall@1": summary["after"]["recall@1"],
        "trace": summary["after"]["trace"],
        "rewrite": summary["after"]["rewrite"],
        "crossed": summary["after"].get("crossed"),
        "curves": curve_means(folder),
        "per_task": {task: values["recall@1"] for task, values in summary["per_task"].items()},
        "gallery": summary["gallery"],
        "chance": summary["chance"],
        "seconds_per_step": step,
        "steps": manifest["steps"],
        "threads": manifest.get("device", {}).get("threads"),
    }


def pooled_difference(
    seeds: list[Variants], first: str, second: str, pair: str, other_pair: str | None = None
) -> dict[str, Any]:
    """recall@1 of one variant minus another: mean, 95 % interval, each seed.

    The seeds share their queries. So a query is resampled with what all seeds made of it.
    """
    hits = [(headline_hits(v[second], other_pair or pair), headline_hits(v[first], pair)) for v in seeds]
    tasks = sorted(hits[0][0])
    low, high = (
        [torch.stack([of_seed[which][task] for of_seed in hits]).mean(0) for task in tasks]
        for which in (0, 1)
    )
    mean, lower, upper = paired_bootstrap(low, high)
    of_seeds = [macro_mean(list(b.values())) - macro_mean(list(a.values())) for a, b in hits]
    return {"mean": mean, "lower": lower, "upper": upper, "seeds": of_seeds}


def headline_hits(folder: Path, pair: str) -> dict[str, Tensor]:
    """Per headline task, for each test query in a fixed order, 1 where the right answer ranked first.

    For the mean of the modes: the share of them in which it did.
    """
    import yaml

    headline = yaml.safe_load((folder / "config.yaml").read_text())["recall"]["headline_tasks"]
    rows = sorted(json.loads((folder / "ranks.json").read_text()), key=lambda row: row["key"])
    names = headline or sorted({row["task"] for row in rows})
    if pair != MEAN and not all(pair in row["ranks"] for row in rows):
        raise RimeError(
            f"{folder}/ranks.json has no {pair}: it was written by an older version; train it again."
        )
    pairs = MODE_PAIRS if pair == MEAN else (pair,)
    return {
        name: torch.tensor([[row["ranks"][p] == 1.0 for p in pairs] for row in rows if row["task"] == name])
        .float()
        .mean(1)
        for name in names
    }
