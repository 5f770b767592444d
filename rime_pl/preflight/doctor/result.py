"""One line of `rime doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and the remedy where it is not well."""

    name: str
    level: Level
    seen: str
    remedy: str = ""


def ok(name: str, seen: str) -> Check:
    return Check(name, "ok", seen)


def warning(name: str, seen: str, remedy: str) -> Check:
    return Check(name, "warning", seen, remedy)


def problem(name: str, seen: str, remedy: str) -> Check:
    return Check(name, "problem", seen, remedy)
