"""Score a trained model on a local copy of a public benchmark, in any pairs of modes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from rich.progress import TaskID

from rime_pl.bars import Bar
from rime_pl.datamodules.benchmarks.frames import FRAMES
from rime_pl.datamodules.benchmarks.mmeb_v2_table import FIXED, mmeb_v2_table
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.reading import read_tasks, task_names
from rime_pl.datamodules.benchmarks.task import UNUSABLE, BenchmarkTask, MissingTask
from rime_pl.errors import DataError, RimeError
from rime_pl.evaluation.averages import Place
from rime_pl.evaluation.embedding import (
    Asked,
    Digests,
    Embedder,
    Rows,
    make_trainer,
    sides_of,
    store_of,
    versions,
)
from rime_pl.evaluation.official import Metadata
from rime_pl.evaluation.records import Evaluated
from rime_pl.evaluation.results import Results
from rime_pl.evaluation.scoring import check, score
from rime_pl.inference.loading import load
from rime_pl.inference.retriever import Retriever
from rime_pl.metrics.ranking import Ranking
from rime_pl.run_folder import RunFolder
from rime_pl.types import MODE_PAIRS, Mode, Side

#: Folder of the embeddings and of the results, in a run folder.
CACHE, OUTPUT = "benchmark_embeddings", "benchmarks"
_SHOWN = 10  # tasks without a score that the last line names


@dataclass(frozen=True)
class Evaluation:
    """What all benchmarks have in common.

    Args:
        modes: Mode pairs, query - target: disc-disc, gen-gen, gen-disc or disc-gen. All pairs come from one
            pass over each side. With gen, the model writes a rewrite of each item, which takes long
            (default: disc-disc gen-gen).
        tasks: Names of the tasks (default: all of the benchmark).
        output: Folder of the results (default: benchmarks/NAME in the folder of the run). Tasks of earlier
            calls stay in its summaries. A folder with results of other settings is refused.
        cache: Folder of the embeddings (default: benchmark_embeddings in the folder of the run). They are
            kept by content, model and kind of device: a command that was stopped goes on, and an item of
            several tasks is embedded once.
        model_name: Name of the model in the result files (default: the name of the run).
        url: Page of the model, for the report (default: empty).
        release_date: Day when the model was published, such as 2026-11-27, for the report (default: empty).
        batch_size: Largest number of items in a forward.
        accelerator: Kind of device, auto, cpu or gpu (default: auto, gpu if there is one).
        devices: Number of processes, each with a device of its own. They share the parts to embed.
        base: Folder or Hugging Face name of the base model (default: where it was in training).
        limit: Number of queries of each task, for a trial: global pools stay whole, and neither a report
            nor averages are written (default: all).
        wording: Where an instruction stands: parts puts it where training has it, official joins it with
            the text letter for letter as the official code.
    """

    modes: list[str] | None = None
    tasks: list[str] | None = None
    output: Path | None = None
    cache: Path | None = None
    model_name: str | None = None
    url: str = ""
    release_date: str = ""
    batch_size: int = 32
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    base: str | None = None
    limit: int | None = None
    wording: Literal["parts", "official"] = "parts"


def mmeb_v2(*, root: Path, run: Path, pad_clips: bool = False, common: Evaluation = Evaluation()) -> Order:
    """Score a trained model on MMEB-V2: 36 image, 18 video and 24 document tasks.

    Embeddings and results are kept while it runs: a command that was stopped goes on where it was. The output
    has the files of the official code for each pair of modes, the report that the leaderboard takes, and
    result.json with the protocol. A task whose files are missing is named, and there are no averages then.

    Args:
        root: Folder of the local copy, in the official layout.
        run: Folder of the run whose model is scored.
        pad_clips: Whether the last frame of a clip of fewer than 8 frames is repeated, as the official code
            does since 2026-06.
        common: Settings of all benchmarks.
    """
    return Order("mmeb-v2", root, run, common, {"pad_clips": pad_clips})


def mrmr(*, root: Path, run: Path, captions: Path | None = None, common: Evaluation = Evaluation()) -> Order:
    """Score a trained model on MRMR: five data sets of questions that need reasoning.

    Embeddings and results are kept while it runs: a command that was stopped goes on where it was. Which mean
    is the overall number has not been confirmed, so two have names that say what they are.

    Args:
        root: Folder of the local copy, with a folder for each data set.
        run: Folder of the run whose model is scored.
        captions: Folder of the captions, for the setting without pictures (default: pictures are shown).
        common: Settings of all benchmarks.
    """
    return Order("mrmr", root, run, common, {"captions": captions})


def uvrb(*, root: Path, run: Path, common: Evaluation = Evaluation()) -> Order:
    """Score a trained model on UVRB: 16 data sets of video retrieval.

    Embeddings and results are kept while it runs: a command that was stopped goes on where it was.

    Args:
        root: Folder of the local copy, with a folder for each data set.
        run: Folder of the run whose model is scored.
        common: Settings of all benchmarks.
    """
    return Order("uvrb", root, run, common, {})


#: ``rime eval NAME``: the options are the arguments of the function.
SUBCOMMANDS: dict[str, Callable[..., Any]] = {"mmeb-v2": mmeb_v2, "mrmr": mrmr, "uvrb": uvrb}


def run(name: str, options: dict[str, Any]) -> int:
    """Score a model on a benchmark, print the tables and return the exit code: 1 if a task has no score."""
    return SUBCOMMANDS[name](**options).run()


@dataclass(frozen=True)
class Order:
    """What is to be scored, and how."""

    benchmark: str
    root: Path
    run_path: Path
    settings: Evaluation
    reading: Mapping[str, Any]  # options of the reader of this benchmark

    def run(self) -> int:
        """See `run` of this file."""
        pairs = self._checked()
        stage = RunFolder.with_adapter(self.run_path)
        accelerator = self._accelerator()
        tasks = self._tasks()
        rank = os.environ.get("LOCAL_RANK", "0")
        device = "cpu" if accelerator == "cpu" else f"cuda:{rank}"
        model = load(stage.path, device, self.settings.base)
        trainer = make_trainer(accelerator, self.settings.devices)
        results = self._results(stage, model, pairs)
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=rank != "0")
        console.print(f"run: {stage}")
        cache = self.settings.cache or stage.path / CACHE
        names = self._names()
        _claim("--output", results.output)
        _claim("--cache", cache)
        with _bars(console, len(names)) as (one_more, told):
            embedder = Embedder(model, store_of(cache, model), self.settings.batch_size, told)
            for task in tasks:
                fault: MissingTask | None
                if isinstance(task, MissingTask):
                    fault = task
                else:
                    fault = self._evaluate(task, pairs, embedder, trainer, results)
                    for note in task.notes:
                        console.print(f"{task.name}: {note}")
                if fault is not None:
                    results.miss(fault)
                    console.print(str(fault))
                one_more()
        if rank != "0":
            return 0
        results.write()
        for table in results.tables():
            console.print(table.terminal())
        console.print(f"embeddings: {cache}\nresults: {results.output}")
        if without := [name for name in names if name not in results.scored]:
            some = f"{', '.join(without[:_SHOWN])}{', ...' if len(without) > _SHOWN else ''}"
            console.print(f"{len(without)} of {len(names)} tasks have no score from this call: {some}")
        return int(bool(without))

    def _evaluate(
        self,
        task: BenchmarkTask,
        pairs: Sequence[str],
        embedder: Embedder,
        trainer: L.Trainer,
        results: Results,
    ) -> MissingTask | None:
        """Embed a task on all processes; the first one ranks and writes. Return what is wrong with it."""
        try:
            check(task)
            if self.settings.limit:
                task = cut(task, self.settings.limit)
            asked = sides_of(task, pairs)
            found = embedder.embed(trainer, f"{self.benchmark}, {task.name}", asked)
            if trainer.is_global_zero:
                results.add(*rank(task, pairs, asked, found, embedder))
            if task.name in FIXED:
                said = f"only its broken data are there, and were scored as {task.name}"
                return MissingTask(
                    *(task.benchmark, FIXED[task.name], task.modality, task.group, "FILE_N/A", said)
                )
        except DataError as error:  # of its data, so the other tasks go on
            return MissingTask(*(task.benchmark, task.name, task.modality, task.group, UNUSABLE, str(error)))
        return None

    def _checked(self) -> list[str]:
        """Return the pairs of modes, or raise what is wrong with the options before minutes go into them."""
        settings = self.settings
        modes = ["disc-disc", "gen-gen"] if settings.modes is None else settings.modes
        if not modes or (unknown := [name for name in modes if name not in MODE_PAIRS]):
            named = repr(unknown[0]) if modes else "none"
            raise RimeError(
                f"--modes must name mode pairs, query - target, some of {' '.join(MODE_PAIRS)}, but "
                f"names {named}."
            )
        for name in ("batch_size", "devices", "limit"):
            value = getattr(settings, name)
            if value is not None and value < 1:
                raise RimeError(f"--{name} must be 1 or more, but is {value}.")
        if settings.model_name is not None and not re.fullmatch(r"[^/\\\0]*[^/\\\0. ]", settings.model_name):
            raise RimeError(
                f"--model_name must be a name that a file can have, but is {settings.model_name!r}."
            )
        try:
            date.fromisoformat(settings.release_date or "2026-01-01")
        except ValueError as error:
            raise RimeError(
                f"--release_date must be a day such as 2026-11-27, but is {settings.release_date!r}."
            ) from error
        captions = self.reading.get("captions")
        if captions is not None and not captions.is_dir():
            raise RimeError(f"--captions must be a folder, but there is none: {captions}.")
        if settings.tasks is not None and len(set(settings.tasks)) != len(settings.tasks):
            raise RimeError(f"--tasks must name each task once, but names {' '.join(settings.tasks)}.")
        return list(dict.fromkeys(modes))

    def _accelerator(self) -> str:
        """Return "cpu" or "gpu", or raise if there are not so many devices."""
        there = torch.cuda.device_count()
        wanted = self.settings.accelerator
        kind = wanted if wanted != "auto" else "gpu" if there else "cpu"
        if kind == "gpu" and there < self.settings.devices:
            raise RimeError(
                f"--devices must be at most the number of GPUs, {there}, but is {self.settings.devices}. "
                "Give --accelerator cpu, or fewer devices."
            )
        return kind

    def _names(self) -> list[str]:
        return [FIXED.get(name, name) for name in self.settings.tasks or task_names(self.benchmark)]

    def _tasks(self) -> Iterator[BenchmarkTask | MissingTask]:
        options = ReadOptions(wording=self.settings.wording, **self.reading)
        return read_tasks(self.benchmark, self.root, self.settings.tasks, options)

    def _results(self, stage: RunFolder, model: Retriever, pairs: Sequence[str]) -> Results:
        output = self.settings.output or stage.path / OUTPUT / self.benchmark
        network = model.backbone.language_model
        metadata = Metadata(
            self.settings.model_name or "-".join(stage.path.resolve().parts[-2:]),
            str(network.config.model_type),
            round(network.num_parameters() / 1e9, 4),
            model.dimension,
            int(network.config.text_config.max_position_embeddings),
            self.settings.release_date,
            url=self.settings.url,
        )
        prompt = {
            name: value for name, value in asdict(model.backbone.config.prompt).items() if value is not None
        }
        protocol = {
            "benchmark": self.benchmark,
            "weights": hashlib.sha256(model.name.encode()).hexdigest()[:16],
            "model_name": metadata.model_name,
            "modes": sorted(pairs),
            "limit": self.settings.limit,
            "frames": min(FRAMES, model.backbone.processor.prompt.frame_limit),
            "wording": self.settings.wording,
            **{name: None if value is None else str(value) for name, value in self.reading.items()},
            "chat_layout_and_sizes": prompt,
            "vectors": "float32, L2-normalised; scores are dot products in float64",
            "device": str(next(model.backbone.parameters()).device.type),
            "versions": versions(),
        }
        call = {
            "run": str(stage),
            "root": str(self.root),
            "tasks": self._names(),
            "processes": self.settings.devices,
            "batch_size": self.settings.batch_size,
        }
        given = (self.benchmark, output, pairs, metadata, protocol, call)
        return Results(*given, task_names(self.benchmark), self._table(), self.settings.limit)

    def _table(self) -> list[Place]:
        """Return the places of the official report of MMEB-V2; none for the others."""
        if self.benchmark != "mmeb-v2":
            return []
        return [Place(one.modality, one.group, FIXED.get(one.name, one.name)) for one in mmeb_v2_table()]


def _claim(option: str, folder: Path) -> None:
    """Make a folder, or raise before minutes of work would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RimeError(
            f"{option} must be a folder that can be written, but {folder} is not: {error}."
        ) from error


