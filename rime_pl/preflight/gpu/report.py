"""What `rime gpu-check` saw: as Markdown for docs/reference/gpu.md, and as JSON for machines.

Filled by the parts in rime_pl/gpu; printed and written by the command.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from rime_pl.errors import RimeError

Value = float | str | bool | list[float] | None
#: How a value is shown; "share" is a relative difference, "ratio" a factor.
Unit = Literal["", "s", "ms", "bytes", "share", "ratio", "per second"]
NOT_MEASURED = "not measured"
#: Most characters of an error in a cell; the whole of it is printed when it happens.
_ERROR_LENGTH = 300


@dataclass(frozen=True)
class Figure:
    """One line of a section."""

    key: str  # for machines, unique within its part
    what: str  # for people; never holds a size, so that tables of two machines have the same lines
    value: Value  # None: not measured
    shown: str


@dataclass
class Part:
    """One section: figures as far as they came, and what went wrong."""

    name: str  # as in --only
    title: str
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, key: str, what: str, value: Value, unit: Unit = "", shown: str | None = None) -> None:
        """One more figure.

        Args:
            key, what, value: See :class:`Figure`.
            unit: Of the value.
            shown: Words in place of the value, e.g. why there is none.
        """
        self.figures.append(Figure(key, what, value, show(value, unit) if shown is None else shown))

    def require(self, holds: bool, problem: str) -> None:
        """Without ``holds`` the part has failed, and goes on."""
        if not holds:
            self.problems.append(problem)

    @contextmanager
    def attempt(self, what: str = "") -> Iterator[None]:
        """An error inside is written down, and what comes after goes on."""
        try:
            yield
        except Exception as error:  # whatever it is: one part must not take the others with it
            traceback.print_exc()
            kind = "" if isinstance(error, RimeError) else f"{type(error).__name__}: "
            self.problems.append(f"{what}{': ' if what else ''}{kind}{error}")


def show(value: Value, unit: Unit = "") -> str:
    """A value for people.

    Example:
        >>> show(3 * 2**29, "bytes"), show(0.0312, "s"), show(-0.042, "share"), show(None, "s")
        ('1.50 GiB', '0.0312 s', '-4.2 %', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"{number:.3f}" for number in value)
    if isinstance(value, str):
        return value
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "share":
        return f"{100 * value:+.1f} %"
    if unit == "ratio":
        return f"{value:.2f}"
    if unit == "per second":
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    if unit:
        return f"{value:.3g} {unit}"
    return f"{value:,}"


def markdown(environment: Mapping[str, Value], parts: Sequence[Part]) -> str:
    """The machine first, then a section for each part."""
    lines = ["## Machine", "", *_table([(name, show(value)) for name, value in environment.items()])]
    for part in parts:
        rows = [(figure.what, figure.shown) for figure in part.figures]
        rows += [("FAILED", problem) for problem in part.problems]
        lines += ["", f"## {part.title}", "", *_table(rows)]
    return "\n".join(lines)


def to_json(environment: Mapping[str, Value], parts: Sequence[Part]) -> dict[str, Any]:
    """``environment``, and under ``parts`` for each: ``status``, ``problems``, ``seconds``, ``figures``."""
    found = {
        part.name: {
            "status": "failed" if part.problems else "ok",
            "problems": part.problems,
            "seconds": round(part.seconds, 1),
            "figures": {figure.key: _plain(figure.value) for figure in part.figures},
        }
        for part in parts
    }
    return {"environment": dict(environment), "parts": found}


def _plain(value: Value) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, list):
        return [_plain(number) for number in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| what | seen |", "|---|---|", *(f"| {what} | {_cell(seen)} |" for what, seen in rows)]


def _cell(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= _ERROR_LENGTH else f"{flat[:_ERROR_LENGTH]} ..."
