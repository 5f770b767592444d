"""One table for every reader: rich in the terminal, Markdown on a page.

Used by the stage summary, the study and the commands. Cells are strings: the caller formats its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box, table
from rich.console import Group, RenderableType
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A table with a title. Columns of numbers are aligned to the right, the first column never is.

    >>> print(Table("", ["mode", "recall@1"], [["gen-gen", "0.738"]]).markdown())
    | mode | recall@1 |
    | --- | ---: |
    | gen-gen | 0.738 |
    """

    title: str  # one line above the table; "" for none
    head: Sequence[str]  # names of the columns; a line break is kept in the terminal only
    rows: Sequence[Sequence[str]]  # "-" or "" where there is no value
    conclusion: str = ""  # what the table shows, in a sentence above it
    note: str = ""  # how to read the table, below it

    def markdown(self) -> str:
        """Return the table as Markdown, without a line break at its end."""
        head = [re.sub(r"(?<=\S-)\n", "", name).replace("\n", " ") for name in self.head]
        rows = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        rules = ["---:" if right else "---" for right in self._right()]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rules, *rows)]
        parts = (self.title and f"**{self.title}**", self.conclusion, "\n".join(lines), self.note)
        return "\n\n".join(filter(None, parts))

    def terminal(self) -> RenderableType:
        """Return what a rich console prints."""
        grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(self.head, self._right(), strict=True):
            grid.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            grid.add_row(*map(Text, row))
        note = Text(self.note and f"{self.note}\n", "dim")
        parts: list[RenderableType] = [Text(self.title, "bold"), Text(self.conclusion), grid, note]
        return Group(*(part for part in parts if part))

    def _right(self) -> list[bool]:
        number = re.compile(r"[-+]?\d|-?$")
        return [n > 0 and all(number.match(row[n]) for row in self.rows) for n in range(len(self.head))]
