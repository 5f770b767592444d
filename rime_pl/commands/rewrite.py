"""`rime rewrite`: let a larger model write the rewrites of a corpus or a table, and filter them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from torch import Tensor, cuda

import rime_pl
from rime_pl.bars import track
from rime_pl.datamodules.faults import counted
from rime_pl.errors import DataError, RimeError, StoppedError
from rime_pl.report.table import Table
from rime_pl.teacher.cache import Answers
from rime_pl.teacher.gains import Gains, Similarity
from rime_pl.teacher.jobs import NEW, SIDES, Jobs, Order
from rime_pl.teacher.meter import Meter, estimate, spent
from rime_pl.teacher.settings import Filters, Gain, Price, Teacher, Way
from rime_pl.teacher.sources import CorpusSource, TableSource
from rime_pl.teacher.writing import (
    answers_file,
    refuse_output,
    unwritten_file,
    write_new_corpus,
    write_new_table,
    write_unwritten,
)
from rime_pl.types import Item


def run(
    *,
    output: Path,
    data: Path | None = None,
    table: Path | None = None,
    media: Path | None = None,
    way: Way = "write",
    sides: Literal["query", "target", "both"] = "both",
    splits: list[str] | None = None,
    limit: int | None = None,
    again: bool = False,
    dry_run: bool = False,
    answers: Path | None = None,
    teacher: Teacher = Teacher(),
    filters: Filters = Filters(),
    gain: Gain = Gain(),
    price: Price = Price(),
) -> int:
    """Let a larger model write the rewrites of a corpus or a table, and drop those that are not good.

    The model is any that sees pictures, behind an endpoint that speaks OpenAI's protocol. It gets one side at
    a time. Each answer is kept at once, so the same command goes on after a stop and pays for nothing twice.

    Args:
        output: Corpus folder to write with --data, or CSV or JSONL file with --table.
        data: Corpus folder, made by `rime shards`; not given for a table.
        table: CSV or JSONL file, as for `rime shards folder`; not given for a corpus.
        media: Folder of the files that the picture columns name; the folder of the table if not given.
        way: write shows the teacher an item, distil also the item's chain of thought. extract asks nobody and
            takes the answer that stands behind the chain of thought.
        sides: Sides that get a rewrite.
        splits: Splits whose pairs get rewrites (default: train, val and test).
        limit: Largest number of pairs, evenly spaced; null for all.
        again: Whether sides that have a rewrite get a new one.
        dry_run: Whether to show the requests and their cost, and ask nothing.
        answers: File that keeps the answers (default: the name of --output with .answers.jsonl behind it).
        teacher: The endpoint.
        filters: Limits of a rewrite.
        gain: The measured gain.
        price: The price of tokens.
    """
    _check(data, table, way, limit, teacher)
    source = open_source(data, table, media, splits)
    refuse_output(output, source.path)
    wanted = SIDES if sides == "both" else (sides,)
    order = Order(way, wanted, teacher, filters, price, again, limit)
    with Answers(answers or answers_file(output), read_only=dry_run or way == "extract") as known:
        return rewrite(Jobs(order, source, known), output, gain, dry_run)


def _check(data: Path | None, table: Path | None, way: Way, limit: int | None, teacher: Teacher) -> None:
    if (data is None) == (table is None):
        raise RimeError("`rime rewrite` needs --data CORPUS or --table FILE, one of them.")
    if limit is not None and limit < 1:
        raise RimeError(f"--limit must be 1 or more, but is {limit}.")
    if way != "extract" and not teacher.model.strip():
        raise RimeError("`rime rewrite` needs --teacher.model NAME, the model at the endpoint.")


def open_source(
    data: Path | None, table: Path | None, media: Path | None, splits: Sequence[str] | None
) -> CorpusSource | TableSource:
    """Return the pairs of a corpus or a table."""
    if table is not None:
        return TableSource(table, media, splits)
    assert data is not None
    if media is not None:
        raise RimeError("--media belongs to --table. The pictures of a corpus are in its tars.")
    return CorpusSource(data, splits)


def rewrite(jobs: Jobs, output: Path, gain: Gain, dry_run: bool) -> int:
    """Look, ask, filter and write; return the exit code."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    source, asks = jobs.source, jobs.order.way != "extract"
    seen = track(range(len(source)), "looking at pairs", transient=True, console=console)
    jobs.look(lambda: next(seen, None))
    for note in source.notes if isinstance(source, TableSource) else ():
        console.print(note)
    if jobs.answers.damaged:
        lines = counted(jobs.answers.damaged, "line holds", "lines hold")
        console.print(f"{jobs.answers.path}: {lines} no whole answer, as after a kill, and are skipped.")
    if asks:
        console.print(estimate(jobs))
    if dry_run:
        console.print(outcomes(Gains(jobs)).terminal())
        return 0
    similarity = None if gain.run is None else similarity_of(gain, console)  # before anything is paid
    if asks and jobs.missing:
        _ask(jobs, console)
    gains = Gains(jobs, similarity, gain.min_gain, gain.drop)
    _write(gains, output, console)
    return _tell(gains, gain, output, console)


