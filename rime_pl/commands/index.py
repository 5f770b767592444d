"""`rime index photos --output photos.index`: embed a collection once, and search it ever after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from rime_pl.bars import Bar
from rime_pl.commands.conflicts import INDEX, refuse_ignored
from rime_pl.commands.search import load_with_tasks
from rime_pl.commands.search_index import choose_run
from rime_pl.datamodules.corpus_file import CORPUS_FILE
from rime_pl.datamodules.faults import counted, first_lines, printable
from rime_pl.errors import RimeError
from rime_pl.inference import collection
from rime_pl.inference.collection import Each, Scan
from rime_pl.inference.corpus_targets import scan_corpus
from rime_pl.inference.index import Counts, refuse_other_folder, update_index
from rime_pl.inference.index_folder import PART, Facts, IndexFolder
from rime_pl.inference.index_import import import_vectors
from rime_pl.inference.indexed_media import CorpusTargets, Files
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.sources import SUFFIXES, VIDEO_SUFFIXES
from rime_pl.inference.table_items import TABLES, scan_table
from rime_pl.options.parser import parse_with_optional
from rime_pl.run_folder import RunFolder
from rime_pl.types import Mode


def parse(function: Any, prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments; the source is left out if vectors are read from a file."""
    return refuse_ignored(INDEX, function, parse_with_optional(function, prog, words, "from_parquet"))


@dataclass(frozen=True)
class IndexedSettings:
    """What is indexed, and how.

    Args:
        splits: Splits of a corpus (default: of a built-in one test and distractors, of others all).
        galleries: Galleries of a corpus, such as pictures (default: all).
        mode: Vectors of each item; both lets every mode pair be searched.
        dtype: Numbers of the vectors; float16 takes half the space.
        task: Task whose target instruction is used (default: the first that asks in words alone for a
            picture).
        instruction: Instruction of the items in the place of the task's.
        batch_size: Items encoded at a time.
        part_size: Items of a part; a stop loses one at most.
    """

    splits: list[str] | None = None
    galleries: list[str] | None = None
    mode: Literal["both", "discriminative"] = "both"
    dtype: Literal["float32", "float16"] = "float32"
    task: str | None = None
    instruction: str | None = None
    batch_size: int = 32
    part_size: int = PART

    def facts(self, retriever: Retriever, stage: RunFolder) -> Facts:
        """Return what index.json will say of an index that the model of a run makes."""
        wording = self.instruction
        if wording is None:
            wording = retriever.instruction("target", self.task) if retriever.tasks or self.task else ""
        modes: list[Mode] = list(MODES) if self.mode == "both" else ["discriminative"]
        made_by = str(stage.path.absolute())
        return Facts(retriever.name, retriever.dimension, modes, wording, self.dtype, run=made_by)


def run(
    source: str,
    *,
    output: Path,
    run: Path | None = None,
    media: Path | None = None,
    from_parquet: Path | None = None,
    device: str | None = None,
    base: str | None = None,
    common: IndexedSettings = IndexedSettings(),
) -> int:
    """Embed a collection with a trained model, into a folder that `rime search --index` searches.

    The same command again embeds only what is new or has changed, and drops what has gone. It also goes on
    after a stop. Items that cannot be used are counted and listed in unusable.jsonl of the index.

    Args:
        source: A folder of pictures, videos and PDF files; one such file; a table (JSONL or Parquet); a text
            file with an item on each line (.txt); or a corpus.
        output: Folder of the index.
        run: Folder of a run (default: the one that made the index if it is there, or else the one in runs/
            that finished last).
        media: Folder of the files that a table names (default: that of the table).
        from_parquet: Parquet file with vectors that this model made elsewhere, in the place of the source.
            It has the columns id, disc and gen or one of them, and if you like rewrite, media and text.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
        common: What is indexed, and how.
    """
    _check(source, from_parquet, common)
    refuse_other_folder(IndexFolder(output))  # before minutes go into the scan
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    there = output if IndexFolder(output).facts_file.is_file() else None
    stage = choose_run(run, console, there, to_build=True)
    if from_parquet is not None:
        about = common.facts(load_with_tasks(stage, device, base, console), stage)
        with _bar() as bar:
            counts, notes = import_vectors(output, from_parquet, about, media, _each(bar, "reading"))
        _tell(console, output, counts, notes)
        return 0
    with _bar() as bar:
        scan = scan_source(Path(source), media, common, _each(bar, "looking"))
    _refuse_unused_instruction(scan, common)
    retriever = load_with_tasks(stage, device, base, console)
    counts = _embed(scan, output, retriever, common.facts(retriever, stage), common)
    _tell(console, output, counts, scan.notes)
    return 0


