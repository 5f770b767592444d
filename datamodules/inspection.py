"""What is in a corpus: counts of all its pairs, and lengths of some of them.

Counts come from the index, so ten million pairs take seconds. Lengths, sizes and broken samples come from
pairs that are chosen by a seed and read. Called by ``rime shards inspect``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from rime_pl.bars import track
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.index_writer import MEDIA, TEXT
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.split_index import HAS_QUERY, QUERY_REWRITE, TARGET_REWRITE
from rime_pl.errors import DataError
from rime_pl.types import Clip, Item, Pair, Side, frames_of

SIDES: tuple[Side, ...] = ("query", "target")
#: What a side holds beside text: one kind of medium, or several.
KINDS = ("text", *MEDIA, "mixed")


@dataclass
class SideCounts:
    """What one side of all pairs of a task holds, from the index."""

    kinds: dict[str, int] = field(default_factory=dict)  # one of KINDS -> items
    with_text: int = 0  # items with media that have text, too
    rewrites: int = 0

    @property
    def items(self) -> int:
        return sum(self.kinds.values())


@dataclass
class SideLengths:
    """Lengths of one side of the pairs that were read; each list has one number for an item that has any."""

    letters: list[int] = field(default_factory=list)  # of texts
    tokens: list[int] = field(default_factory=list)  # of texts, if tokens are counted
    rewrite_letters: list[int] = field(default_factory=list)
    rewrite_tokens: list[int] = field(default_factory=list)
    media: list[int] = field(default_factory=list)  # number of media of an item that has some
    widths: list[int] = field(default_factory=list)  # pixels, of each medium
    heights: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # of each clip
    seconds: list[float] = field(default_factory=list)  # from the first frame to the last of each clip

    def add(self, item: Item, count_tokens: Callable[[str], int] | None) -> None:
        """Count one item."""
        texts = (
            (item.text, self.letters, self.tokens),
            (item.rewrite, self.rewrite_letters, self.rewrite_tokens),
        )
        for text, letters, tokens in texts:
            if text and text.strip():
                letters.append(len(text))
                if count_tokens:
                    tokens.append(count_tokens(text))
        if item.media:
            self.media.append(len(item.media))
        for medium in item.media:
            width, height = frames_of(medium)[0].size
            self.widths.append(width)
            self.heights.append(height)
            if isinstance(medium, Clip):
                self.frames.append(len(medium.frames))
                self.seconds.append(medium.times[-1] - medium.times[0])


@dataclass
class TaskInspection:
    """One task of one split."""

    pairs: int
    queries: int
    contents: int  # distinct targets
    annotated: int  # pairs with a rewrite on both sides
    counts: dict[Side, SideCounts]
    lengths: dict[Side, SideLengths] = field(default_factory=lambda: {side: SideLengths() for side in SIDES})
    read: int = 0  # pairs that were read for the lengths
    hard_negatives: list[int] = field(default_factory=list)  # of each pair that was read
    positives: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # errors that name the sample
    shown: list[Pair] = field(default_factory=list)  # for the contact sheet, with small media


#: split -> task -> what is in it
Inspection = dict[str, dict[str, TaskInspection]]


def inspect_corpus(
    corpus: Path,
    splits: Sequence[str] | None = None,
    samples: int = 200,
    shown: int = 12,
    seed: int = 0,
    count_tokens: Callable[[str], int] | None = None,
    small: Callable[[Item], Item] = Item.thumbnail,
) -> Inspection:
    """Return what is in a corpus.

    Args:
        corpus: Corpus folder.
        splits: Names of splits; None for all.
        samples: Largest number of pairs of each task and split that are read.
        shown: Largest number of pairs of each task and split that are kept for a contact sheet.
        seed: Seed of the choice of both.
        count_tokens: Text -> number of tokens; None counts none.
        small: Makes an item smaller that is kept.

    Raises:
        DataError: If a split is missing, or its index is damaged.
    """
    found: Inspection = {}
    for split in splits or read_corpus(corpus)["splits"]:
        entries = read_split(corpus, split)
        codes = entries.task_codes()
        found[split] = {}
        for code in np.unique(codes).tolist():
            of_task = entries.select(np.flatnonzero(codes == code))
            task = found[split][entries.tasks[code]] = _counted(of_task)
            numbers = np.random.default_rng([seed, code]).permutation(len(of_task))[:samples]
            label = f"{split}, {entries.tasks[code]}"
            reader = ShardReader(of_task)
            for number in track(numbers.tolist(), label, transient=True):
                _read(reader, number, task, shown, count_tokens, small)
    return found


def _counted(entries: Samples) -> TaskInspection:
    """Return the counts of the pairs of a task, from the columns of the index."""
    flags, modality = entries.column("flags"), entries.column("modality")
    has_query = (flags & HAS_QUERY) > 0
    both = QUERY_REWRITE | TARGET_REWRITE
    sides = {
        "query": ((modality & 15)[has_query], (flags[has_query] & QUERY_REWRITE) > 0),
        "target": (modality >> 4, (flags & TARGET_REWRITE) > 0),
    }
    counts: dict[Side, SideCounts] = {}
    for side in SIDES:
        bits, rewritten = sides[side]
        kinds = dict.fromkeys(KINDS, 0)
        with_text = 0
        for value, number in zip(*map(np.ndarray.tolist, np.unique(bits, return_counts=True)), strict=True):
            media = [name for name, bit in MEDIA.items() if value & bit]
            kinds["mixed" if len(media) > 1 else media[0] if media else "text"] += number
            with_text += number if media and value & TEXT else 0
        counts[side] = SideCounts(kinds, with_text, int(rewritten.sum()))
    contents = len(np.unique(entries.column("target_content")))
    annotated = int(((flags & both) == both).sum())
    return TaskInspection(len(entries), int(has_query.sum()), contents, annotated, counts)


def _read(
    reader: ShardReader,
    number: int,
    task: TaskInspection,
    shown: int,
    count_tokens: Callable[[str], int] | None,
    small: Callable[[Item], Item],
) -> None:
    """Read one pair and count it."""
    task.read += 1
    try:
        pair = reader.read(number)
    except DataError as error:
        task.broken.append(str(error))
        return
    for side, item in (("query", pair.query), ("target", pair.target)):
        if item is not None:
            task.lengths["query" if side == "query" else "target"].add(item, count_tokens)
    task.hard_negatives.append(len(pair.hard_negatives))
    task.positives.append(len(pair.positives))
    if len(task.shown) < shown:
        query = None if pair.query is None else small(pair.query)
        task.shown.append(Pair(pair.key, pair.dataset, pair.gallery, query, small(pair.target)))


def shown_pairs(tasks: dict[str, TaskInspection], most: int) -> list[Pair]:
    """Return at most ``most`` pairs for a contact sheet, from the tasks by turns."""
    turns = zip_longest(*(task.shown for task in tasks.values()))
    return [pair for turn in turns for pair in turn if pair is not None][:most]
