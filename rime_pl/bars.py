"""Progress bars which, where no bar can be seen, write a line now and then instead.

Used by commands, builders and trainings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID

T = TypeVar("T")

#: Seconds between two lines.
EVERY = 30.0


class Lines:
    """Writes a line every half minute at most, and none in a terminal, where a bar is seen."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def tell(self, console: Console, line: Callable[[], str]) -> None:
        """Write the line, if it is time for one."""
        if not console.is_interactive and (now := time.monotonic()) - self._told >= EVERY:
            self._told = now
            console.print(line(), markup=False, emoji=False, highlight=False, soft_wrap=True)


class Bar(Progress):
    """rich's progress bar with a true total: how much is done of how much, and how long the rest takes.

    Args:
        columns: What is shown; rich's own columns and the counts if none are given.
        transient: Leave no bar behind. A file never holds a whole one, then.
        off: Show neither a bar nor lines.
        console: Where it is shown; rich's own if None.
    """

    def __init__(
        self,
        *columns: str | ProgressColumn,
        transient: bool = False,
        off: bool = False,
        console: Console | None = None,
    ) -> None:
        console = console or get_console()
        super().__init__(
            *(columns or (*Progress.get_default_columns(), MofNCompleteColumn())),
            console=console,
            transient=transient,
            disable=off or (transient and not console.is_interactive),  # rich would write an empty line
        )
        self._off, self._lines = off, Lines()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, as rich does, and perhaps write a line."""
        super().update(task_id, **changes)
        self._tell()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count further, as rich does, and perhaps write a line."""
        super().advance(task_id, advance)
        self._tell()

    def line(self) -> str:
        """Return what a file is told: all tasks in one line."""
        return "; ".join(map(told, self.tasks))

    def _tell(self) -> None:
        if not self._off:
            self._lines.tell(self.console, self.line)


def track(
    sequence: Iterable[T],
    description: str,
    total: float | None = None,
    transient: bool = False,
    off: bool = False,
    console: Console | None = None,
) -> Iterator[T]:
    """Yield the elements, and show how many have been taken; ``total`` is needed if nobody knows how many."""
    with Bar(transient=transient, off=off, console=console) as bar:
        yield from bar.track(sequence, total=total, description=description)


def told(task: Task) -> str:
    """Return how far a task is, with its values."""
    of = "" if task.total is None else f" of {task.total:,.0f}"
    values = "".join(f", {name} {value:.3f}" for name, value in task.fields.items())
    return f"{task.description}: {task.completed:,.0f}{of}{values}"
