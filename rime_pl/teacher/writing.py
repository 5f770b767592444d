"""Writes what has come out: a corpus or a table with rewrites, and the list of sides that got none.

Called by the command. Nothing is written before all is asked, and what was there stays if that fails.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.table import COLUMNS
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import RimeError
from rime_pl.teacher.gains import Gains
from rime_pl.teacher.jobs import HAS_ONE, NEW, Jobs
from rime_pl.teacher.sources import CorpusSource, TableSource
from rime_pl.types import Side

_SIDES: tuple[Side, ...] = ("query", "target")


def answers_file(output: Path) -> Path:
    """Return the file of the answers next to an output."""
    return output.with_name(f"{output.name}.answers.jsonl")


def unwritten_file(output: Path) -> Path:
    """Return the file next to an output that lists the sides without a rewrite."""
    return output.with_name(f"{output.name}.unwritten.txt")


def refuse_output(output: Path, source: Path) -> None:
    """Raise a RimeError if an output would take the place of what it is made from, or of another file."""
    if output.resolve() == source.resolve():
        raise RimeError(f"--output must be another place than the input, but both are {source}.")
    if source.is_dir():
        if source.resolve() in output.resolve().parents or output.resolve() in source.resolve().parents:
            raise RimeError(
                f"--output must be a folder of its own, but {output} and {source} hold each other."
            )
        return
    if output.suffix.lower() != source.suffix.lower():
        raise RimeError(
            f"--output must end in {source.suffix}, like the table, but is {output}. `rime shards folder` "
            "makes a corpus of it."
        )
    if output.exists():
        raise RimeError(f"--output must be a new file, but {output} exists. Delete it, or give another name.")


def write_new_corpus(source: CorpusSource, gains: Gains, output: Path) -> None:
    """Copy a corpus with its new rewrites; a sample that cannot be read is left out and in broken.txt.

    Raises:
        RimeError: If ``output`` holds other files, or cannot be written.
    """
    corpus, jobs = source.corpus, gains.jobs
    splits = {split: gains.pairs(rows) for split, rows in source.ranges.items()}
    totals = {split: len(rows) for split, rows in source.ranges.items()}
    name, licence = (str(corpus.get(field) or "not stated") for field in ("name", "licence"))
    seed = corpus["seed"] if isinstance(corpus.get("seed"), int) else 0
    arguments = _arguments(source, gains)
    broken = jobs.broken.values()
    write_corpus(output, name, licence, splits, totals, seed, arguments, left_out=lambda: list(broken))


def _arguments(source: CorpusSource, gains: Gains) -> dict[str, Any]:
    """Return what made the rewrites, to be recorded."""
    order = gains.jobs.order
    prompts = json.dumps(gains.jobs.prompts, sort_keys=True).encode()
    made = {"way": order.way, "sides": list(order.sides), "corpus": source.corpus["data_hash"]}
    if order.way != "extract":
        made |= {"model": order.teacher.model, "prompts": hashlib.sha256(prompts).hexdigest()}
    return {**dict(source.corpus.get("arguments") or {}), "rewrites": made}


def write_new_table(source: TableSource, gains: Gains, output: Path, each: Callable[[], object]) -> None:
    """Write a table again with its new rewrites; all other values stay as they were."""
    rows: list[dict[str, Any]] = []
    for row, pair in zip(source.rows, gains.pairs(range(len(source))), strict=True):
        values = dict(row.values)
        for side in _SIDES:
            item = None if pair is None else (pair.query if side == "query" else pair.target)
            if item is not None and (len(rows), side) in gains.jobs.keys:
                values |= {f"{side}_rewrite": item.rewrite or "", f"{side}_cot": item.cot or ""}
        rows.append({name: value for name, value in values.items() if value or name in row.values})
        each()
    if output.suffix.lower() == ".jsonl":
        write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(output, text.getvalue())


def write_unwritten(gains: Gains, output: Path) -> int:
    """List each side that has no rewrite in a file, with the reason, and return how many there are."""
    jobs: Jobs = gains.jobs
    lines = []
    for number, side in sorted({*jobs.left, *jobs.keys}):
        kind, says = gains.outcome(number, side)
        if kind not in (NEW, HAS_ONE):
            lines.append(f"{jobs.source.name(number)} ({side}): {kind}: {' '.join(says.split())}")
    lines += jobs.broken.values()
    file = unwritten_file(output)
    if lines:
        write_whole(file, "\n".join(lines) + "\n")
    else:
        file.unlink(missing_ok=True)
    return len(lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, as UTF-8 and with the line ends of the text."""
    half_written = path.with_name(f".{path.name}.half")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        half_written.write_text(text, encoding="utf-8", newline="", errors="backslashreplace")
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)
