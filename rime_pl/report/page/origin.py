"""What the runs of a page are: names, state, settings that differ, and their manifests. Called by page.py."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from rime_pl.report.elements import el
from rime_pl.report.page.facts import RunFacts
from rime_pl.report.page.parts import details, flat, of_each, told
from rime_pl.report.table import Table

#: A setting that always differs, and says nothing.
_OWN = "run_dir"


def overview(runs: Sequence[RunFacts]) -> list[Element]:
    """Return what each run is, and what could not be read of it."""
    rows = [
        [
            *(run.letter, run.name, run.stage, run.corpus),
            *(told(run.manifest.get(name, "-")) for name in ("seed", "steps")),
            *(run.state, str(run.manifest.get("created", "-")).partition("T")[0]),
        ]
        for run in runs
    ]
    head = ["run", "folder", "stage", "corpus", "seed", "training steps", "state", "reported"]
    faults = [el("p", f"{run.letter}: {fault}", class_="fault") for run in runs for fault in run.faults]
    return [Table("", head, rows).html(), *faults]


def settings(runs: Sequence[RunFacts]) -> list[Element]:
    """Return the settings in which the runs differ, the departures from the recipe, and all of each run."""
    content = _between(runs) if len(runs) > 1 else []
    return [*content, *of_each(runs, _settings_of)]


def _between(runs: Sequence[RunFacts]) -> list[Element]:
    known = [run for run in runs if run.settings]
    if len(known) < 2:
        return [el("p", "Fewer than two of these runs have a config.yaml, so there is nothing to compare.")]
    flats = [flat(run.settings) for run in known]
    names = dict.fromkeys(name for one in flats for name in one if name != _OWN)
    rows = [[name, *(one.get(name, "-") for one in flats)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return [el("p", "All settings of these runs are equal.")]
    note = "-: the run has no such setting, as that of another stage or version."
    head = ["setting", *(run.letter for run in known)]
    return [Table("Settings in which the runs differ", head, rows, note=note).html()]


def _settings_of(run: RunFacts) -> list[Element]:
    if run.differs is None:
        content = [el("p", "The run was not started by `rime run`, so it has no recipe to differ from.")]
    elif not run.differs:
        content = [el("p", "All settings are those of the recipe.")]
    else:
        rows = [[name, told(one.get("value")), told(one.get("recipe"))] for name, one in run.differs.items()]
        title = "Settings that differ from the recipe"
        content = [Table(title, ["setting", "this run", "recipe"], rows).html()]
    if not run.settings:
        return [*content, el("p", "The run has no config.yaml.")]
    rows = [[name, value] for name, value in flat(run.settings).items()]
    return [*content, details(f"All {len(rows)} settings", Table("", ["setting", "value"], rows).html())]


def manifests(runs: Sequence[RunFacts]) -> list[Element]:
    """Return what each run was made of: code, versions, data, machine, command."""
    return of_each(runs, _manifest_of)


def _manifest_of(run: RunFacts) -> list[Element]:
    if not run.manifest:
        return [el("p", "The run has no manifest.json yet: it is written at the end.")]
    rows = [[name, value] for name, value in flat(run.manifest).items()]
    return [Table("", ["fact", "value"], rows).html()]
