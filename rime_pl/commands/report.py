"""`rime report`: one HTML file about one or several runs, to be read in a browser and to be handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from rime_pl.commands.runs import FILES, find_runs, stage_of, state
from rime_pl.errors import RimeError
from rime_pl.metrics.bootstrap import bootstrap_interval, macro_mean
from rime_pl.options.parser import parse as parse_options
from rime_pl.report.events import Events, read_events
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.page import page
from rime_pl.run_folder import RunFolder, write_text
from rime_pl.study.measure import hits
from rime_pl.types import MODE_PAIRS

#: Runs of a page: of more, pictures are not readable.
MAX_RUNS = 8
T = TypeVar("T")


def parse(command: Callable[..., int], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of ``run``; the runs may be given by their place."""
    by_place = list(takewhile(lambda word: not word.startswith("-"), words))
    return parse_options(command, prog, ["--run", *words] if by_place else words)


def run(*, run: list[Path], output: Path = Path("report.html")) -> int:
    """Write one HTML file about runs: four modes, cost, rewrite ablation, examples, curves, settings.

    The file needs no script and no network. The folders may be given without --run:
    rime report runs/openmoji-tiny-seed0/sft runs/openmoji-tiny-seed0/cma --output report.html

    Args:
        run: Folders of runs, finished or not.
        output: HTML file to write.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise RimeError(f"--output must be the name of an HTML file, such as report.html, but is {output}.")
    if output.is_dir():
        raise RimeError(f"--output must be a file, but {output} is a folder. Use {output / 'report.html'}.")
    runs = checked(run)
    facts = [read(one, chr(ord("A") + number)) for number, one in enumerate(runs)]
    text = page(facts)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, text)
    for one, folder in zip(facts, runs, strict=True):
        for fault in one.faults:
            print(f"warning: run {one.letter}: {fault}")
        if one.intervals.get("before"):
            print(f"run {one.letter}: intervals before it are those of {started_from(folder)}")
    print(f"written: {output} ({len(text) / 1e6:.1f} MB)")
    return 0


def checked(paths: Sequence[Path]) -> list[RunFolder]:
    """Return the runs in some folders; raise a RimeError if one is no run, or given twice."""
    if len(paths) > MAX_RUNS:
        raise RimeError(f"--run must name {MAX_RUNS} runs at most, but names {len(paths)}.")
    if twice := [path for n, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:n]}]:
        raise RimeError(f"--run must name each run once, but names {twice[0]} twice.")
    for path in paths:
        if not path.is_dir():
            raise RimeError(f"--run must name folders of runs, but there is no folder {path}.")
        if not any((path / name).is_file() for name in FILES):
            below = "".join(f"\n  {one}" for one in list(find_runs(path))[:20])
            told = f"These lie below it:{below}" if below else "There is none below it, either."
            raise RimeError(
                f"--run must name folders of runs, but {path} holds no {' or '.join(FILES)}. {told}"
            )
    return [RunFolder(path) for path in paths]


def read(run: RunFolder, letter: str) -> RunFacts:
    """Return all that the page shows of a run; a part that cannot be read is empty, and told."""
    faults: list[str] = []

    def part(reads: Callable[[], T], otherwise: T) -> T:
        try:
            return reads()
        except (RimeError, OSError) as error:
            faults.append(str(error))
            return otherwise

    nothing: dict[str, Any] = {}
    settings = part(lambda: run.settings, nothing) if run.config.is_file() else nothing
    manifest = part(lambda: run.manifest, nothing) if (run.path / "manifest.json").is_file() else nothing
    summary = part(lambda: run.summary, nothing) if (run.path / "summary.json").is_file() else nothing
    no_ranks: list[dict[str, Any]] = []
    ranks = part(lambda: run.ranks, no_ranks) if (run.path / "ranks.json").is_file() else no_ranks
    found = RunFacts(
        letter,
        str(run.path),
        part(lambda: state(run), "damaged"),
        manifest.get("stage") or stage_of(settings),
        Path(str(manifest.get("data") or (settings.get("data") or {}).get("path", "?"))).name,
        manifest,
        settings,
        (part(lambda: run.origin, nothing) or manifest).get("differs_from_recipe"),
        summary,
        part(lambda: read_events(run.path / "tensorboard"), Events()),
        ranks=ranks,
        faults=faults,
    )
    if found.tested and ranks:
        found.intervals = {"after": part(lambda: intervals(run, summary["after"]), nothing)}
        if found.before:
            found.intervals |= {"before": part(lambda: intervals_before(run, summary["before"]), nothing)}
    return found


def intervals_before(run: RunFolder, results: dict[str, Any]) -> dict[str, Any]:
    """Return the intervals of the run that this one started from."""
    before = started_from(run)
    if before is None:
        raise RimeError(
            f"the run that it started from is not at {run.before()}, so its intervals of recall@5 and "
            "recall@10 are unknown."
        )
    return intervals(before, results)


def started_from(run: RunFolder) -> RunFolder | None:
    """Return the run that this one started from; None if it is gone.

    Where both were copied, that is the copy beside this one. A run of the same name that has other results is
    none: then the old place counts.
    """
    if (named := run.before()) is None:
        return None
    beside = RunFolder(run.path.parent / named.path.name)
    there = [one for one in (beside, named) if one.reported]
    same = [one for one in there if _recalls(one.summary["after"]) == _recalls(run.summary["before"])]
    return next(iter([*same, *there]), None)


def _recalls(results: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (results or {}).items() if name.startswith("recall@")}


def intervals(run: RunFolder, results: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the 95 % interval of each recall@k, from the ranks of the test queries.

    Raises:
        RimeError: If the ranks are those of another test than the results.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in (name for name in results if name.startswith("recall@")):
        for pair in (pair for pair in MODE_PAIRS if pair in results[name]):
            right = hits(run, pair, int(name.removeprefix("recall@")))
            if abs(macro_mean(right) - results[name][pair]) > 1e-5:
                raise RimeError(
                    f"{run.path}: ranks.json gives {name} {macro_mean(right):.4f} for {pair}, but the "
                    f"summary says {results[name][pair]:.4f}, so they are of different tests. Intervals of "
                    "recall@5 and recall@10 are left out."
                )
            found.setdefault(name, {})[pair] = bootstrap_interval(right)
    return found
