"""What a run leaves behind, read in one place: manifest, summary, ranks, config, adapter, finished or not.

Used by the command line, by inference, by callbacks, and by the study. A run folder belongs to one stage.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rime_pl.errors import RimeError
from rime_pl.places import places_of, tried
from rime_pl.run_files import read_facts

#: The folder of all runs, relative to the working folder.
RUNS = Path("runs")
#: The folder inside a run that holds its control runs.
CONTROLS = "controls"
#: The file that a run writes last, when all else is written.
MARKER = "done.json"
#: The file that `rime run` writes before a run begins.
ORIGIN = "origin.json"
#: Settings that say where a run lies and what it was made from, and no recipe decides.
OF_RUN = {
    *("run_dir", "seed_everything", "data.path", "data.annotated_seed"),
    *("model.init_adapter_from", "model.backbone.name_or_path"),
}


class RunFolder:
    """The folder of one run of one stage.

    Args:
        path: The folder, e.g. ``runs/openmoji-tiny-seed0/cma``. It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def config(self) -> Path:
        """The complete settings of the run, one YAML file."""
        return self.path / "config.yaml"

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / "adapter"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that an unfinished run is resumed from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def lock(self) -> Path:
        """The file that a process locks while it works in the folder; see run_lock.py."""
        return self.path / "lock.json"

    @property
    def summary_text(self) -> Path:
        """The table of results, as text."""
        return self.path / "summary.txt"

    @property
    def marker(self) -> Path:
        """The file that a run writes last, when all else is written."""
        return self.path / MARKER

    @property
    def finished(self) -> bool:
        """Whether the run has trained, tested (unless data.test_modes is []) and written its report."""
        return self.marker.is_file()

    @property
    def reported(self) -> bool:
        """Whether manifest and summary are there, as they are after `fit` and after `test`."""
        return (self.path / "manifest.json").is_file() and (self.path / "summary.json").is_file()

    @property
    def tested(self) -> bool:
        """Whether a report is there that holds results of the test split."""
        return self.reported and bool(self.summary["after"])

    def need_both_modes(self) -> None:
        """Raise a RimeError unless the test has measured both modes."""
        if "gen-gen" not in self.summary["after"].get("recall@1", {}):
            raise RimeError(
                f"{self.path} must have been tested in both modes, but was trained with data.test_modes "
                f"{self.settings['data'].get('test_modes')}. Train it again with --data.test_modes null."
            )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Who made this run from what: stage, seed, corpus, steps, versions."""
        manifest: dict[str, Any] = self._read("manifest.json")
        return manifest

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The measured results: recalls before and after, rewrite ablation, costs."""
        summary: dict[str, Any] = self._read("summary.json")
        return summary

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """The rank of the right target of each test query, for each mode pair."""
        rows: list[dict[str, Any]] = self._read("ranks.json")
        recall = self.settings.get("recall", {}) if self.config.is_file() else {}
        if unknown := set(recall.get("headline_tasks") or ()) - {row["task"] for row in rows}:
            raise RimeError(
                f"{self.config}: recall.headline_tasks must name tasks in ranks.json, but {sorted(unknown)} "
                "are not there. Train the run again, or put its own config.yaml back."
            )
        return rows

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The complete settings of the run, as plain data."""
        settings: dict[str, Any] = self._read("config.yaml")
        return settings

    @property
    def origin(self) -> dict[str, Any]:
        """What `rime run` wrote before the run began: recipe, differences, start; empty for other runs."""
        origin: dict[str, Any] = self._read(ORIGIN) if (self.path / ORIGIN).is_file() else {}
        return origin

    def before(self) -> RunFolder | None:
        """The run whose adapter this one started from; None if it started from the base model."""
        adapter = self.settings["model"]["init_adapter_from"]
        return RunFolder(Path(adapter).parent) if adapter else None

    def control(self, name: str) -> RunFolder:
        """Return the folder of a control of this run; it need not exist yet."""
        return RunFolder(self.path / CONTROLS / name)

    @property
    def stage(self) -> str:
        """The stage: ``sft``, ``cma`` or ``refine_rl``."""
        return str(self.manifest["stage"])

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that the run used."""
        threads: int | None = self.manifest.get("device", {}).get("threads")
        return threads

    @property
    def seconds_per_step(self) -> float | None:
        """The mean seconds of a training step; None if the run was resumed after its last step."""
        steps = self.manifest.get("steps_timed", self.manifest["steps"])  # fewer than all after a resume
        return self.summary["seconds"]["fit"] / steps if steps else None

    @property
    def corpus(self) -> Path | None:
        """The corpus folder that the run was trained on, also after both were moved; None if it is gone.

        Where a run was copied together with its corpus, both the old and the new corpus may be there. The new
        one is taken if it holds the samples of the training.
        """
        there = [path for path in self.corpus_places() if path.is_dir()]
        wanted = self.manifest.get("data_hash") if there else None
        same = [path for path in there if wanted is not None and wanted == _data_hash(path)]
        return next(iter([*same, *there]), None)

    def corpus_places(self) -> list[Path]:
        """Return where the corpus of the run may be, as seen from the run first; [] if it does not say it."""
        if not (self.path / "manifest.json").is_file() or not (named := self.manifest.get("data")):
            return []
        places = self.manifest.get("data_places") or []
        return tried(sorted(places, key=os.path.isabs), self.path, named)

    def corpus_facts(self, corpus: str | Path) -> dict[str, Any]:
        """Return what the manifest says of where the corpus lies."""
        return {"data": str(corpus), "data_places": places_of(corpus, self.path)}

    def begin(self, settings: dict[str, Any], origin: dict[str, Any]) -> None:
        """Claim the folder for a run that is about to start, so that no other settings take it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / ORIGIN, origin)
        write_text(self.config, yaml.safe_dump(settings, sort_keys=False))

    def give_up(self) -> None:
        """Free a folder that was claimed, where no checkpoint was written; its curves go, too."""
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self.config.unlink(missing_ok=True)
        (self.path / ORIGIN).unlink(missing_ok=True)

    @classmethod
    def newest(cls, folder: str | Path) -> RunFolder:
        """Return the run that finished last, at or below ``folder``; controls are left out.

        Raises:
            RimeError: If there is no finished run with an adapter.
        """
        found = cls._finished(folder)
        if not found:
            raise RimeError(
                f"{folder}: no finished run here or below. Train one with `make train-cma`, or give the "
                "folder of a run."
            )
        return max(found, key=lambda run: run.marker.stat().st_mtime)

    @classmethod
    def with_adapter(cls, folder: str | Path) -> RunFolder:
        """Return the run in ``folder``, finished or not; without an adapter in it, the only run below.

        Raises:
            RimeError: If there is none, or more than one.
        """
        run = cls(folder)
        if run.adapter.is_dir():
            return run
        found = cls._finished(folder)
        if len(found) > 1:
            paths = "".join(f"\n  {run}" for run in sorted(found, key=str))
            raise RimeError(f"{folder} must be one run, but holds {len(found)}. Give one of them:{paths}")
        return found[0] if found else cls.newest(folder)

    @classmethod
    def _finished(cls, folder: str | Path) -> list[RunFolder]:
        """Return the finished runs with an adapter, at or below ``folder``; controls are left out."""
        runs = [cls(marker.parent) for marker in Path(folder).rglob(MARKER)]
        below = {run: run.path.relative_to(folder).parts for run in runs}
        return [run for run in runs if run.adapter.is_dir() and CONTROLS not in below[run]]

    def _need(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise RimeError(
                f"{self.path}: {name} is missing, so this is not the folder of a finished run. Relative "
                "paths count from the folder that the command was started in."
            )
        return file

    def _read(self, name: str) -> Any:
        return read_facts(self._need(name))


def _data_hash(corpus: Path) -> Any:
    """Return the hash of the samples of a corpus; None if its corpus.json does not say it."""
    try:
        about = json.loads((corpus / "corpus.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the corpus tells what is wrong
    return about.get("data_hash") if isinstance(about, dict) else None


def headline_tasks(settings: Mapping[str, Any], tasks: Iterable[str]) -> list[str]:
    """Return the tasks over which the results of a run are means: no memory task, no control.

    Args:
        settings: Of the run.
        tasks: Those that have results.

    Example:
        >>> headline_tasks({"recall": {"memory_tasks": ["seen"]}}, ["seen", "new"])
        ['new']
    """
    recall, there = settings.get("recall") or {}, set(tasks)
    named = there & set(recall.get("headline_tasks") or ())
    return sorted(named or there - set(recall.get("memory_tasks") or ()) or there)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` whole or not at all: a kill while writing leaves no half file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all."""
    half_written = path.with_suffix(".half")
    try:
        half_written.write_text(text)
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)  # where the disk is full
