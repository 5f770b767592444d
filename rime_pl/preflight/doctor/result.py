"""One line of `rime doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    level: Literal["ok", "warning", "problem"]
    seen: str  # what was found
    remedy: str = ""  # what to do about it