def rank(
    task: BenchmarkTask,
    pairs: Sequence[str],
    asked: tuple[Asked, Asked],
    found: Digests,
    embedder: Embedder,
) -> tuple[Evaluated, dict[str, Ranking]]:
    """Return the scores of a task whose items are embedded, and its ranking in each pair of modes."""
    store = embedder.store
    sides: dict[Side, list[bytes]] = {"query": found.queries, "target": found.candidates}
    short: dict[Mode, str] = {"discriminative": "disc", "generative": "gen"}
    vectors = {
        (one.side, short[mode]): store.vectors(sides[one.side], mode) for one in asked for mode in one.modes
    }
    scored, rankings = {}, {}
    for pair in pairs:
        query, target = pair.split("-")
        scored[pair], rankings[pair] = score(task, pair, vectors["query", query], vectors["target", target])
    cost = {one.side: store.cost(sides[one.side], one.modes) for one in asked}
    return Evaluated(task, scored, cost, found.texts_cut), rankings


def cut(task: BenchmarkTask, limit: int) -> BenchmarkTask:
    """Return a task with its first queries; candidates that no list of theirs names are left out."""
    count = min(limit, len(task.queries))
    rows = range(count)
    changes: dict[str, Any] = {
        "queries": Rows(task.queries, rows),
        "labels": list(task.labels[:count]),
        "categories": list(task.categories[:count]),
        "info": list(task.info[:count]),
        "notes": [*task.notes, f"cut to the first {count} of {len(task.queries)} queries"],
    }
    if task.pools is not None:
        kept = sorted({place for pool in task.pools[:count] for place in pool})
        new = {place: number for number, place in enumerate(kept)}
        changes |= {
            "candidates": Rows(task.candidates, kept),
            "names": [task.names[place] for place in kept],
            "pools": [[new[place] for place in pool] for pool in task.pools[:count]],
            "labels": [
                {new[place]: grade for place, grade in right.items()} for right in task.labels[:count]
            ],
        }
    return replace(task, **changes)


@contextmanager
def _bars(console: Console, tasks: int) -> Iterator[tuple[Callable[[], None], Callable[[int, int], None]]]:
    """Show two bars, the tasks and the items of one, and give what moves each."""
    with Bar(console=console, transient=True, off=console.quiet) as progress:
        whole: TaskID = progress.add_task("tasks", total=tasks)
        items: TaskID = progress.add_task("items to embed", total=None)

        def told(done: int, total: int) -> None:
            progress.update(items, completed=done, total=total)

        yield (lambda: progress.advance(whole)), told
