"""First pass of a builder: reads every row, counts what is refused, and plans the shards.

No medium is opened here. The plan is the same each time, so a build that was killed goes on. Called by
building.py, which writes the shards.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from rich.console import Console

from rime_pl.bars import Bar
from rime_pl.datamodules.builders.sources.drafts import Draft, Refused
from rime_pl.datamodules.builders.sources.records import Record, SourceFile
from rime_pl.errors import RimeError

SPLITS = ("train", "val", "test", "distractors")
#: Samples of a tar.
PER_SHARD = 512
#: Rows that are written together if they lie in row groups, each of which is read as a whole.
_WINDOW = 1024
#: In the place of a subset: all rows of a data set.
ALL_ROWS = "all rows"
#: Lines of each kind that broken.txt holds.
_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class OwnSplits:
    """Settings that all builders of public data sets share; the source has the splits.

    Args:
        seed: Seed of the order.
        limit: Number of rows that are read of each file; all if not given.
        max_refused: Largest share of pairs that may be refused; with more, nothing is built.
        workers: Number of threads; 0 takes one for each CPU.
    """

    seed: int = 0
    limit: int | None = None
    max_refused: float = 0.1
    workers: int = 0

    def __post_init__(self) -> None:
        check_shares(*self.shares)
        if not 0 <= self.max_refused <= 1:
            raise RimeError(f"--max_refused must be at least 0 and at most 1, but is {self.max_refused}.")
        if self.limit is not None and self.limit < 1:
            raise RimeError(f"--limit must be at least 1, but is {self.limit}.")
        if self.workers < 0:
            raise RimeError(f"--workers must be at least 0, but is {self.workers}.")

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the contents in the validation and the test split."""
        return 0.0, 0.0


@dataclass(frozen=True, kw_only=True)
class Settings(OwnSplits):
    """Settings of a source without splits of its own.

    Args:
        val_share: Share of the contents in the validation split.
        test_share: Share of the contents in the test split.
        seed: Seed of the order and of the split.
    """

    val_share: float = 0.01
    test_share: float = 0.01

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the contents in the validation and the test split."""
        return self.val_share, self.test_share


class Expected(NamedTuple):
    """The number of rows that the page of a data set gives."""

    rows: int
    within: int = 0  # by how much the page rounds


class Source(ABC):
    """A data set: its files, and how a row becomes pairs.

    Attributes:
        name: Name of the corpus.
        licence: Licence of the content.
        files: All files, in order.
        expected: Rows of each subset, by the page of the data set.
        arguments: Settings that change what is built; recorded.
    """

    name: str
    licence: str
    files: Sequence[SourceFile]
    expected: Mapping[str, Expected]
    arguments: Mapping[str, Any]

    @abstractmethod
    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the subset of a row; its values are empty if it cannot be read."""

    @abstractmethod
    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft | Refused]:
        """Yield the pairs of a row, each time the same number; a refusal may also be raised."""


@dataclass
class Refusals:
    """What was left out: counts of each kind, and the first lines."""

    counts: Counter[str] = field(default_factory=Counter)
    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str, says: str) -> None:
        self.counts[kind] += 1
        lines = self.lines.setdefault(kind, [])
        if len(lines) < _LINES:
            lines.append(_writable(f"{where}: {kind}: {says}"))

    def told(self) -> str:
        """Return how many there are of each kind, the most frequent first."""
        return ", ".join(
            f"{count:,} x {kind}" for kind, count in sorted(self.counts.items(), key=_most_first)
        )

    def text(self) -> list[str]:
        """Return the lines of broken.txt."""
        result = []
        for kind in sorted(self.lines):
            result += self.lines[kind]
            if (more := self.counts[kind] - len(self.lines[kind])) > 0:
                result.append(f"... and {more:,} more: {kind}")
        return result


def _writable(text: str) -> str:
    """Return the text with question marks in the place of half characters, which no file can hold."""
    return text.encode(errors="replace").decode()


def _most_first(of_kind: tuple[str, int]) -> tuple[int, str]:
    return -of_kind[1], of_kind[0]


class Planned(NamedTuple):
    """One pair that is to be written: file, row, place in the file, and number among the pairs of the row."""

    file: int
    row: int
    at: int
    part: int


@dataclass(frozen=True)
class Unit:
    """Pairs that are written together, as one or more shards."""

    number: int
    split: str
    first_shard: int
    pairs: tuple[Planned, ...]

    @property
    def shards(self) -> int:
        return -(-len(self.pairs) // PER_SHARD)


@dataclass
class Plan:
    """What the first pass has found."""

    units: list[Unit] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=dict)  # of each split
    rows: Counter[str] = field(default_factory=Counter)  # of each subset
    refusals: Refusals = field(default_factory=Refusals)
    notes: Counter[str] = field(default_factory=Counter)  # what was repaired, such as a placeholder dropped
    fingerprint: str = ""

    def rows_of(self, subset: str) -> int:
        """Return the number of rows of a subset, or of all."""
        return self.rows.total() if subset == ALL_ROWS else self.rows[subset]


