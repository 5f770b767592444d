"""Counts the samples that cannot be used, and the texts that were cut, and says so.

Filled by together.py; datamodule.py prints it and hands it to the manifest of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rime_pl.datamodules.faults import first_lines
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Batch, EvalBatch


@dataclass
class Fetched:
    """A batch from a worker. Errors are values here, so that the user sees no traceback of a worker."""

    batch: Batch | EvalBatch | None = None
    broken: dict[str, str] = field(default_factory=dict)  # sample -> what is wrong
    cut: set[str] = field(default_factory=set)  # "<sample> (query): text" and the like
    error: RimeError | None = None


class BrokenSamples:
    """Collects the broken samples of one split, of all processes; stops the run when there are too many.

    Args:
        where: Folder of the split, for the message.
        max_share: Largest share of broken samples that the run accepts.
    """

    def __init__(self, where: str, max_share: float) -> None:
        self.where, self.max_share = where, max_share
        self.found: dict[str, str] = {}  # sample -> what is wrong
        self.cut: set[str] = set()  # on this process
        self._told = (0, 0)

    def add(self, broken: Mapping[str, str], num_samples: int) -> None:
        """Add broken samples of a split of ``num_samples``; one that is met again counts once.

        Raises:
            DataError: If more than ``max_share`` of the samples are broken; it lists them.
        """
        if not broken:
            return
        self.found.update(broken)
        if len(self.found) > self.max_share * num_samples:
            raise DataError(
                f"At most {self.max_share} of the samples may be broken (data.max_broken_share), but "
                f"{len(self.found)} of {num_samples} samples in {self.where} are broken:\n"
                f"{first_lines(self.found.values())}\n"
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
                said.append(f"{self.where}: {count} {what}:\n{first_lines(lines)}")
        self._told = (len(self.found), len(self.cut))
        return said
