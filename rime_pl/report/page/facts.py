"""What the report of a run is made from. `rime report` (commands/report.py) reads it and hands it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rime_pl.report.events import Events
from rime_pl.report.summary import Summary

#: "before" or "after" -> "recall@5" -> mode pair -> lower and upper bound of the 95 % interval.
Intervals = Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]
#: Of the runs, in their order: blue, orange, green, pink, violet, brown, grey, cyan.
COLOURS = ("#2f6bde", "#e08a00", "#0f9d76", "#c2417c", "#7a5cd6", "#8a5a2b", "#6b7785", "#0e8fb3")


@dataclass
class RunFacts:
    """One run of the page. A part that the run does not have is empty."""

    letter: str  # A, B, ...: what pictures call it
    name: str  # its folder
    state: str  # such as "finished"
    stage: str
    corpus: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    differs: Mapping[str, Mapping[str, Any]] | None = None  # setting -> value, recipe; None: not known
    summary: Summary = field(default_factory=dict)  # empty if the run has no report yet
    events: Events = field(default_factory=Events)
    intervals: Intervals = field(default_factory=dict)
    ranks: Sequence[Mapping[str, Any]] = ()  # rows of ranks.json
    faults: list[str] = field(default_factory=list)  # what could not be read, and why

    @property
    def tested(self) -> bool:
        """Whether there are results of the test split."""
        return bool(self.summary.get("after"))

    @property
    def before(self) -> Mapping[str, Any] | None:
        """The results of the run that this one started from; None without one."""
        before: Mapping[str, Any] | None = self.summary.get("before")
        return before

    @property
    def colour(self) -> str:
        """The colour of the run in pictures."""
        return COLOURS[(ord(self.letter) - ord("A")) % len(COLOURS)]

    @property
    def heading(self) -> str:
        """What a heading calls the run."""
        return f"{self.letter}: {self.name}"
