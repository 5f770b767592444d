"""Compares a run that was killed with one that was not, and looks at what a kill leaves. Used by kills.py."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # of its server

from rime_pl.checkpoints import global_step
from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from rime_pl.run_lock import holder

#: Parts of the names of what depends on clock and memory: it must be there, its values are never equal.
MEASURED = ("seconds", "per_second", "peak_memory", "hparams")

Rows = dict[str, list[tuple[int, Any]]]


#: Kinds of faults: adapters that differ, values of curves, locks, files, and everything else.
KINDS = ("different", "lost", "repeated", "locks", "left", "others")


@dataclass
class Verdict:
    """What was found wrong: how much of each kind, and each fault in words."""

    found: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def tell(self, words: str, kind: str = "others", count: int = 1) -> None:
        self.found[kind] += count
        self.told.append(words)

    def add(self, other: Verdict) -> None:
        self.found += other.found
        self.told += other.told


@dataclass
class Row:
    """What happened to the runs of one stage."""

    stage: str
    wanted: int  # kills in all
    typed_wanted: int  # of these, of a typed command
    kills: Counter[str] = field(default_factory=Counter)  # name of the signal -> number
    hit: Counter[str] = field(default_factory=Counter)  # phase -> number
    runs: int = 0
    typed: int = 0  # kills of a typed command
    slowest: float = 0.0  # seconds from a signal to the end
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def more(self) -> bool:
        return self.kills.total() < self.wanted


def after_kill(run: RunFolder, step: int, verdict: Verdict) -> int:
    """Look at the folder of a run that was just killed; return the step of its checkpoint.

    Args:
        run: Folder of the run.
        step: Step of the checkpoint before this start; 0 if there was none.
        verdict: What is wrong is added to it.
    """
    if other := holder(run):
        verdict.tell(f"{run}: still locked by {other}", "locks")
    if not run.last_checkpoint.is_file():
        if step:
            verdict.tell(f"{run}: the checkpoint of step {step} is gone")
        return 0
    try:
        found = global_step(run.last_checkpoint)
    except RimeError as error:
        verdict.tell(f"{run}: {error}")
        return step
    if found < step:
        verdict.tell(f"{run}: the checkpoint went back from step {step} to {found}")
    return found


def compare(run: RunFolder, reference: RunFolder, temporary: Path) -> Verdict:
    """Compare a finished run with the undisturbed one.

    Args:
        run, reference: Folders of the runs.
        temporary: The folder that the run had for temporary files; nothing may be left in it.
    """
    verdict = Verdict()
    if not run.finished:
        verdict.tell(f"{run}: not finished")
        return verdict
    if not same_files(run.adapter, reference.adapter):
        verdict.tell(f"{run}: another adapter", "different")
    _compare_logs(run, reference, verdict)
    for name in ("summary.json", "ranks.json"):
        if timeless(_json(run.path / name)) != timeless(_json(reference.path / name)):
            verdict.tell(f"{run}: another {name}")
    if _json(run.path / "manifest.json")["steps"] != _json(reference.path / "manifest.json")["steps"]:
        verdict.tell(f"{run}: another number of steps")
    if run.lock.exists():
        verdict.tell(f"{run}: a lock is left", "locks")
    for name in sorted(names(run.path) - names(reference.path)) + sorted(names(temporary)):
        verdict.tell(f"{run}: {name} is left", "left")
    for name in sorted(names(reference.path) - names(run.path)):
        verdict.tell(f"{run}: {name} is missing")
    return verdict


def same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same files, byte by byte."""
    return names(one) == names(other) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names(one)
    )


def names(folder: Path) -> set[str]:
    """Return the files below a folder; TensorBoard's, which hold time and process in their names, as one."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {"tensorboard/events" if "tfevents" in name else name for name in found}


def measured(name: str) -> bool:
    """Return whether a value depends on clock, memory or the folder of a run."""
    return any(part in name for part in MEASURED)


def timeless(value: Any) -> Any:
    """Return a JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not measured(key)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def rows(run: RunFolder) -> Rows:
    """Return all curves, texts and pictures that TensorBoard shows: name -> (step, value)."""
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    found = {
        tag: [(one.step, one.tensor_proto.SerializeToString()) for one in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    # each start tells the settings once more
    return {tag: sorted(set(values)) if "hparams" in tag else values for tag, values in found.items()}


def _compare_logs(run: RunFolder, reference: RunFolder, verdict: Verdict) -> None:
    mine, theirs = rows(run), rows(reference)
    for tag in sorted(mine.keys() | theirs.keys()):
        counted, wanted = Counter(s for s, _ in mine.get(tag, [])), Counter(s for s, _ in theirs.get(tag, []))
        if lost := wanted - counted:
            verdict.tell(f"{run}: {tag} has no value at step {sorted(lost)}", "lost", lost.total())
        if repeated := counted - wanted:
            told = f"{run}: {tag} has more values than one at step {sorted(repeated)}"
            verdict.tell(told, "repeated", repeated.total())
        if not measured(tag) and dict(mine.get(tag, [])) != dict(theirs.get(tag, [])) and not lost:
            verdict.tell(f"{run}: {tag} has other values")


def _json(path: Path) -> Any:
    return json.loads(path.read_text())
