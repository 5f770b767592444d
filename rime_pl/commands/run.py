"""`rime run STAGE`: train a stage, and before it everything that it needs and that is missing.

A finished run with the same settings is found again, an unfinished one is resumed, and other settings get a
folder of their own. What a stage needs and where it lies is decided in rime_pl/pipeline.py.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rime_pl.backbone.adapters import CONTRACT_FILE, read_contract
from rime_pl.backbone.base_path import check_base
from rime_pl.checkpoints import global_step
from rime_pl.commands.base import made_otherwise
from rime_pl.commands.settings import complete_settings, refuse_untrainable, split_words
from rime_pl.corpus_places import BASE_MARKER, BUILT_IN, find_corpus
from rime_pl.datamodules.corpus_file import CORPUS_FILE, read_corpus
from rime_pl.errors import RimeError, StoppedError
from rime_pl.options.parser import options_of
from rime_pl.options.parser import parse as parse_options
from rime_pl.options.words import nearest, options_given
from rime_pl.pipeline import (
    BASE_OPTIONS,
    Pipeline,
    describe,
    differences,
    find_recipe,
    find_run,
    sort_settings,
    with_few_rewrites,
)
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import claimed, give_up, holder

#: Exit codes of a stage that somebody stopped -> number of the signal.
STOPPED = {code: one for one in (signal.SIGINT, signal.SIGTERM) for code in (128 + one, -one)}


def parse(command: Callable[..., int], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of ``run``: its own options, and every other word as a setting of a stage."""
    names = {*options_of(command), "help"}
    own, settings = split_words(words, names)
    for given in options_given(settings):
        if "." not in given.name and (near := nearest(given.name, names)):
            raise RimeError(f"{given} is not an option of `{prog}`. Did you mean --{near}?")
    return parse_options(command, prog, own) | {"settings": settings}


@dataclass(frozen=True)
class Step:
    """One stage, and the folder of its run."""

    stage: str
    run: RunFolder
    words: list[str]  # of `rime`, without the run's folder
    settings: dict[str, Any]
    origin: dict[str, Any]  # kept in the run's manifest


def run(
    stage: Literal["data", "base", "sft", "cma", "refine-rl", "refine_rl"],
    *,
    corpus: str = "openmoji",
    recipe: str = "tiny",
    seed: int = 0,
    base: str | None = None,
    dry_run: bool = False,
    print_folder: bool = False,
    settings: Sequence[str] = (),
) -> int:
    """Train a stage, and before it everything that it needs and that is missing.

    A finished run with the same settings is found again, and an unfinished one is resumed. Other settings get
    a folder of their own. Settings of the stage follow as they are (--model.temperature 0.1), those of an
    earlier stage with its name in front (--sft.model.temperature 0.1).

    Args:
        stage: Stage to train. data and base make only the corpus, or the tiny base model.
        corpus: Corpus: openmoji, scenes or mini, built on demand into data/, or a folder of shards. A table
            of your own pairs, or the folder that it lies in, is built into data/, too.
        recipe: Recipe: tiny, 2b (12 GB) or 2b-24gb, or a folder with one YAML file for each stage.
        seed: Seed of the tiny base model, the start of LoRA, the order of the data and the annotated pairs,
            not of the corpus. Each seed makes a tiny base model; --base shares one.
        base: Base model of the Qwen-VL family, a folder or a name (default: the one of the recipe, which for
            tiny is made from the training data of the corpus).
        dry_run: Whether to say only what would be done.
        print_folder: Whether to print only the folder of the stage's run.
        settings: Settings of the stages, as words of the command line.
    """
    goal = stage.replace("-", "_")
    name, files = find_recipe(recipe)
    if base is not None and goal != "base":
        check_base(base)
    place, table = find_corpus(corpus)
    pipeline = Pipeline(place, files, name, seed, base, sort_settings(goal, settings), table)
    console = Console(quiet=print_folder, soft_wrap=True, highlight=False, markup=False)
    if goal == "refine_rl":
        pipeline = with_few_rewrites(pipeline, complete_settings)
    # all of them now: a typing error is told before hours of training
    parsed = {one: complete_settings(one, pipeline.words(one)) for one in pipeline.stages_to(goal)}
    _prepare_data(pipeline, only_look := dry_run or print_folder, console)
    _refuse_untrainable(pipeline, parsed)
    place = _prepare_base(pipeline, goal, parsed, only_look, console)
    steps = _train_all(pipeline, parsed, only_look, console)
    if print_folder:
        print(steps[-1][0] if steps else place)
    elif steps and steps[-1][1]:
        console.print(f"\n{steps[-1][0].summary_text.read_text()}")
    return 0


def _refuse_untrainable(pipeline: Pipeline, stages: Iterable[str]) -> None:
    """Tell what own data lack for a stage before a base model is made."""
    if pipeline.corpus.name not in BUILT_IN and (pipeline.corpus / CORPUS_FILE).is_file():
        for stage in stages:
            refuse_untrainable(stage, pipeline.words(stage))


def _train_all(
    pipeline: Pipeline, parsed: dict[str, dict[str, Any]], only_look: bool, console: Console
) -> list[tuple[RunFolder, bool]]:
    """Train what is missing; return each run, and whether it was finished before."""
    steps: list[tuple[RunFolder, bool]] = []
    for stage, values in parsed.items():
        step = _next_step(pipeline, stage, values, steps[-1][0] if steps else None)
        found = step.run.finished
        console.print(_line(step))
        if not found and not only_look:
            _train(step)
        steps.append((step.run, found))
    return steps


