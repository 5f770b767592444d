"""Second pass of a builder: opens the media and writes the shards, several at once.

Each unit of the plan is written by one thread and noted when it is finished. A build that was killed goes on
with the units that are left, and its result has the same bytes. Called by the builders of public data sets
and by that of your own data.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rime_pl.bars import Bar
from rime_pl.datamodules.builders.planning import (
    PER_SHARD,
    SPLITS,
    OwnSplits,
    Plan,
    Planned,
    Refusals,
    Source,
    Unit,
    drafts_of,
    plan_of,
    say,
)
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.records import Place
from rime_pl.datamodules.corpus_file import FORMAT_VERSION
from rime_pl.datamodules.replacing import replacing, state_of
from rime_pl.datamodules.shard_writer import (
    Encoder,
    add_to_hash,
    strangers,
    write_corpus_file,
    write_index,
    write_shard,
)
from rime_pl.errors import RimeError, StoppedError
from rime_pl.types import Pair

_MOST_WORKERS = 16


def build_corpus(output: Path, source: Source, settings: OwnSplits) -> None:
    """Turn a data set into a corpus folder.

    Raises:
        RimeError: If too many rows are refused, if a split that training needs gets no pairs, or if the
            folder cannot be written.
        StoppedError: If Ctrl-C stops it; the same command goes on.
    """
    output = Path(output)
    _refuse_equal_keys(source)
    plan = plan_of(source, settings)
    _tell_rows(source, settings, plan)
    _refuse_many(source, settings, plan.refusals, sum(plan.pairs.values()))
    with built(output, source, plan, settings.workers) as build:
        refusals, about = plan.refusals, build.about()
        for kind, where, says in build.refused():
            refusals.add(kind, where, says)
        samples = sum(told["samples"] for told in about.values())
        _refuse_many(source, settings, refusals, samples, build.folder)
        if lost := [split for split in SPLITS[:3] if not about[split]["samples"]]:
            build.forget()
            raise RimeError(
                f"{source.name}: split {lost[0]!r} must have samples, but all of them were refused: "
                f"{refusals.told()}.\n{_first(refusals)}"
            )
        corpus = corpus_of(build.folder, source, settings.seed, _arguments(source, settings), about)
        corpus["rows"] = _rows(source, plan)
        corpus["refused"] = dict(sorted(refusals.counts.items()))
        corpus["notes"] = dict(sorted(plan.notes.items()))
        write_corpus_file(build.folder, corpus, refusals.text())
    if refusals.counts:
        say(f"Left out: {refusals.told()}. {output / 'broken.txt'} says where.")


@contextmanager
def built(output: Path, source: Source, plan: Plan, workers: int = 0, dry: bool = False) -> Iterator[Build]:
    """Write all units of a plan and give the result, whose folder becomes ``output`` after the block.

    Args:
        output: Corpus folder.
        source: What opens the pairs of the plan.
        plan: The units, and the fingerprint by which a later build knows that it goes on with this one.
        workers: Number of threads; 0 takes one for each CPU.
        dry: Whether media are opened, but nothing is written, because the block will raise.

    Raises:
        StoppedError: If Ctrl-C stops it.
    """
    with replacing(output, strangers, plan.fingerprint) as folder:
        build = Build(source, plan, folder, state_of(output), dry)
        try:
            build.write_units(workers or min(_MOST_WORKERS, os.cpu_count() or 1))
        except KeyboardInterrupt as stopped:
            done = len(build.finished())
            raise StoppedError(
                f"stopped. {done} of {len(plan.units)} parts of {output} are finished and kept in {folder}. "
                "The same command goes on."
            ) from stopped
        yield build


def corpus_of(
    folder: Path, source: Source, seed: int, arguments: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """Write the indices of a folder of finished shards, and return what its corpus.json says."""
    digest = hashlib.sha256()
    for split, told in about.items():
        for name in told["shards"]:
            add_to_hash(digest, folder / split / name)
        write_index(folder / split, told["shards"])
    return {
        **{"name": source.name, "format": FORMAT_VERSION, "licence": source.licence, "seed": seed},
        **{"arguments": arguments, "data_hash": digest.hexdigest(), "splits": about},
    }


def _arguments(source: Source, settings: OwnSplits) -> dict[str, Any]:
    val_share, test_share = settings.shares
    shares = {"val_share": val_share, "test_share": test_share, "limit": settings.limit}
    return {**source.arguments, **shares}


def _rows(source: Source, plan: Plan) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {subset: {"read": n} for subset, n in sorted(plan.rows.items())}
    for subset, expected in source.expected.items():
        rows.setdefault(subset, {"read": plan.rows_of(subset)})["expected"] = expected.rows
    return rows


def _tell_rows(source: Source, settings: OwnSplits, plan: Plan) -> None:
    """Say how many rows there are, and where that differs from what the page of the data set says."""
    if settings.limit is not None:
        say(f"{source.name}: {plan.rows.total():,} rows read, at most {settings.limit:,} of each file.")
        return
    differ = []
    for subset, expected in source.expected.items():
        found = plan.rows_of(subset)
        if abs(found - expected.rows) > expected.within:
            wanted = f"{'about ' if expected.within else ''}{expected.rows:,}"
            differ.append(f"  {subset}: {found:,} rows, but {wanted} expected ({found - expected.rows:+,})")
    say(f"{source.name}: {plan.rows.total():,} rows read.")
    if plan.notes:
        say(f"{source.name}: " + ", ".join(f"{count:,} x {note}" for note, count in plan.notes.most_common()))
    if differ:
        say("These numbers of rows differ from those of the data set's page:\n" + "\n".join(differ))
    elif source.expected:
        say("These are as many as the page of the data set says.")


def _refuse_many(
    source: Source, settings: OwnSplits, refusals: Refusals, kept: int, folder: Path | None = None
) -> None:
    refused = refusals.counts.total()
    parts = f" The finished parts are kept for that in {folder}; delete it otherwise." if folder else ""
    if refused > settings.max_refused * (refused + kept):
        raise RimeError(
            f"{source.name}: {refused:,} of {refused + kept:,} pairs cannot be used, which is more than "
            f"--max_refused {settings.max_refused}: {refusals.told()}.\n{_first(refusals)}\nCheck the "
            f"folders that you gave. If this is all that you have, give a higher --max_refused.{parts}"
        )


def _first(refusals: Refusals) -> str:
    return "\n".join(f"  {line}" for kind in refusals.lines for line in refusals.lines[kind][:3])


class _Stopped(Exception):
    pass


class Build:
    """Writes the units of a plan into a folder, and notes in another one which are finished."""

    def __init__(self, source: Source, plan: Plan, folder: Path, state: Path, dry: bool = False) -> None:
        self.source, self.plan, self.folder, self.state, self.dry = source, plan, folder, state, dry
        self.stop = threading.Event()

    def write_units(self, workers: int) -> None:
        """Write all units that are not finished, several at once."""
        finished = self.finished()
        left = [unit for unit in self.plan.units if unit.number not in finished]
        done = sum(len(unit.pairs) for unit in self.plan.units if unit.number in finished)
        if finished:
            say(f"{len(finished)} of {len(self.plan.units)} parts were finished by an earlier build.")
        with Bar() as progress:
            total = sum(self.plan.pairs.values())
            bar = progress.add_task(f"shards of {self.source.name}", total=total, completed=done)
            with ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(self._write, unit, lambda: progress.advance(bar)) for unit in left]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    self.stop.set()
                    for future in futures:
                        future.cancel()
                    raise

    def finished(self) -> set[int]:
        """Return the numbers of the units that are noted, and whose tars are there as they were written."""
        numbers = set()
        for unit in self.plan.units:
            note = self._note(unit)
            if note.is_file() and all(
                _has_size(self.folder / unit.split / name, size)
                for name, size in json.loads(note.read_bytes())["sizes"].items()
            ):
                numbers.add(unit.number)
        return numbers

    def about(self) -> dict[str, Any]:
        """Return what corpus.json tells of each split, from the notes of all units."""
        about: dict[str, Any] = {}
        tasks: dict[str, Counter[str]] = {}
        for unit in self.plan.units:
            note = self._read(unit)
            told = about.setdefault(unit.split, {"shards": [], "samples": 0, "tasks": {}})
            told["shards"] += note["shards"]
            told["samples"] += sum(note["tasks"].values())
            of_split = tasks.setdefault(unit.split, Counter())
            of_split.update(note["tasks"])
            told["tasks"] = dict(sorted(of_split.items()))
        return about

    def refused(self) -> Iterator[tuple[str, str, str]]:
        """Yield kind, row and reason of what could not be used, unit by unit."""
        for unit in self.plan.units:
            yield from self._read(unit)["refused"]

    def forget(self) -> None:
        """Take away the notes, so that nothing is kept if the build fails now."""
        for unit in self.plan.units:
            self._note(unit).unlink(missing_ok=True)

    def _read(self, unit: Unit) -> dict[str, Any]:
        note: dict[str, Any] = json.loads(self._note(unit).read_bytes())
        return note

    def _note(self, unit: Unit) -> Path:
        return self.state / f"unit-{unit.number:06d}.json"

    def _write(self, unit: Unit, advance: Callable[[], Any]) -> None:
        refused: list[tuple[str, str, str]] = []
        pairs = self._pairs(unit, refused, advance)
        kept = [pairs[planned] for planned in unit.pairs if planned in pairs]
        shards = []
        for start in range(0, len(kept), PER_SHARD):
            number = unit.first_shard + start // PER_SHARD
            path = self.folder / unit.split / f"{unit.split}-{number:06d}.tar"
            if not self.dry:
                write_shard(path, kept[start : start + PER_SHARD], Encoder())
                shards.append(path.name)
        for number in range(unit.first_shard + len(shards), unit.first_shard + unit.shards):
            # left by a build that was killed when more could be used
            (self.folder / unit.split / f"{unit.split}-{number:06d}.tar").unlink(missing_ok=True)
        note = {
            "shards": shards,
            "sizes": {name: (self.folder / unit.split / name).stat().st_size for name in shards},
            "tasks": Counter(pair.dataset for pair in kept),
            "refused": sorted(refused),
        }
        new = self._note(unit).with_suffix(".new")
        new.write_text(json.dumps(note))
        new.rename(self._note(unit))

    def _pairs(
        self, unit: Unit, refused: list[tuple[str, str, str]], advance: Callable[[], Any]
    ) -> dict[Planned, Pair]:
        """Return the pairs of a unit with their media; what cannot be used is added to ``refused``."""
        wanted: dict[int, dict[Place, list[Planned]]] = {}
        for planned in unit.pairs:
            of_file = wanted.setdefault(planned.file, {})
            of_file.setdefault(Place(planned.row, planned.at), []).append(planned)
        pairs: dict[Planned, Pair] = {}
        for number, places in sorted(wanted.items()):
            file = self.source.files[number]
            for record in file.read(list(places)):
                drafts = drafts_of(self.source, file, record)
                where = file.where(record.place.row)
                for planned in places[record.place]:
                    if self.stop.is_set():
                        raise _Stopped
                    try:
                        draft = drafts[planned.part] if planned.part < len(drafts) else drafts[-1]
                        if isinstance(draft, Refused):  # it was good in the first pass
                            raise draft
                        pairs[planned] = draft.pair(file.key(planned.row, planned.part), where)
                    except Refused as one:
                        refused += [(each.kind, where, each.says) for each in (one, *one.more)]
                    advance()
        return pairs


def _has_size(shard: Path, size: int) -> bool:
    try:
        return shard.stat().st_size == size
    except OSError:
        return False


def _refuse_equal_keys(source: Source) -> None:
    keys: dict[str, str] = {}
    for file in source.files:
        first = keys.setdefault(file.key(0, 0), file.name)
        if first != file.name:
            raise RimeError(
                f"{source.name}: two files must not have names as alike as {first!r} and {file.name!r}, "
                "because their samples would have the same keys. Rename one."
            )