def plan_of(source: Source, settings: OwnSplits) -> Plan:
    """Return what is to be written.

    Raises:
        RimeError: If a split that training needs gets no pairs.
        DataError: If a file as a whole cannot be read.
    """
    plan = Plan()
    found: dict[str, list[Planned]] = {split: [] for split in SPLITS}
    seen: set[int] = set()
    with Bar(transient=True) as progress:
        bar = progress.add_task(f"reading {source.name}", total=sum(file.total for file in source.files))
        before = 0
        for number, file in enumerate(source.files):
            for record in islice(file.records(), settings.limit):
                progress.update(bar, completed=before + record.done)
                values = {} if isinstance(record.values, Refused) else record.values
                plan.rows[_writable(source.subset(file, values))] += 1
                for part, draft in enumerate(drafts_of(source, file, record)):
                    refused = draft if isinstance(draft, Refused) else _repeated(draft, seen)
                    if refused is not None:
                        plan.refusals.add(refused.kind, file.where(record.place.row), refused.says)
                    elif isinstance(draft, Draft):
                        plan.notes.update(draft.notes)
                        split = draft.split or split_of(draft.group, settings.seed, *settings.shares)
                        found[split].append(Planned(number, *record.place, part))
            before += file.total
            progress.update(bar, completed=before)
    plan.pairs = {split: len(pairs) for split, pairs in found.items()}
    _require_splits(source, plan)
    plan.units = [*_units(source, found, settings.seed)]
    plan.fingerprint = _fingerprint(source, settings, plan.units)
    return plan


def drafts_of(source: Source, file: SourceFile, record: Record) -> list[Draft | Refused]:
    """Return the pairs of a row, and what is refused of it. Files are known to exist; none is opened."""
    if isinstance(record.values, Refused):
        return [record.values]
    result: list[Draft | Refused] = []
    try:
        for draft in source.drafts(file, record.place.row, record.values):
            try:
                if isinstance(draft, Draft):
                    draft.check()
                result.append(draft)
            except Refused as refused:
                result.append(refused)
    except Refused as refused:
        result.append(refused)
    return result


def _repeated(draft: Draft, seen: set[int]) -> Refused | None:
    digest = draft.digest()
    if digest in seen:
        return Refused("duplicate pair", "the same texts and media were there before, in the same task.")
    seen.add(digest)
    return None


def check_shares(val_share: float, test_share: float) -> None:
    """Raise a RimeError if the shares are negative or add up to more than 1."""
    if min(val_share, test_share) < 0 or val_share + test_share > 1:
        raise RimeError(
            f"val_share and test_share must be at least 0 and add up to at most 1, but are {val_share} and "
            f"{test_share}."
        )


def split_of(content: str, seed: int, val_share: float, test_share: float) -> str:
    """Return the split of a content by hash, so that no content is in two splits."""
    digest = hashlib.sha256(f"{seed} {content}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def _require_splits(source: Source, plan: Plan) -> None:
    if missing := [split for split in SPLITS[:3] if not plan.pairs[split]]:
        has = ", ".join(f"{split} {plan.pairs[split]:,}" for split in SPLITS[:3])
        why = f" Refused were {plan.refusals.told()}." if plan.refusals.counts else ""
        first = [lines[0] for lines in plan.refusals.lines.values()][:5]
        told = "".join(f"\n  {line}" for line in first)
        raise RimeError(
            f"{source.name}: split {missing[0]!r} must have pairs, but has none ({has}).{why} Give more "
            f"rows, or raise --val_share and --test_share if the command has them.{told}"
        )


def _hashed(*parts: object) -> bytes:
    return hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()


def _units(source: Source, found: Mapping[str, list[Planned]], seed: int) -> Iterator[Unit]:
    """Yield the units in shuffled order. It is by hash, so it does not depend on who shuffles."""
    names = [file.name for file in source.files]

    def order(pair: Planned) -> tuple[bytes, Planned]:
        return _hashed(seed, names[pair.file], pair.row, pair.part), pair

    number = 0
    for split, pairs in found.items():
        shard = 0
        for chunk in _chunks(source, sorted(pairs, key=order), seed):
            unit = Unit(number, split, shard, tuple(chunk))
            yield unit
            number, shard = number + 1, shard + unit.shards


def _chunks(source: Source, pairs: list[Planned], seed: int) -> Iterator[list[Planned]]:
    """Yield shuffled pairs in chunks; those of a row group stay together, because it is read as a whole."""
    if not any(file.blocked for file in source.files):
        yield from (pairs[start : start + PER_SHARD] for start in range(0, len(pairs), PER_SHARD))
        return
    blocks: dict[tuple[int, int], list[int]] = {}
    for index, pair in enumerate(pairs):
        blocks.setdefault((pair.file, pair.at), []).append(index)
    chunk: list[int] = []
    names = [file.name for file in source.files]
    for block in sorted(blocks, key=lambda block: (_hashed(seed, names[block[0]], block[1]), block)):
        chunk += blocks[block]
        while len(chunk) >= _WINDOW:
            head, chunk = chunk[:_WINDOW], chunk[_WINDOW:]
            yield [pairs[index] for index in sorted(head)]
    if chunk:
        yield [pairs[index] for index in sorted(chunk)]


def _fingerprint(source: Source, settings: OwnSplits, units: Sequence[Unit]) -> str:
    """Return a hash of all that decides what is written, so that no other build goes on with this one."""
    digest = hashlib.sha256(repr((source.name, dict(source.arguments), settings.seed, PER_SHARD)).encode())
    for file in source.files:
        about = file.path.stat()
        digest.update(repr((file.name, about.st_size, about.st_mtime_ns)).encode())
    for unit in units:
        digest.update(repr((unit.split, unit.first_shard, [tuple(pair) for pair in unit.pairs])).encode())
    return digest.hexdigest()


def say(text: str) -> None:
    """Print a line as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
