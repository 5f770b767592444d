"""Counts the samples that cannot be used, and the texts that were cut, and says so.

Filled by loading.py; datamodule.py prints it and hands it to the manifest of the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rime_pl.errors import DataError, RimeError
from rime_pl.types import Batch, EvalBatch

#: How many samples a message lists.
_LISTED = 20


@dataclass
class Fetched:
    """A batch from a worker. Errors are values here, so that the user sees no traceback of a worker."""

    batch: Batch | EvalBatch | None = None
    broken: dict[str, str] = field(default_factory=dict)  # sample -> what is wrong
    cut: set[str] = field(default_factory=set)  # "<sample> (query): text" and the like
    error: RimeError | None = None


class BrokenSamples:
    """Collects the broken samples of one split on this process; stops the run when there are too many.

    Args:
        where: Folder of the split, for the message.
        max_share: Largest share of broken samples that the run accepts.
    """

    def __init__(self, where: str, max_share: float) -> None:
        self.where, self.max_share = where, max_share
        self.found: dict[str, str] = {}  # sample -> what is wrong
        self.cut: set[str] = set()
        self._told = (0, 0)

    def add(self, fetched: Fetched, num_samples: int) -> None:
        """Add the broken samples of one batch, read from a split of ``num_samples``.

        Raises:
            DataError: If more than ``max_share`` of the samples are broken; it lists them.
        """
        self.cut.update(fetched.cut)
        if not fetched.broken:
            return
        self.found.update(fetched.broken)
        if len(self.found) > self.max_share * num_samples:
            raise DataError(
                f"At most {self.max_share} of the samples may be broken (data.max_broken_share), but "
                f"{len(self.found)} of {num_samples} samples in {self.where} are broken:\n"
                f"{_listed(self.found.values())}\n"
                "Repair the corpus or build it again, or raise data.max_broken_share to skip broken samples."
            )

    def news(self) -> list[str]:
        """Return what is new since the last call, for the terminal."""
        said = []
        for count, told, lines, what in (
            (len(self.found), self._told[0], self.found.values(), "broken samples were left out"),
            (len(self.cut), self._told[1], self.cut, "texts were too long and were cut (data.too_long)"),
        ):
            if count > told:
                said.append(f"{self.where}: {count} {what}:\n{_listed(lines)}")
        self._told = (len(self.found), len(self.cut))
        return said


def _listed(lines: Iterable[str]) -> str:
    """Return the first lines in order, indented, and how many more there are."""
    everything = sorted(lines)
    more = len(everything) - _LISTED
    shown = [*everything[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
    return "\n".join(f"  {line}" for line in shown)
