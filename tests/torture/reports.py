"""Mutated files of run folders, and what `rime runs`, `search`, `run` and `compare` read of them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import yaml

from rime_pl.backbone.adapters import CONTRACT_FILE, WEIGHTS_FILE
from rime_pl.commands.runs import find_runs, row
from rime_pl.commands.search import corpus_pictures, corpus_tasks
from rime_pl.errors import RimeError
from rime_pl.pipeline import find_run
from rime_pl.report.tables import summary_tables
from rime_pl.run_folder import RunFolder
from rime_pl.study.comparison import comparison_tables, differences_table
from rime_pl.study.controls import train_controls
from rime_pl.study.measure import seed_result
from rime_pl.study.record import record_of
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION
from tests.study.runs import run_folder
from tests.torture.damage import BYTES, TEXTS, as_json, byte_changes, json_changes
from tests.torture.sources import Sources
from tests.torture.watched import Case, Reading, digest, result_of

CMA = "runs/x/cma"
FILES = ("manifest.json", "summary.json", "ranks.json", "config.yaml", "origin.json")


def build(folder: Path, corpus: Path) -> None:
    """A finished CMA run with its controls and the SFT run before it, in a folder of runs."""
    run = RunFolder(folder / CMA)
    before = run_folder(folder / "runs/x/sft", [1, 2, 1, 1], stage="sft")
    run_folder(run.path, [1, 1, 1, 2], before=before)
    without = {"further_sft": {"lambda_cma": 0, "lambda_dec": 0}, "without_decisive": {"lambda_dec": 0}}
    for name, other in without.items():
        control = run_folder(run.control(name).path, [1, 2, 2, 1], before=before)
        settings = yaml.safe_load(control.config.read_text())
        control.config.write_text(yaml.safe_dump(settings | {"model": settings["model"] | other}))
    (run.path / "origin.json").write_text(json.dumps({"differs_from_recipe": {}, "data_hash": "x"}))
    for one in (before, run):
        one.adapter.mkdir()
        contract = {
            "base": "base",
            "base_hash": "",
            "weights_hash": "",
            "disc_token_id": 1,
            "gen_token_id": 2,
        }
        contract |= {"prompt": {}, "backbone": {"name_or_path": "base"}}
        (one.adapter / CONTRACT_FILE).write_text(json.dumps(contract))
        (one.adapter / WEIGHTS_FILE).touch()
        manifest = json.loads((one.path / "manifest.json").read_text()) | {"data": str(corpus)}
        (one.path / "manifest.json").write_text(json.dumps(manifest | {"data_hash": "x"}))
    whole = json.loads((run.path / "summary.json").read_text())
    after = whole["after"] | {"ci": {pair: [0.4, 0.6] for pair in MODE_PAIRS}, "milliseconds": {}}
    after |= {"oracle": {"recall@1": 0.6}, "recall@5": dict.fromkeys(MODE_PAIRS, 0.9)}
    assert set(after["trace"]) == set(REWRITE_ABLATION)
    facts = {"before": None, "all_gallery": None, "queries": 4, "per_task": {"twin": after | {"gallery": 4}}}
    (run.path / "summary.json").write_text(json.dumps(whole | facts | {"after": after}))


def read(folder: Path) -> Reading:
    """Read the runs as each command does; a damaged one must not hide the others."""
    cells = [row(one, folder / "runs") for one in find_runs(folder / "runs")]
    told = [cell[-1] for cell in cells if cell[4] == "damaged"]
    assert len(cells) == 4 and len(told) < 2, cells
    seen: list[object] = [cells]
    for command in (_search, _tables, _run, _compare):
        try:
            seen.append(command(folder))
        except RimeError as error:
            told.append(str(error))
    return Reading(digest(*map(repr, seen)), tuple(told))


def _search(folder: Path) -> object:
    run = RunFolder.newest(folder / "runs/x/cma")
    return len(corpus_pictures(run)), sorted(corpus_tasks(run)), run.threads, run.seconds_per_step


def _tables(folder: Path) -> object:
    return [table.markdown() for table in summary_tables(RunFolder(folder / CMA).summary)]


def _run(folder: Path) -> object:
    run = RunFolder(folder / CMA)
    before = run.before()
    found = find_run(folder / "runs/x", "cma", run.settings, {"data_hash": "x"})
    return found.path.name, before and before.path.name, run.stage


def _compare(folder: Path) -> object:
    seeds = train_controls([RunFolder(folder / CMA)], [])
    record = record_of(seed_result("cma", variants) for variants in seeds)
    return [table.markdown() for table in (differences_table(record), *comparison_tables(record))]


def changes(original: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield what was changed and the change of the CMA run's folder, without end."""

    def content(name: str, data: bytes) -> Callable[[Path], object]:
        return lambda run: (run / name).write_bytes(data)

    for name in FILES:
        yield f"{name} is missing", lambda run, name=name: (run / name).unlink()
        yield f"{name} is a folder", lambda run, name=name: ((run / name).unlink(), (run / name).mkdir())
        yield f"{name} is a link to itself", lambda run, name=name: _looped(run / name)
    yield "lock.json of noise", content("lock.json", rng.randbytes(50))
    yield "lock.json is a pipe", lambda run: os.mkfifo(run / "lock.json")
    yield "done.json is a folder", lambda run: ((run / "done.json").unlink(), (run / "done.json").mkdir())
    yield "a link to a folder above", lambda run: (run / "above").symlink_to("../../..")
    data = {name: (original / name).read_bytes() for name in FILES}
    values = {
        name: json_changes(yaml.safe_load(one) if name.endswith("yaml") else json.loads(one), rng)
        for name, one in data.items()
    }
    texts = {name: byte_changes(one, rng, TEXTS, BYTES) for name, one in data.items()}
    while True:
        for name in FILES:
            for _ in range(3):
                what, value = next(values[name])
                as_text = as_json(value) if name.endswith("json") else yaml.safe_dump(value).encode()
                yield f"{name}: {what}", content(name, as_text)
            what, text = next(texts[name])
            yield f"{name}: {what}", content(name, text)


def _looped(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def copy(original: Path, place: Path, change: Callable[[Path], object]) -> None:
    """Copy the folder of runs and change the CMA run in it."""
    shutil.copytree(original, place, dirs_exist_ok=True)
    for config in (place / CMA).rglob("config.yaml"):
        settings = yaml.safe_load(config.read_text())
        settings["model"]["init_adapter_from"] = str(place / "runs/x/sft/adapter")
        config.write_text(yaml.safe_dump(settings))
    change(place / CMA)


def cases(sources: Sources, count: int, rng: random.Random, work: Path) -> list[Case]:
    """Return cases that read a folder of runs of which one is changed."""
    folder = sources.reports
    everything = list(islice(changes(folder / CMA, rng), max(count, 120)))
    chosen = everything[:count] if count >= 100 else rng.sample(everything, count)

    def case(what: str, change: Callable[[Path], object]) -> Case:
        return Case(
            what,
            lambda place: copy(folder, place, change),
            read,
            (*FILES, "inside", "lock.json", "corpus.json"),
            original,
        )

    original = ""
    original = result_of(case("nothing", lambda run: None), work)
    return [case(*one) for one in chosen]
