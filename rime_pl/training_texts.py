"""What an adapter keeps of the texts that it was trained on: the instructions of each task, and the words.

The AdapterCheckpoint callback collects both when it saves an adapter. Inference uses the instructions, so
that an item is embedded as in training, and names the words of a query that training never showed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.metrics.words import content_words
from rime_pl.types import Item, Pair, Side

#: The sorted words of all training texts, one a line, next to the adapter.
WORDS_FILE = "words.txt"
#: A base model with more tokens was pre-trained on other texts, whose words nobody has listed.
MAX_VOCABULARY = 10_000
#: Pairs, evenly spaced in each task, that show its instructions, unless all are read for their words.
MAX_SAMPLES = 10_000
#: A longer list of words is not kept.
MAX_WORDS = 100_000
#: Instructions that are kept for each side of a task; corpora have one, seldom a few wordings.
MAX_WORDINGS = 8


@dataclass(frozen=True)
class TaskInstructions:
    """The instructions of one task on both sides, the most frequent first; "" is none."""

    query: tuple[str, ...]
    target: tuple[str, ...]
    from_text: bool  # whether a query is a text alone
    to_picture: bool  # whether a target has a picture

    def of(self, side: Side) -> str:
        """Return the most frequent instruction of a side."""
        return (self.query if side == "query" else self.target)[0]


@dataclass
class TrainingTexts:
    """Counts instructions and words, pair by pair."""

    instructions: dict[tuple[str, Side], Counter[str]] = field(default_factory=dict)
    kinds: dict[str, Counter[tuple[bool, bool]]] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)

    def add(self, pair: Pair, words: bool = True) -> None:
        """Count one pair of the training split; without ``words`` only its instructions."""
        task, query, target = pair.dataset, pair.query, pair.target
        if query is None:
            return
        sides: tuple[tuple[Side, Item], ...] = (("query", query), ("target", target))
        for side, item in sides:
            self.instructions.setdefault((task, side), Counter())[item.instruction] += 1
        kind = (bool(query.text) and not query.media, bool(target.media))
        self.kinds.setdefault(task, Counter())[kind] += 1
        if words:
            self.add_words(pair)

    def add_words(self, pair: Pair) -> None:
        """Take the words of all texts of a pair."""
        items = (*([pair.query] if pair.query else []), pair.target, *pair.hard_negatives)
        for item in items:
            self.words |= content_words(f"{item.instruction}\n{item.text}\n{item.rewrite or ''}")

    def tasks(self) -> dict[str, TaskInstructions]:
        """Return the instructions of each task, in the order of the names of the tasks."""
        return {
            task: TaskInstructions(
                self._wordings(task, "query"), self._wordings(task, "target"), *kinds.most_common(1)[0][0]
            )
            for task, kinds in sorted(self.kinds.items())
        }

    def _wordings(self, task: str, side: Side) -> tuple[str, ...]:
        return tuple(text for text, _ in self.instructions[task, side].most_common(MAX_WORDINGS))


def tasks_to_json(tasks: Mapping[str, TaskInstructions]) -> dict[str, Any]:
    """Return the instructions as they are kept in the contract of an adapter."""
    return {name: asdict(task) for name, task in tasks.items()}


def tasks_from_json(contract: Mapping[str, Any]) -> dict[str, TaskInstructions]:
    """Return the instructions in the contract of an adapter; none if an earlier version saved it."""
    return {
        name: TaskInstructions(
            tuple(task["query"]), tuple(task["target"]), task["from_text"], task["to_picture"]
        )
        for name, task in (contract.get("tasks") or {}).items()
    }


def choose_task(tasks: Mapping[str, TaskInstructions], name: str | None = None) -> TaskInstructions:
    """Return a task by its name; without a name, the only one or the first that goes from text to picture.

    Raises:
        RimeError: If there is no such task, or if a name is needed.
    """
    if not tasks:
        raise RimeError(
            "The adapter must keep the instructions of its tasks, but an earlier version saved it without "
            "them. Give the instruction yourself, in the words of the training data ('' for none)."
        )
    names = ", ".join(map(repr, tasks))
    if name is not None:
        if name not in tasks:
            raise RimeError(f"task must be one that the model was trained on, {names}, but is {name!r}.")
        return tasks[name]
    if len(tasks) == 1:
        return next(iter(tasks.values()))
    for task in tasks.values():
        if task.from_text and task.to_picture:
            return task
    raise RimeError(f"task must be given, because no task goes from a text to a picture. There are: {names}.")


def write_words(folder: Path, words: Iterable[str]) -> None:
    """Write the words of the training texts next to an adapter, unless there are more than ``MAX_WORDS``."""
    listed = sorted(words)
    if listed and len(listed) <= MAX_WORDS:
        (folder / WORDS_FILE).write_text("\n".join(listed) + "\n", encoding="utf-8")


def unknown_words(folder: Path, text: str) -> list[str]:
    """Return the words of ``text`` that no training text contains, in their order; [] if nothing is kept."""
    file = folder / WORDS_FILE
    if not file.is_file():
        return []
    unknown = content_words(text) - set(file.read_text(encoding="utf-8").split("\n"))
    return sorted(unknown, key=text.lower().find)
