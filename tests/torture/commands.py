"""The same mutated inputs, given to the real commands in processes of their own."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from rime_pl.errors import RimeError
from tests.stages.runs import ROOT
from tests.torture import corpora, pictures, reports, runs, settings, tables
from tests.torture.sources import Sources
from tests.torture.watched import SECONDS, Case, Reading, digest

Words = Callable[[Path], Sequence[str]]


def cases(sources: Sources, count: int, rng: random.Random) -> list[Case]:
    """Return cases of all kinds by turns, each with a command that a user would give."""
    kinds = [
        _tables(rng),
        _corpora("tars", sources, rng),
        _settings(sources, rng),
        _adapters(sources, rng),
        _pictures(sources, rng),
        _corpora("indices", sources, rng),
        _checkpoints(sources, rng),
        _reports(sources, rng),
    ]
    return list(islice((case for turn in zip(*kinds, strict=False) for case in turn), count))


def _case(what: str, write: Callable[[Path], object], words: Words, *names: str) -> Case:
    return Case(what, write, lambda folder: rime(words(folder), folder), names)


def rime(words: Sequence[str], folder: Path) -> Reading:
    """Run `rime` and return what it said of faults.

    Raises:
        RimeError: If the command refused the input; the message is what it printed.
        AssertionError: If it printed a traceback, or ended otherwise than it may.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rime_pl", *words]
    done = subprocess.run(
        command,
        env=env,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS * 3,
    )
    everything = done.stdout + done.stderr
    assert "Traceback" not in everything, everything
    assert done.returncode in (0, 1, 2), f"exit code {done.returncode}: {everything}"
    if done.returncode == 2:
        raise RimeError(done.stderr)
    told = re.findall(r"^.*(?:damaged|problem|broken|must|cannot).*$", everything, re.MULTILINE)
    return Reading(digest(done.stdout), (everything,) if done.returncode == 1 or told else ())


def _sample(everything: list, rng: random.Random) -> list:
    return rng.sample(everything, 8)


def _tables(rng: random.Random) -> list[Case]:
    found = []
    for n, (what, name, data) in enumerate(_sample(list(islice(tables.table_changes(rng), 150)), rng)):

        def write(folder: Path, name: str = name, data: bytes = data) -> None:
            tables.make(folder, name, data)

        def words(folder: Path, name: str = name, check: bool = n % 2 == 0) -> Sequence[str]:
            table = ("--table", str(folder / name))
            action = ("check", *table) if check else ("folder", *table, "--output", str(folder / "built"))
            return ["shards", *action]

        found.append(_case(f"shards: {what}", write, words, name, "--table"))
    return found


def _corpora(kind: str, sources: Sources, rng: random.Random) -> list[Case]:
    make = corpora.tar_changes(rng) if kind == "tars" else corpora.index_changes(sources.colours, rng)
    found = []
    for n, (what, change) in enumerate(_sample(list(islice(make, 150)), rng)):

        def write(folder: Path, change: Callable[[Path], object] = change) -> None:
            shutil.copytree(sources.colours, folder / "corpus")
            change(folder / "corpus")

        def words(folder: Path, check: bool = n % 2 == 0) -> Sequence[str]:
            corpus = str(folder / "corpus")
            if check:
                return ["shards", "check", "--path", corpus, "--batch_size", "4"]
            train = sources.arguments(folder / "run", "--data.path", corpus, "--trainer.max_epochs", "1")
            return [*train, "--recall.headline_tasks", "null"]

        command = "shards check" if n % 2 == 0 else "sft fit"
        found.append(_case(f"{command}: {what}", write, words, *corpora.NAMES))
    return found


def _settings(sources: Sources, rng: random.Random) -> list[Case]:
    values = settings.source(sources)
    changes = islice(settings.changes(values, rng), 190)
    found = []
    for what, data, _ in _sample(list(changes), rng):

        def write(folder: Path, data: bytes = data) -> None:
            (folder / settings.FILE).write_bytes(data)

        def words(folder: Path) -> Sequence[str]:
            run = (
                "--run_dir",
                str(folder / "run"),
                "--data.steps_per_epoch",
                "1",
                "--trainer.max_epochs",
                "1",
            )
            return ["sft", "fit", "--config", str(folder / settings.FILE), *run]

        found.append(_case(f"sft fit: {what}", write, words, settings.FILE, *settings.names_of(values)))
    return found


def _adapters(sources: Sources, rng: random.Random) -> list[Case]:
    found = []
    changes = list(islice(runs.adapter_changes(sources.run.adapter, rng), 140))
    for n, (what, change, _) in enumerate(_sample(changes, rng)):

        def write(folder: Path, change: Callable[[Path], object] = change) -> None:
            shutil.copytree(sources.run.path, folder / "sft", ignore=shutil.ignore_patterns("checkpoints"))
            change(folder / "sft/adapter")

        def words(folder: Path, doctor: bool = n % 2 == 0) -> Sequence[str]:
            if doctor:
                return ["doctor", "--adapter", str(folder / "sft")]
            output = ("--output", str(folder / "found.png"), "--mode", "discriminative")
            return ["search", runs.QUERY, "--run", str(folder / "sft"), *output]

        found.append(_case(f"{('doctor', 'search')[n % 2]}: {what}", write, words, "inside/sft"))
    return found


def _pictures(sources: Sources, rng: random.Random) -> list[Case]:
    found = []
    files = pictures.sources()
    for what, name, data in islice(pictures.damaged(files, rng), 3, 200, 25):

        def write(folder: Path, name: str = name, data: bytes = data) -> None:
            shutil.copytree(sources.run.path, folder / "sft", ignore=shutil.ignore_patterns("checkpoints"))
            (folder / "pictures").mkdir()
            (folder / "pictures" / name).write_bytes(data)
            (folder / "pictures/good.png").write_bytes(files["plain.png"])

        def words(folder: Path) -> Sequence[str]:
            images = ("--images", str(folder / "pictures"), "--mode", "discriminative")
            output = ("--output", str(folder / "found.png"))
            return ["search", runs.QUERY, "--run", str(folder / "sft"), *images, *output]

        found.append(_case(f"search: {what}", write, words, name))
    return found


def _checkpoints(sources: Sources, rng: random.Random) -> list[Case]:
    found = []
    changes = list(islice(runs.checkpoint_changes(sources.halfway.last_checkpoint, rng), 90))
    for what, change, _ in _sample(changes, rng):

        def write(folder: Path, change: Callable[[Path], object] = change) -> None:
            shutil.copytree(sources.halfway.path, folder / "sft")
            change(folder / "sft/checkpoints/last.ckpt")

        def words(folder: Path) -> Sequence[str]:
            return sources.arguments(folder / "sft", "--trainer.max_epochs", "1")

        found.append(_case(f"sft fit: {what}", write, words, "inside/sft", "model.", "data.", "trainer."))
    return found


def _reports(sources: Sources, rng: random.Random) -> list[Case]:
    found = []
    changes = list(islice(reports.changes(sources.reports / reports.CMA, rng), 120))
    for n, (what, change) in enumerate(_sample(changes, rng)):

        def write(folder: Path, change: Callable[[Path], object] = change) -> None:
            reports.copy(sources.reports, folder, change)

        def words(folder: Path, compare: bool = n % 2 == 0) -> Sequence[str]:
            if compare:
                output = ("--output", str(folder / "compared"))
                return ["compare", "--run", str(folder / reports.CMA), *output]
            return ["runs", str(folder / "runs")]

        found.append(_case(f"{('compare', 'runs')[n % 2]}: {what}", write, words, *reports.FILES, "inside"))
    return found
