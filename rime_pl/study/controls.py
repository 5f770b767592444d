"""The controls of a run: what each one changes, and their training. Called by `rime compare`.

A control is the run's own command with a few settings changed. It takes the same number of training steps
unless its name says otherwise, and lies in ``controls/`` of the run. A finished control is not trained again.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import yaml
from torch import Tensor

from rime_pl.datamodules.annotation import CompletionKind
from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.shards import ShardReader
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.run_folder import RunFolder
from rime_pl.study.design import COMPARISONS, OF_TIME
from rime_pl.study.measure import Variants, refuse_unlike

Commands = Iterator[tuple[str, list[str]]]  # name of a control, and the words after `rime` that train it


def train_controls(
    runs: Sequence[RunFolder], skip: Sequence[str] = (), lambda_ce: float | None = None
) -> list[Variants]:
    """Train the missing controls of finished runs, one per seed, and return all variants of each seed.

    Args:
        runs: One for each seed.
        skip: Controls to leave out.
        lambda_ce: Weight of the cross-entropy with a chain of thought (default: that of the runs).
    """
    for run in runs:
        if not run.finished:
            raise RimeError(
                f"--run must name finished runs, but {run.path} has no done.json. Run `make train-sft`, "
                "`make train-cma` or `make train-refine-rl` first."
            )
        run.need_both_modes()  # before its controls are trained
    stage, *others = {run.stage for run in runs}
    if others or stage not in COMPARISONS:
        raise RimeError(
            f"--run must name runs of one stage, but names runs of {', '.join(sorted([stage, *others]))}."
        )
    subject = COMPARISONS[stage].subject
    names = [name for name in COMPARISONS[stage].variants if name not in ("before", subject)]
    if unknown := set(skip) - set(names):
        raise RimeError(f"--skip must name controls ({', '.join(names)}), but names {', '.join(unknown)}.")
    seeds: list[Variants] = [{} if stage == "sft" else {"before": run_before(run)} for run in runs]
    # one control of all seeds, then the next: the length of a later one may be measured on an earlier one
    for turn in zip(*(commands(run, skip, runs, lambda_ce) for run in runs), strict=True):
        if (name := turn[0][0]) in skip:
            continue
        for run, variants, (_, words) in zip(runs, seeds, turn, strict=True):
            variants[name] = train_control(run, name, words)
        if name not in OF_TIME:
            refuse_unlike((str(one[name].path), one[name].manifest["steps"]) for one in seeds)
    return [variants | {subject: run} for run, variants in zip(runs, seeds, strict=True)]


def train_control(run: RunFolder, name: str, words: list[str]) -> RunFolder:
    """Return a control of a run, trained if it is not finished.

    Raises:
        RimeError: If it fails, or if it was trained with another model or loss than ``words`` say.
    """
    control = run.control(name)
    if not control.finished:
        _train(run, name, [*words, "--run_dir", str(control.path)])
        return control
    for option, word in pairwise(words):
        wanted = yaml.safe_load(word) if option.startswith("--model.") else None
        found: object = control.settings if wanted is not None else None
        for part in option[2:].split(".") if wanted is not None else ():
            found = found.get(part) if isinstance(found, dict) else None
        if found != wanted:
            raise RimeError(
                f"{control.path} must have been trained with {option} {word}, but was with {found}. Delete "
                "the folder and give the command again."
            )
    return control


def _train(run: RunFolder, name: str, words: list[str]) -> None:
    if subprocess.run([sys.executable, "-m", "rime_pl.__main__", *words]).returncode:
        raise RimeError(
            f"the control {name} of {run.path} failed; its message is above. Finished controls are kept. Add "
            f"`--skip {name}` to go on without it."
        )


def run_before(run: RunFolder) -> RunFolder:
    """Return the run whose adapter a run started from."""
    if (before := run.before()) is None:
        raise RimeError(f"{run.path} must start from the adapter of an earlier stage, but started from none.")
    return before


def commands(
    run: RunFolder, skip: Sequence[str], seeds: Sequence[RunFolder], lambda_ce: float | None = None
) -> Commands:
    """Yield each control of a run; what controls in ``skip`` alone need is not measured.

    The step times of all ``seeds`` of the run decide how long "the same time" is. ``lambda_ce`` is the weight
    of the cross-entropy with a chain of thought; None is that of the run.
    """
    words = again(run)
    if run.stage == "cma":
        yield "further_sft", [*words, "--model.lambda_cma", "0", "--model.lambda_dec", "0"]
        yield "without_decisive", [*words, "--model.lambda_dec", "0"]
    elif run.stage == "refine_rl":
        yield from _of_refine_rl(run, skip, seeds)
    else:
        yield "discriminative_only", [*words, "--data.rewrites", "none"]
        yield "filler_tokens", [*words, "--data.completion", "filler"]
        if "latent_tokens" not in skip:
            latent = ["--model.backbone.prompt.num_latent_tokens", str(rewrite_length(run))]
            yield "latent_tokens", [*words, *latent, "--model.lambda_ce", "0"]
        if not {"chain_of_thought", "chain_of_thought_same_tokens"} <= set(skip):
            longer, share = longer_completions(run)
            longer = [*words, *longer]
            longer += [] if lambda_ce is None else ["--model.lambda_ce", str(lambda_ce)]
            steps = ["--data.steps_per_epoch", str(round(run.manifest["steps"] * share))]
            yield "chain_of_thought_same_tokens", [*longer, *steps, "--trainer.max_epochs", "1"]
            yield "chain_of_thought", longer


def again(run: RunFolder) -> list[str]:
    """Return the words that train a run again, from the start; settings that differ follow."""
    return [run.stage.replace("_", "-"), "fit", "--config", str(run.config), "--ckpt_path", "null"]


def longer_completions(run: RunFolder) -> tuple[list[str], float]:
    """Return the settings of a run that writes a chain of thought, and its steps' share for equal tokens."""
    longest, share = chain_of_thought_lengths(run)
    budget = ["--model.backbone.prompt.max_rewrite_tokens", str(2 * longest)]
    return ["--data.completion", "cot", *budget], share


