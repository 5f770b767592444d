"""Shows what asking costs: an estimate before it, and a bar with cost and counts while it goes on.

Called by the command.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.text import Text

from rime_pl.bars import Bar
from rime_pl.teacher.filters import NAMES
from rime_pl.teacher.jobs import Jobs
from rime_pl.teacher.settings import Price

#: Tokens of an answer, as long as none is known.
_ANSWER = 80


def estimate(jobs: Jobs) -> str:
    """Return what will be asked, what is known already, and what it may cost."""
    missing, order = jobs.missing, jobs.order
    known = len(jobs.jobs) - len(missing)
    lines = [
        f"{len(jobs.keys):,} sides need a rewrite: {len(jobs.jobs):,} requests, because equal content is "
        f"asked for once. {known:,} answers are in {jobs.answers.path.name}, {len(missing):,} are missing."
    ]
    if missing:
        read = sum(job.prompt_tokens for job in missing)
        mean = jobs.mean_completion() or min(_ANSWER, order.teacher.max_tokens)
        written, most = round(mean * len(missing)), order.teacher.max_tokens * len(missing)
        lines.append(f"estimate: {read:,} tokens to read, {written:,} to write (at most {most:,}).")
        lines.append(_cost(order.price, read, written, most))
    return "\n".join(lines)


def _cost(price: Price, read: int, written: int, most: int) -> str:
    if not price.known:
        return "cost: not known. --price.input and --price.output are the prices of a million tokens."
    limit = "" if price.limit is None else f"; the command stops at {price.limit:g}"
    return f"cost: about {price.of(read, written):.4f}, at most about {price.of(read, most):.4f}{limit}."


def spent(jobs: Jobs) -> str:
    """Return what this command has used so far."""
    used = jobs.spent
    tokens = f"{used.prompt_tokens:,} tokens read, {used.completion_tokens:,} written"
    cost = f"cost {jobs.cost:.4f}, " if jobs.order.price.known else ""
    unsaid = f" (estimated for {used.estimated:,} answers)" if used.estimated else ""
    return f"{cost}{tokens}{unsaid}"


def state(jobs: Jobs) -> str:
    """Return cost, failures and the count of each filter, in a line."""
    dropped = ", ".join(f"{name} {jobs.dropped[name]}" for name in NAMES[:-1])
    return f"{spent(jobs)}; dropped: {dropped}; failed {len(jobs.failures)}; repeated {jobs.faults.total()}"


class _Bar(Bar):
    """A bar, and below it a line of cost and a line of counts: together they are longer than a line."""

    def __init__(self, jobs: Jobs, console: Console) -> None:
        self.jobs = jobs
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, transient=not console.is_terminal)

    def line(self) -> str:
        return f"{super().line()}: {state(self.jobs)}"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from map(Text, state(self.jobs).split("; ", 1))


class Meter:
    """The bar while a teacher is asked; in a file, a line now and then.

    Args:
        jobs: Before it is asked.
        console: Where it is shown.
    """

    def __init__(self, jobs: Jobs, console: Console) -> None:
        self.jobs, self.console = jobs, console
        self.total, self.done = len(jobs.jobs), len(jobs.jobs) - len(jobs.missing)
        self._bar = _Bar(jobs, console)
        self._task = self._bar.add_task("asking", total=self.total, completed=self.done)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tick(self) -> None:
        """Count one answer or failure."""
        self.done += 1
        self._bar.update(self._task, completed=self.done)