def _ask(jobs: Jobs, console: Console) -> None:
    try:
        with Meter(jobs, console) as meter:
            jobs.ask(meter.tick)
    except StoppedError as stopped:
        raise StoppedError(f"stopped. {jobs.kept()} The same command goes on.", stopped.signum) from None
    finally:
        if jobs.spent.answered:
            console.print(f"asked: {spent(jobs)}")
        if jobs.faults:
            tries = ", ".join(f"{count} x {kind}" for kind, count in jobs.faults.most_common())
            console.print(f"tries that failed: {tries}")


def _write(gains: Gains, output: Path, console: Console) -> None:
    source = gains.jobs.source
    if isinstance(source, CorpusSource):
        write_new_corpus(source, gains, output)
    elif isinstance(source, TableSource):
        done = track(range(len(source)), "writing rows", transient=True, console=console)
        write_new_table(source, gains, output, lambda: next(done, None))


def _tell(gains: Gains, gain: Gain, output: Path, console: Console) -> int:
    """Print the counts and what has failed, and return the exit code."""
    console.print(outcomes(gains).terminal())
    jobs = gains.jobs
    if gain.run is not None:
        console.print(measured(gains, gain))
    if jobs.failures:
        console.print(f"{counted(len(jobs.failures), 'request', 'requests')} failed:\n{jobs.failed_lines()}")
    if jobs.broken:
        were = counted(len(jobs.broken), "pair cannot be read and was", "pairs cannot be read and were")
        console.print(
            f"{were} left out" if isinstance(jobs.source, CorpusSource) else f"{were} left as it was"
        )
    if lines := write_unwritten(gains, output):
        console.print(f"without a rewrite: {lines:,}, each with its reason in {unwritten_file(output)}")
    console.print(f"written: {output}")
    new = sum(counts[NEW] for counts in gains.counts().values())
    return int(bool(jobs.keys) and not new)


def outcomes(gains: Gains) -> Table:
    """Return how many sides have come to which end."""
    counts = gains.counts()
    kinds = sorted({kind for each in counts.values() for kind in each}, key=lambda kind: (kind != NEW, kind))
    rows = [[kind, *(f"{counts[side][kind]:,}" for side in counts)] for kind in kinds]
    return Table("rewrites", ["sides", *counts], rows)


def measured(gains: Gains, gain: Gain) -> str:
    """Return how the rewrites have changed the cosines of their pairs."""
    parts = []
    for side in gains.jobs.order.sides:
        found = [value for (_, of), value in gains.found.items() if of == side and not math.isnan(value)]
        if found:
            low = sum(value < gain.min_gain for value in found)
            mean = f"mean {sum(found) / len(found):+.4f}"
            parts.append(f"{side}: {mean} over {len(found):,}, {low:,} below {gain.min_gain:g}")
    missing = sum(map(math.isnan, gains.found.values()))
    parts += [f"not measured: {missing:,}"] if missing else []
    return f"gain in cosine ({gain.mode}, {gain.run}): {'; '.join(parts) or 'nothing to measure'}"


def similarity_of(gain: Gain, console: Console) -> Similarity:
    """Return a function that gives the cosines of pairs under the checkpoint of a run.

    An item without a rewrite is embedded discriminatively. One with a rewrite is embedded in the same mode
    with the rewrite behind its text, or generatively with the rewrite in the place of the model's own.
    """
    from rime_pl.inference.given import (
        encode_given,
    )  # transformers takes seconds, and most calls need no model

    assert gain.run is not None
    model = rime_pl.load(gain.run, gain.device or ("cuda" if cuda.is_available() else "cpu"), gain.base)
    console.print(f"gain: measured with {gain.run} in the {gain.mode} mode")

    def plain(items: Sequence[Item]) -> Tensor:
        return model.encode(items, "discriminative", gain.batch_size)

    def rewritten(items: Sequence[Item]) -> Tensor:
        if gain.mode == "generative":
            return encode_given(model, items, gain.batch_size)
        return plain([replace(item, text=f"{item.text}\n{item.rewrite}".strip()) for item in items])

    def similarity(pairs: Sequence[tuple[Item, Item]]) -> list[float]:
        items = {
            id(item): item for pair in pairs for item in pair
        }  # a side without a rewrite is in several pairs
        without = [item for item in items.values() if item.rewrite is None]
        having = [item for item in items.values() if item.rewrite is not None]
        vectors = _encoded(plain, without) | _encoded(rewritten, having)
        return [
            float(vectors[id(query)] @ vectors[id(target)])
            if id(query) in vectors and id(target) in vectors
            else math.nan
            for query, target in pairs
        ]

    return similarity


def _encoded(encode: Callable[[Sequence[Item]], Tensor], items: Sequence[Item]) -> dict[int, Tensor]:
    """Return the embeddings by the id of the item; none for an item that the model refuses."""
    if not items:
        return {}
    try:
        return {id(item): vector for item, vector in zip(items, encode(items), strict=True)}
    except DataError:
        if len(items) == 1:
            return {}
        half = len(items) // 2
        return _encoded(encode, items[:half]) | _encoded(encode, items[half:])