def _check(source: str, from_parquet: Path | None, given: IndexedSettings) -> None:
    for name in ("batch_size", "part_size"):
        if getattr(given, name) < 1:
            raise RimeError(f"--{name} must be 1 or more, but is {getattr(given, name)}.")
    if from_parquet is None and not source:
        raise RimeError("The source must be a folder or a file, but is empty.")
    if from_parquet is not None and not from_parquet.is_file():
        raise RimeError(f"--from_parquet must be a Parquet file, but there is none: {from_parquet}.")


def _refuse_unused_instruction(scan: Scan, given: IndexedSettings) -> None:
    """Tell how many items have an instruction of their own, next to which that of the user is nothing."""
    name = "--task" if given.instruction is None else "--instruction"
    own = sum(bool(record.instruction) for record in scan.records)
    if not own or (given.instruction is None and given.task is None):
        return
    if own == len(scan.records):
        raise RimeError(
            f"{name} has no effect, because each item has an instruction of its own. Leave it out."
        )
    scan.notes.append(
        f"{counted(own, 'item keeps its', 'items keep their')} own instruction in the place of {name}."
    )


def _embed(scan: Scan, output: Path, retriever: Retriever, about: Facts, given: IndexedSettings) -> Counts:
    most = retriever.backbone.processor.prompt.media_limit
    scan.records = list(collection.checked_media(scan.records, most, scan))
    opens = CorpusTargets(scan.root, most) if scan.kind == "corpus" else Files(scan.root)
    sizes = given.batch_size, given.part_size
    with _bar() as bar:
        each = _each(bar, "embedding")
        return update_index(output, scan, opens, retriever, about, *sizes, each)


def scan_source(
    source: Path, media: Path | None, given: IndexedSettings, each: Each = lambda done, total: None
) -> Scan:
    """Return the items of whatever a source is.

    Raises:
        RimeError: If it is nothing that can be indexed.
    """
    kind = source.suffix.lower()
    if (source / CORPUS_FILE).is_file():
        return scan_corpus(source, given.splits, given.galleries, each)
    if source.is_dir():
        return collection.scan_folder(source, each)
    if not source.is_file():
        raise RimeError(f"{source} must be a folder or a file, but there is none.")
    if kind in TABLES:
        return scan_table(source, media, each)
    if kind in collection.TEXTS:
        return collection.scan_texts(source, each)
    if kind in SUFFIXES | VIDEO_SUFFIXES | collection.DOCUMENTS:
        return collection.scan_file(source)
    known = sorted(TABLES | collection.TEXTS | SUFFIXES | VIDEO_SUFFIXES | collection.DOCUMENTS)
    raise RimeError(f"{source} must end in {', '.join(known)}, or be a folder, but ends in {kind!r}.")


def _bar() -> Bar:
    return Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def _each(bar: Bar, title: str) -> Each:
    """Return what moves the bar."""
    task = bar.add_task(title, total=None)

    def each(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    return each


def _tell(console: Console, output: Path, counts: Counts, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(printable(note))
    told = [
        f"{number} {word}"
        for word in ("embedded", "kept", "renamed", "copied", "dropped", "changed")
        if (number := getattr(counts, word)) or word == "embedded"
    ]
    console.print(f"index: {output}   {counted(counts.total, 'item', 'items')} ({', '.join(told)})")
    if counts.unusable:
        were = counted(counts.unusable, "item cannot be used and was", "items cannot be used and were")
        file = IndexFolder(output).unusable
        console.print(f"{were} left out. {file} lists them all:\n{first_lines(_reasons(file))}")


def _reasons(file: Path) -> list[str]:
    rows = map(json.loads, file.read_text().splitlines())
    return [row["reason"] if row["id"] in row["reason"] else f"{row['id']}: {row['reason']}" for row in rows]
