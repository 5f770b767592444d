"""One table for every reader: rich in the terminal, Markdown on a page, HTML in a report.

Used by the stage summary, the study, the report and the commands. Cells are strings: the caller formats its
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from rich import box, table
from rich.console import Group, RenderableType
from rich.text import Text

from rime_pl.report.elements import el

#: A column of a page whose cells have so many characters at most is not broken into lines.
SHORT = 30


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
        head = self._lines()
        rows = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        rules = ["---:" if right else "---" for right in self._right()]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rules, *rows)]
        parts = (self.title and f"**{self.title}**", self.conclusion, "\n".join(lines), self.note)
        return "\n\n".join(filter(None, parts))

    def html(self) -> Element:
        """Return the table as an HTML element, with all text escaped; a wide one scrolls inside its box."""
        names, looks = self._lines(), []
        for number, right in enumerate(self._right()):
            short = max((len(row[number]) for row in self.rows), default=0) <= SHORT
            looks.append({"class_": "number" if right else "short" if short else "long"})
        head = (el("th", name, scope="col", **look) for name, look in zip(names, looks, strict=True))
        rows = []
        for first, *rest in self.rows:
            cells = (el("td", cell, **look) for cell, look in zip(rest, looks[1:], strict=True))
            rows.append(el("tr", el("th", first, scope="row", **looks[0]), *cells))
        label = {"aria_label": self.title or ", ".join(names)}
        grid = el("table", el("thead", el("tr", *head)), el("tbody", *rows), **label)
        above = [el("p", self.title, class_="caption")] if self.title else []
        above += [el("p", self.conclusion)] if self.conclusion else []
        scrolled = el("div", grid, class_="scroll", tabindex="0", role="region", **label)
        notes = [el("p", line, class_="note") for line in self.note.splitlines()]
        return el("div", *above, scrolled, *notes, class_="table")

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

    def _lines(self) -> list[str]:
        """Return the names of the columns, each on one line."""
        return [re.sub(r"(?<=\S-)\n", "", name).replace("\n", " ") for name in self.head]

    def _right(self) -> list[bool]:
        number = re.compile(r"[-+]?\d|-?$")
        return [n > 0 and all(number.match(row[n]) for row in self.rows) for n in range(len(self.head))]
