"""`rime runs`: the runs below a folder side by side, whether finished, unfinished or being trained now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rime_pl.errors import RimeError
from rime_pl.options.parser import parse as parse_options
from rime_pl.pipeline import listed
from rime_pl.report.page.parts import flat
from rime_pl.report.table import Table
from rime_pl.run_folder import OF_RUN, RUNS, RunFolder
from rime_pl.run_lock import holder
from rime_pl.types import MODE_PAIRS

#: Each run has one of these from its first moment on.
FILES = ("config.yaml", "manifest.json", "lock.json")
#: Characters in a line, where the output is no terminal.
PLAIN_WIDTH = 140
HEAD = ("run", "stage", "corpus", "seed", "state", *(pair.replace("-", "-\n") for pair in MODE_PAIRS))


def parse(command: Callable[..., int], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of ``run``; the folder may be given by its place, before or behind the options."""
    places = [n for n, word in enumerate(words) if not word.startswith("-")]
    behind = [n for n in places if n == 0 or not words[n - 1].startswith("-") or "=" in words[n - 1]]
    if len(behind) == 1:
        rest = [word for n, word in enumerate(words) if n != behind[0]]
        words = ["--folder", words[behind[0]], *rest]
    return parse_options(command, prog, words)


def run(*, folder: Path = RUNS, against: Path | None = None) -> int:
    """List the runs below a folder: stage, corpus, seed, state, recall@1 of the test split, other settings.

    The folder may be given without --folder: rime runs runs/openmoji-tiny-seed0. With --against a second
    table follows: each recall@1 minus that of one run, with an interval.

    Args:
        folder: Folder of the runs.
        against: Folder of a tested run. The others are compared with it, on the same test queries.
    """
    runs, other = [*find_runs(folder)], None if against is None else tested_run(against)
    changed = recipe_changes(runs)
    rows = [row(one, folder, changed.get(one.path, "")) for one in runs]
    if not rows:
        raise RimeError(f"{folder}: no run here or below. `rime run cma` trains one.")
    table = Table(
        f"Runs in {folder}",
        [*HEAD, "differs from\nthe recipe"],
        rows,
        note="Recalls: recall@1 on the test split, query mode - target mode. ?: not started by `rime run`. "
        "recipe then: the recipe has been edited between these runs; -: it did not have the setting.",
    )
    console = Console()
    console = console if console.is_terminal else Console(width=PLAIN_WIDTH)
    console.print(table.terminal())
    if other is not None:
        from rime_pl.study.against import differences  # here, because it is slow to import

        console.print(differences(((name_of(one, folder), one) for one in runs), other).terminal())
    return 0


def tested_run(folder: Path) -> RunFolder:
    """Return a run that has results on the test split."""
    one = RunFolder(folder)
    if not one.tested:
        raise RimeError(f"--against must name the folder of a tested run, but is {folder}.")
    return one


def find_runs(folder: Path) -> Iterator[RunFolder]:
    """Yield the runs at or below a folder, controls too, sorted by name."""
    for path in sorted({file.parent for name in FILES for file in folder.rglob(name)}):
        if not (path / "index.json").is_file():  # an index has a lock, too
            yield RunFolder(path)


def name_of(one: RunFolder, folder: Path) -> str:
    """Return what a run is called in the tables: its path below the folder."""
    return one.path.name if one.path == folder else str(one.path.relative_to(folder))


def row(one: RunFolder, folder: Path, recipe: str = "") -> list[str]:
    """Return the cells of one run; ``recipe`` is what its recipe said where other runs had other recipes."""
    name = name_of(one, folder)
    try:
        manifest, settings = facts(one)
        recalls = one.summary["after"]["recall@1"] if one.tested else {}
        return [
            name,
            manifest.get("stage") or stage_of(settings),
            Path(str(manifest.get("data") or settings.get("data", {}).get("path", "?"))).name,
            str(manifest.get("seed", settings.get("seed_everything", "?"))),
            state(one),
            *(f"{recalls[pair]:.3f}" if pair in recalls else "-" for pair in MODE_PAIRS),
            "; ".join(part for part in (differing(one, manifest), recipe) if part) or "-",
        ]
    except (RimeError, KeyError, TypeError, AttributeError) as error:  # the other runs are still listed
        return [name, "?", "?", "?", "damaged", *("-" for _ in MODE_PAIRS), str(error)]


def facts(one: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest and the settings of a run, each empty if it is not written yet."""
    return one.manifest if one.reported else {}, one.settings if one.config.is_file() else {}


def state(one: RunFolder) -> str:
    """Return how far a run is."""
    if process := holder(one):
        return f"running (process {process.pid} on {process.host})"
    if one.finished:
        return "finished" if one.tested else "finished, not tested"
    return "tested" if one.reported else "unfinished"


def stage_of(settings: dict[str, Any]) -> str:
    """Return the stage that takes these settings."""
    model = settings.get("model", {})
    marks = {"rollouts": "refine_rl", "lambda_cma": "cma", "lambda_ce": "sft"}
    return next((stage for mark, stage in marks.items() if mark in model), "?")


def recipe_changes(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """Return what the recipe of a run said, where the same recipe of another run said something else.

    A recipe may be edited between two runs. Then neither differs from its own, and yet they are unlike.
    """
    recipes: dict[tuple[str, ...], dict[Path, dict[str, str]]] = {}
    for one in runs:
        try:
            about = one.origin["differs_from_recipe"]
            typed = tuple(f"{name}." for name in about)
            usual = {n: v for n, v in flat(one.settings).items() if not f"{n}.".startswith(typed)}
            usual |= flat({name: each["recipe"] for name, each in about.items()})
            key = stage_of(one.settings), usual["data.path"], *map(str, one.origin.get("recipe") or ())
        except (RimeError, KeyError, TypeError, AttributeError):  # the list says "damaged" or "?"
            continue
        # null stands for a setting that an earlier version did not have, {} for one that was not given
        given = {name: value for name, value in usual.items() if value not in ("null", "{}")}
        of_run = {name: value for name, value in given.items() if name not in OF_RUN}
        recipes.setdefault(key, {})[one.path] = of_run
    found: dict[Path, str] = {}
    for group in recipes.values():
        names = sorted({name for usual in group.values() for name in usual})
        unlike = [name for name in names if len({usual.get(name, "-") for usual in group.values()}) > 1]
        for path, usual in group.items() if unlike else ():
            found[path] = "recipe then: " + ", ".join(f"{name} {usual.get(name, '-')}" for name in unlike)
    return found


def differing(one: RunFolder, manifest: dict[str, Any]) -> str:
    """Return the settings that differ from the recipe; "" if none, ? if nobody knows."""
    found = (one.origin or manifest).get("differs_from_recipe")
    return "?" if found is None else listed(found)