def _of_refine_rl(run: RunFolder, skip: Sequence[str], seeds: Sequence[RunFolder]) -> Commands:
    before, steps = run_before(run), int(run.manifest["steps"])
    further = ["cma", "fit", "--config", str(before.config), "--ckpt_path", "null"]
    further += ["--model.init_adapter_from", str(before.adapter), "--trainer.max_epochs", "1"]
    further += ["--data.steps_per_epoch"]
    yield "further_cma", [*further, str(steps)]
    yield "shuffled_rewards", [*again(run), "--model.reward.shuffle", "true"]
    if "further_cma_same_seconds" not in skip:
        # the fastest of all runs of a kind shows what a step costs, and not what else the machine did
        rl = [one for seed in seeds for one in (seed, seed.control("shuffled_rewards"))]
        cma = [one for seed in seeds for one in (run_before(seed), seed.control("further_cma"))]
        ratio = fastest_step(rl, seeds[0].threads) / fastest_step(cma, seeds[0].threads)
        yield "further_cma_same_seconds", [*further, str(max(1, round(steps * ratio)))]
    yield "batch_anchors", [*again(run), "--model.reward.num_anchors", "0"]
    yield "greedy_anchors", [*again(run), "--model.reward.anchors", "greedy"]
    rollouts = [*again(run), "--model.reward.anchors", "rollouts", "--model.rollouts.sides", "both"]
    yield "rollout_anchors", rollouts
    ume_r1 = ["--model.reward.form", "rank_margin", "--model.reward.embedder", "policy"]
    ume_r1 += ["--model.advantages.scaling", "std", "--model.advantages.min_spread", "0"]
    yield "ume_r1", [*rollouts, *ume_r1]


def fastest_step(runs: Sequence[RunFolder], threads: int | None) -> float:
    """Return the seconds of a step in the fastest of the finished runs with this number of threads."""
    timed = [run.seconds_per_step for run in runs if run.finished and run.threads == threads]
    if not any(timed):
        raise RimeError(
            f"{runs[0].path} or one of its controls must be timed with num_threads={threads}, as the runs of "
            "--run were, but none is. A run that was resumed after its last step is not timed. Add `--skip "
            "further_cma_same_seconds` to go on without this control."
        )
    return min(filter(None, timed))


def chain_of_thought_lengths(run: RunFolder) -> tuple[int, float]:
    """Return the longest completion in tokens, and the share of tokens left in a pair without its steps."""
    short, long = training_lengths(run), training_lengths(run, "cot")
    return int(torch.cat([short, long])[:, 1].max()), int(short.sum()) / int(long.sum())


def rewrite_length(run: RunFolder) -> int:
    """Return the mean number of tokens of a training rewrite, rounded up."""
    return max(1, math.ceil(float(training_lengths(run)[:, 1].float().mean()) - 2))  # <gen_emb>, end of turn


def training_lengths(run: RunFolder, completion: CompletionKind = "rewrite", num_pairs: int = 512) -> Tensor:
    """Return the tokens of prompt and completion, (N, 2) int64, of both sides of ``num_pairs`` pairs."""
    data, backbone = run.settings["data"], run.settings["model"]["backbone"]
    prompt = PromptConfig(**backbone["prompt"] | {"max_rewrite_tokens": 1 << 20})
    processor = RimeProcessor.from_pretrained(backbone["name_or_path"], prompt)
    entries = Corpora.of(data["path"]).train(data["tasks"] or None)
    entries = entries[:: max(1, len(entries) // num_pairs)]
    reader = ShardReader(entries, completion=completion)
    batches = (processor.training_batch([reader.read(n)]) for n in range(len(entries)))
    return torch.cat([side.lengths() for batch in batches for side in batch.sides])
