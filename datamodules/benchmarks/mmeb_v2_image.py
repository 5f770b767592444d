"""Reads the 36 image tasks of MMEB-V2: classes, questions, retrieval and grounding.

Called by mmeb_v2.py. Each row brings its own candidates, and the right one is always the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems
from rime_pl.datamodules.benchmarks.mmeb_v2_table import MMEBTask, counted
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.rows import (
    MissingFilesError,
    Row,
    file_in,
    find_files,
    open_rows,
    refuse_missing,
    rows_of,
)
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, Name
from rime_pl.datamodules.benchmarks.wording import Layout, item_of, without_mark
from rime_pl.errors import DataError
from rime_pl.types import Item

#: Folders that may hold the rows of the tasks.
_ANNOTATIONS = ("image-query", "image-tasks", "MMEB_Test_Instruct", "image-tasks/MMEB")
_TEXTS = ("cls", "qa", "i2t")  # parsers whose candidates are texts
_STRIPPED = ("qa", "i2i_vg")  # parsers that take spaces off both ends of the query's instruction


@dataclass(frozen=True, slots=True)
class _Words:
    """An item that is not yet opened."""

    layout: Layout
    instruction: str = ""
    text: str | None = None
    picture: str = ""  # path below the folder of the pictures


@dataclass
class _Read:
    """What the rows of a task hold."""

    queries: list[_Words] = field(default_factory=list)
    candidates: Candidates[_Words] = field(default_factory=Candidates)
    pools: list[tuple[int, ...]] = field(default_factory=list)


def read_image_task(task: MMEBTask, root: Path, options: ReadOptions) -> BenchmarkTask:
    """Return an image task.

    Raises:
        MissingFilesError: If there are no annotations, or no folder of pictures.
        DataError: If a row cannot be used, or pictures are missing.
    """
    places = [f"{folder}/{task.annotations}/{task.split}-*.parquet" for folder in _ANNOTATIONS]
    paths = find_files(root, places, f"{task.name}: the rows of {task.hub}")
    read = _Read()
    for _, row in rows_of(open_rows(root, paths)):
        _add(read, task, row)
    folder = _folder_of_pictures(root, task.name, read)
    pictures = dict.fromkeys(one.picture for one in (*read.queries, *read.candidates.rows) if one.picture)
    refuse_missing(folder, pictures, task.name)

    def make(words: _Words) -> Item:
        media: tuple[Any, ...] = (file_in(folder, words.picture),) if words.picture else ()
        return item_of(options, words.layout, words.instruction, words.text, media)

    sizes = {len(pool) for pool in read.pools}
    return BenchmarkTask(
        *("mmeb-v2", task.name, task.modality, task.group, task.metric),
        LazyItems(read.queries, make),
        LazyItems(read.candidates.rows, make),
        read.candidates.names,
        [{pool[0]: 1.0} for pool in read.pools],
        read.pools,
        version=options.told,
        notes=[*counted(task, len(read.queries)), *_sizes_that_differ(task, sizes)],
    )


def _sizes_that_differ(task: MMEBTask, sizes: set[int]) -> list[str]:
    if sizes <= {int(task.pool_size)}:
        return []
    found = " to ".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    return [f"a query has {found} candidates, but officially {task.pool_size}"]


def _add(read: _Read, task: MMEBTask, row: Row) -> None:
    """Add the query and the candidates of a row."""
    instruction = without_mark(row.text_or("qry_inst", task.query_instruction))
    if task.parser in _STRIPPED:
        instruction = instruction.strip()
    text = row.text("qry_text")
    if task.parser == "t2i":
        layout: Layout = "dialogue query" if task.name == "VisDial" else "text query"
        read.queries.append(_Words(layout, instruction, text))
    else:
        read.queries.append(_Words("picture query", instruction, text, _path(row, row.text("qry_img_path"))))
    targets = _texts(row) if task.parser in _TEXTS else _pictures(task, row)
    read.pools.append(tuple(read.candidates.add(name, words) for name, words in targets))


def _texts(row: Row) -> Sequence[tuple[Name, _Words]]:
    return [(text, _Words("raw", text=text)) for text in row.texts("tgt_text")]


def _pictures(task: MMEBTask, row: Row) -> Sequence[tuple[Name, _Words]]:
    """Return the names and words of the pictures of a row."""
    captions, paths = row.texts("tgt_text"), row.texts("tgt_img_path")
    if len(captions) != len(paths):
        raise DataError(
            f"{row.where}: 'tgt_text' and 'tgt_img_path' must have the same length, but have {len(captions)} "
            f"and {len(paths)}."
        )
    instruction = without_mark(row.text_or("tgt_inst", task.target_instruction))
    captioned = bool(captions[0].strip())
    layout: Layout = "picture" if captioned or task.parser == "t2i" else "crop"
    found: list[tuple[Name, _Words]] = []
    for caption, path in zip(captions, paths, strict=True):
        name = path if task.parser == "t2i" else path + ":" + caption.strip('"')
        words = _Words(layout, instruction, caption if captioned else None, _path(row, path))
        found.append((name, words))
    return found


def _path(row: Row, path: str) -> str:
    if not path.strip():
        raise DataError(f"{row.where} must name a picture, but the path is empty.")
    return path


def _folder_of_pictures(root: Path, name: str, read: _Read) -> Path:
    """Return the folder that the paths begin in: where the first picture is."""
    first = next((one.picture for one in (*read.queries, *read.candidates.rows) if one.picture), "")
    folders = [root / "image-tasks", root / "image-tasks" / "MMEB"]
    for folder in folders:
        if (folder / first).parent.is_dir():
            return folder
    tried = ", ".join(str(folder / first) for folder in folders)
    raise MissingFilesError(f"{name}: its pictures must be there, but there is none of: {tried}.", "DIR_N/A")
