"""Reads the 24 tasks of MMEB-V2 that find pages of documents (ViDoRe, VisRAG, ViDoSeek, MMLongBench).

Called by mmeb_v2.py. Each has three tables: queries, corpus and qrels, which say how relevant a page is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems, StoredPictures
from rime_pl.datamodules.benchmarks.mmeb_v2_table import FIXED, MMEBTask, counted
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.qrels import labels_of, read_qrels
from rime_pl.datamodules.benchmarks.rows import (
    file_in,
    find_files,
    find_folder,
    open_rows,
    refuse_missing,
    rows_of,
)
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, Name
from rime_pl.datamodules.benchmarks.wording import item_of
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.datamodules.builders.sources.records import Place
from rime_pl.types import Item, Page

_DATA = "visdoc-tasks/data"
#: Folders of the page sets as they were before they were corrected in 2025-11.
_BROKEN = {"ViDoSeek-page": ("ViDoSeek-page",), "MMLongBench-page": ("MMLongBench-page", "MMLongBench")}
_FIXED_SCORE = 3  # the only score of a corrected page set, as far as known
_STEM = 50  # characters of a page's name that its file keeps


def read_documents(task: MMEBTask, root: Path, options: ReadOptions) -> BenchmarkTask:
    """Return a task that finds pages of documents.

    Candidates stand in the order of the corpus. Officially, the right ones of the first queries come first.

    Raises:
        MissingFilesError: If a table is missing, or the pages lie nowhere.
        DataError: If a row cannot be used, a query has no label, or a label is not in the corpus.
    """
    folders = [f"{_DATA}/{name}" for name in (task.annotations, *_BROKEN.get(task.name, ()))]
    folder = find_folder(root, folders, f"{task.name}: the tables of {task.hub}")
    tables = {
        table: find_files(folder, [f"{table}/{task.split}-*.parquet"], f"{task.name}: the table {table!r}")
        for table in ("queries", "corpus", "qrels")
    }
    queries: list[tuple[Name, str]] = []
    for _, row in rows_of(open_rows(root, tables["queries"], ("query-id", "query"))):
        queries.append((row.name("query-id"), row.text("query")))
    candidates, pages = _corpus(task, root, tables["corpus"])
    qrels = read_qrels(root, tables["qrels"], ("query-id",), ("corpus-id",))
    labels, notes = labels_of(task.name, [name for name, _ in queries], candidates.places, qrels)

    def ask(row: tuple[Name, str]) -> Item:
        return item_of(options, "words", task.query_instruction, row[1])

    def show(row: tuple[Name, int, Place]) -> Item:
        return item_of(options, "clip", task.target_instruction, None, (Page(pages(row)),))

    grades = {grade for label in labels for grade in label.values()}
    name, version, more = _version(task, folder.name, grades)
    return BenchmarkTask(
        *("mmeb-v2", name, task.modality, task.group, task.metric),
        LazyItems(queries, ask),
        LazyItems(candidates.rows, show),
        candidates.names,
        labels,
        version=f"{version}{options.told}",
        notes=[*counted(task, len(queries)), *notes, *candidates.notes, *more],
    )


def _version(task: MMEBTask, folder: str, grades: set[float]) -> tuple[str, str, list[str]]:
    """Return the key of the report, the version of the data, and what is doubtful about it."""
    if task.name not in FIXED:
        return task.name, "", []
    fixed = folder == task.annotations
    seems = grades == {_FIXED_SCORE}
    doubts = []
    if fixed != seems:
        found = ", ".join(f"{grade:g}" for grade in sorted(grades))
        doubts = [
            f"the folder is {folder}, but corrected page sets seem to hold only the score {_FIXED_SCORE}, "
            f"and these labels hold {found}: check where the data come from"
        ]
    if fixed:
        return FIXED[task.name], "page sets fixed (2025-11); ", doubts
    said = f"page sets broken: download {task.hub}. Scores are not comparable"
    return task.name, "page sets broken; ", [said, *doubts]


class _Pages:
    """Pages of a corpus, from its Parquet files or from the files that the official code dumped."""

    def __init__(self, stored: StoredPictures | None, folder: Path, task: MMEBTask) -> None:
        self.stored, self.folder, self.task = stored, folder, task

    def __call__(self, row: tuple[Name, int, Place]) -> Any:
        name, file, place = row
        if self.stored is not None:
            picture: Image = self.stored(file, place)
            return picture
        return file_in(self.folder, file_of_page(name, self.task.parser))


def file_of_page(name: Name, parser: str) -> str:
    """Return the file that the official code dumps a page to.

    >>> file_of_page(7, "vidore"), file_of_page("page 7.png", "visrag")
    ('7.png', 'page 7_a321c3bb.png')
    """
    if parser == "vidore":
        return f"{name}.png"
    stem, suffix = os.path.splitext(str(name))  # noqa: PTH122 - a name that ends in a dot counts as officially
    return f"{stem[:_STEM]}_{hashlib.md5(str(name).encode()).hexdigest()[:8]}{suffix}"


def _corpus(
    task: MMEBTask, root: Path, paths: Sequence[Path]
) -> tuple[Candidates[tuple[Name, int, Place]], _Pages]:
    """Return the pages of a corpus, and where their pictures are."""
    inside = "image" in ParquetFile(paths[0], paths[0].name).columns
    files = open_rows(root, paths, ("corpus-id",), ("image",) if inside else ())
    stored = (
        StoredPictures([file for file in files if isinstance(file, ParquetFile)], "image") if inside else None
    )
    candidates: Candidates[tuple[Name, int, Place]] = Candidates()
    for number, row in rows_of(files):
        if stored is not None:
            stored.add(number, row.place)
        candidates.add(row.name("corpus-id"), (row.name("corpus-id"), number, row.place))
    folder = root
    if stored is None:
        names = [f"visdoc-tasks/images/{task.folder}", f"visdoc-tasks/{task.folder}"]
        what = f"{task.name}: the corpus has no column 'image', so a folder of pages"
        folder = find_folder(root, names, what)
        refuse_missing(folder, [file_of_page(name, task.parser) for name in candidates.names], task.name)
    return candidates, _Pages(stored, folder, task)