def _prepare_data(pipeline: Pipeline, only_look: bool, console: Console) -> None:
    """Build the corpus if it is missing."""
    corpus, table = pipeline.corpus, pipeline.table
    if (corpus / CORPUS_FILE).is_file():
        console.print(f"data: found in {corpus}")
        return
    console.print(f"data: building {corpus}" + (f" from {table}" if table else ""))
    if only_look:
        return
    if table is None:
        _make("data", ["shards", corpus.name, "--output", str(corpus)])
        return
    words = ["shards", "folder", "--table", str(table), "--output", str(corpus)]
    _make("data", words, f" To give options of its own, build it first: rime {' '.join(words)}")


def _prepare_base(
    pipeline: Pipeline, goal: str, parsed: dict[str, dict[str, Any]], only_look: bool, console: Console
) -> Path:
    """Make the tiny base model if it is needed and missing; return the folder of what was asked for."""
    corpus, base = pipeline.corpus, None if pipeline.base else pipeline.tiny_base
    if goal == "base" and base is None:
        named = f"--base {pipeline.base}" if pipeline.base else f"the recipe {pipeline.recipe_name}"
        raise RimeError(f"{named} names a base model, so there is none to make.")
    if goal == "data" or base is None:
        return corpus
    words = ["--data", str(corpus), "--output", str(base), "--seed", str(pipeline.seed)]
    words += BASE_OPTIONS.get(corpus.name, ())
    if threads := next((stage["num_threads"] for stage in parsed.values()), None):
        words += ["--num_threads", str(threads)]
    if (base / BASE_MARKER).is_file():
        console.print(f"base: found in {base}")
        if otherwise := made_otherwise(base, words):
            console.print(f"base: {otherwise}. To make it anew, remove {base}.")
        return base
    console.print(f"base: making {base}")
    if not only_look:
        _make("base", ["base", *words])
    return base


def _next_step(pipeline: Pipeline, stage: str, settings: dict[str, Any], before: RunFolder | None) -> Step:
    """Return what is to be done for one stage, once the run before it is known."""
    words, usual = pipeline.words(stage), pipeline.words(stage, as_recipe=True)
    if base := pipeline.base or pipeline.tiny_base:  # which one is known only since the corpus is there
        settings["model"]["backbone"]["name_or_path"] = str(base)
    differing = differences(settings, complete_settings(stage, usual)) if words != usual else {}
    if before:
        settings["model"]["init_adapter_from"] = str(before.adapter)
    start = _start_of(pipeline.corpus, settings)
    run = find_run(pipeline.folder, stage, settings, start)
    configs = [str(file) for file in pipeline.configs(stage)]
    origin = {"recipe": configs, "differs_from_recipe": differing, **start}
    return Step(
        stage, run, [stage.replace("_", "-"), "fit", *pipeline.words(stage, before)], settings, origin
    )


def _start_of(corpus: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content hashes of corpus, base model and adapter to start from, where they are there."""
    start: dict[str, Any] = {}
    base = Path(settings["model"]["backbone"]["name_or_path"])
    if files := sorted(base.glob("*.safetensors")):
        start["base_files"] = _ends(files)
    if (corpus / CORPUS_FILE).is_file():
        start["data_hash"] = read_corpus(corpus)["data_hash"]
    adapter = settings["model"]["init_adapter_from"]
    if adapter and (Path(adapter) / CONTRACT_FILE).is_file():
        start["start_hash"] = read_contract(adapter)["weights_hash"]
    return start


def _ends(files: Sequence[Path]) -> str:
    """Return a hash of the names, sizes and last MiB of files: quick for large ones, too."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            opened.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size}".encode() + opened.read())
    return digest.hexdigest()


def _line(step: Step) -> str:
    run, checkpoint = step.run, step.run.last_checkpoint
    if run.finished:
        doing = f"found finished in {run}"
    elif process := holder(run):
        doing = f"{run} is in use by {process}"
    elif checkpoint.is_file():
        doing = f"resuming at step {global_step(checkpoint)} in {run}"
    else:
        doing = f"training into {run}"
    return f"{step.stage}: {doing} ({describe(step.origin['differs_from_recipe'])})"


def _train(step: Step) -> None:
    """Train one stage. A failure before anything was trained leaves the folder free for other settings."""
    run = step.run
    with claimed(run):  # for this moment: the stage takes the lock itself
        run.begin(step.settings | {"run_dir": str(run)}, step.origin)
    code = _start([*step.words, "--run_dir", str(run)])
    if run.finished:
        return
    kept = run.last_checkpoint.is_file()
    if not kept:
        give_up(run)
    where = "The same command goes on from there." if kept else "There is no checkpoint yet."
    if code in STOPPED:
        raise StoppedError(f"{step.stage} was stopped. {where}", STOPPED[code])
    its = "" if kept else f" Give a setting to this stage as --{step.stage}.NAME VALUE."
    raise RimeError(f"{step.stage} stopped (exit code {code}). {where}{its}")


def _make(name: str, words: list[str], hint: str = "") -> None:
    code = _start(words)
    if code in STOPPED:
        raise StoppedError(f"{name} was stopped.", STOPPED[code])
    if code:
        raise RimeError(f"{name} stopped (exit code {code}); the reason is above.{hint}")


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a stage. Ctrl-C in a terminal reaches the stage, too, so it ends by itself."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            return process.wait() or 128 + signal.SIGINT
        except KeyboardInterrupt:
            process.terminate()
            return process.wait() or 128 + signal.SIGINT


def _start(words: list[str]) -> int:
    """Run `rime` in a process of its own: seeds, threads and loggers of one stage never reach the next."""
    process = subprocess.Popen([sys.executable, "-m", "rime_pl", *words])
    handler = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return code
