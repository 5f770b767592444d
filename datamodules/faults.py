"""What is wrong with a table or a corpus: collected, so that a user sees all of it at once, and listed.

The builder of your own data and checking.py collect faults; commands and broken_samples.py print them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

#: How many samples or pictures a message lists.
_LISTED = 20


@dataclass(frozen=True)
class Fault:
    """One fault of one row or sample.

    A problem stops a build or a training, or makes a result wrong. A warning says what a user should know.
    """

    kind: str  # what is counted, such as "missing file"
    where: str  # "pairs.csv line 7" or "train-000000.tar/row-00000007"
    says: str  # what must hold, the value given, and what to do
    level: Literal["problem", "warning"] = "problem"

    def __str__(self) -> str:
        return f"{self.where}: {self.says}"


def listed(faults: Sequence[Fault], shown: int) -> str:
    """Return the first faults by their lines, how many more there are, and how many of each kind.

    Example:
        >>> print(listed([Fault("empty row", f"a.csv line {n}", "the row is empty.") for n in (11, 4, 9)], 2))
        a.csv line 4: the row is empty.
        a.csv line 9: the row is empty.
        ... and 1 more
        By kind: 3 x empty row.
    """
    lines = [str(fault) for fault in sorted(faults, key=place_of)[:shown]]
    if len(faults) > shown:
        lines.append(f"... and {len(faults) - shown} more")
    return "\n".join([*lines, f"By kind: {by_kind(faults)}."])


def by_kind(faults: Iterable[Fault]) -> str:
    """Return how many faults there are of each kind, the most frequent first."""
    kinds = Counter(fault.kind for fault in faults).most_common()
    return ", ".join(f"{count} x {kind}" for kind, count in kinds)


def counted(number: int, one: str, several: str) -> str:
    """Return a number with the words for one or for several.

    Example:
        >>> counted(1, "row was", "rows were"), counted(2, "row was", "rows were")
        ('1 row was', '2 rows were')
    """
    return f"{number} {one if number == 1 else several}"


def printable(text: str) -> str:
    r"""Return a text with its control characters replaced: from a file name, they would steer a terminal.

    Example:
        >>> printable("\x1b[2Jcat\r.png\n")
        '\ufffd[2Jcat\ufffd.png\n'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def first_lines(lines: Iterable[str]) -> str:
    """Return the first lines in order, indented, and how many more there are."""
    everything = sorted(lines)
    more = len(everything) - _LISTED
    shown = [*everything[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
    return printable("\n".join(f"  {line}" for line in shown))


def place_of(fault: Fault) -> list[tuple[int, str]]:
    """Return a key that sorts line 9 before line 10, and faults of the whole first."""
    parts = re.split(r"(\d+)", fault.where.replace(" lines ", " line "))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
