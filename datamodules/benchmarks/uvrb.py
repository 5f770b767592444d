"""Reads UVRB, the universal video retrieval benchmark: 16 data sets of texts, pictures and clips.

Called by reading.py. The official card was not found, so the layout is that of an independent reader; what
does not fit it is refused.

Source: Alibaba-NLP/UVRB.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from rime_pl.datamodules.benchmarks.frames import clip_in
from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.qrels import repeated
from rime_pl.datamodules.benchmarks.rows import (
    Row,
    file_in,
    find_files,
    find_folder,
    open_rows,
    refuse_missing,
    rows_of,
)
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, Name
from rime_pl.datamodules.benchmarks.wording import item_of
from rime_pl.datamodules.builders.sources.paths import folder_below
from rime_pl.errors import DataError
from rime_pl.types import Item

#: Data sets that rank ten candidates for each query.
_LOCAL = ("MS-TI", "MS-TV")
#: Fields that may list these candidates. Which one the official files use is not known.
_POOL_FIELDS = ("candidates", "cands", "pool")
_NEGATIVE_FIELDS = ("neg", "negs", "negatives")
_POOL = 10
#: What a query must have, where it is not a text only.
_FIELDS = {
    "MSRVTT-I2V": ("image",),
    "LoVR-C2V": ("video",),
    "MS-TI": ("text", "image"),
    "MS-TV": ("text", "video"),
}


@dataclass(frozen=True)
class UVRBTask:
    """One data set of UVRB."""

    name: str
    group: str  # the ability: CG, S, T, PR, LC, CMP or VIS
    queries: int  # official number
    corpus: int  # official number
    metric: str
    instruction: str


@lru_cache(maxsize=1)
def uvrb_table() -> tuple[UVRBTask, ...]:
    """Return the data sets in the order of the paper's table."""
    text = files("rime_pl.datamodules.benchmarks").joinpath("uvrb_tasks.csv").read_text("utf-8")
    return tuple(
        UVRBTask(
            *(row["name"], row["group"], int(row["queries"]), int(row["corpus"])),
            *(row["metric"], row["instruction"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A query or a clip of the corpus, not yet opened."""

    name: Name
    text: str = ""
    picture: str = ""  # below images/
    video: str = ""  # below the folder of the videos


class _Media:
    """Pictures, and videos as folders of frames or as files."""

    def __init__(self, task: UVRBTask, folder: Path, entries: Sequence[_Entry], pad: bool) -> None:
        self.folder, self.pad = folder, pad
        videos = dict.fromkeys(one.video for one in entries if one.video and not one.picture)
        places = ("videos_frames", "videos")
        self.videos = find_folder(folder, places, f"{task.name}: its videos") if videos else folder
        self.raw = self.videos.name == "videos"
        if self.raw:
            refuse_missing(self.videos, videos, task.name)
        else:
            refuse_missing(self.videos, dict.fromkeys(map(_frames_of, videos)), task.name, folder_below)
        self.pictures = dict.fromkeys(one.picture for one in entries if one.picture)
        if self.pictures:
            find_folder(folder, ("images",), f"{task.name}: its pictures")
            refuse_missing(folder / "images", self.pictures, task.name)

    def __call__(self, entry: _Entry) -> tuple[Any, ...]:
        if entry.picture:
            return (file_in(self.folder / "images", entry.picture),)
        if not entry.video:
            return ()
        if self.raw:
            return (file_in(self.videos, entry.video),)
        return (clip_in(self.videos, _frames_of(entry.video), self.pad),)

    @property
    def notes(self) -> list[str]:
        """What differs from the official frames."""
        if not self.raw:
            return []
        return ["frames are taken from the middles of 8 equal parts of each raw video, not from saved frames"]


def _frames_of(video: str) -> str:
    """Return the folder of a video's frames: its path without the extension.

    >>> _frames_of("a/b.mp4")
    'a/b'
    """
    return str(PurePosixPath(video).with_suffix("")) if PurePosixPath(video).name else video


def read_uvrb(task: UVRBTask, root: Path, options: ReadOptions) -> BenchmarkTask:
    """Return a data set of UVRB as a task.

    Args:
        task: Which data set.
        root: Folder with one folder for each data set.
        options: How it is read.

    Raises:
        MissingFilesError: If files are missing.
        DataError: If a row cannot be used, a label is not in the corpus, or MS-TI and MS-TV do not say which
            ten candidates a query has.
    """
    places = [f"{task.name}/UVRB/{task.name}", f"UVRB/{task.name}", task.name]
    folder = find_folder(root, [f"{place}/jsonl" for place in places], f"{task.name}: its rows").parent
    corpus: Candidates[_Entry] = Candidates()
    for row in _rows(task, folder, "corpus"):
        if not (video := _given(row, "video")):
            raise DataError(f"{task.name}: {row.where} must name a video in 'video', but names none.")
        corpus.add(row.name("id"), _Entry(row.name("id"), video=video))
    right, pools = _instances(task, folder, corpus)
    queries = [_query(task, row, right) for row in _rows(task, folder, "queries")]
    asked = [one for one in queries if one.name in right]
    if unknown := right.keys() - {one.name for one in queries}:
        raise DataError(
            f"{task.name}: each 'qid' must be a query, but {sorted(map(str, unknown))[:3]} are not."
        )
    media = _Media(task, folder, [*asked, *corpus.rows], options.pad_clips)

    def ask(entry: _Entry) -> Item:
        return item_of(options, "words", task.instruction, entry.text, media(entry))

    def show(entry: _Entry) -> Item:
        return item_of(options, "raw", "", "", media(entry))

    return BenchmarkTask(
        *("uvrb", task.name, "video", task.group, task.metric),
        LazyItems(asked, ask),
        LazyItems(corpus.rows, show),
        corpus.names,
        [dict.fromkeys(right[one.name], 1.0) for one in asked],
        [pools[one.name] for one in asked] if pools else None,
        version=options.told_of_clips,
        notes=[*_counted(task, asked, queries, corpus), *corpus.notes, *media.notes],
    )


def _rows(task: UVRBTask, folder: Path, table: str) -> list[Row]:
    paths = find_files(folder, [f"jsonl/{table}.jsonl"], f"{task.name}: the table {table!r}")
    return [row for _, row in rows_of(open_rows(folder, paths))]


def _given(row: Row, field: str) -> str:
    """Return a text that may be missing, null or empty."""
    return row.text_or(field, "").strip()


def _query(task: UVRBTask, row: Row, right: Mapping[Name, object]) -> _Entry:
    """Return a query; one that is asked must have all that the queries of its data set consist of."""
    entry = _Entry(row.name("id"), row.text_or("text", ""), _given(row, "image"), _given(row, "video"))
    needed = _FIELDS.get(task.name, ("text",))
    if entry.name in right and (lacking := [field for field in needed if not _given(row, field)]):
        raise DataError(
            f"{task.name}: {row.where} must have {' and '.join(map(repr, needed))}, because its queries "
            f"consist of that, but {lacking[0]!r} is missing or empty."
        )
    return entry


def _instances(
    task: UVRBTask, folder: Path, corpus: Candidates[_Entry]
) -> tuple[dict[Name, dict[int, None]], dict[Name, tuple[int, ...]]]:
    """Return places of the right clips of each query, and its candidates where they are local."""
    right: dict[Name, dict[int, None]] = {}
    pools: dict[Name, dict[int, None]] = {}
    for row in _rows(task, folder, "instances"):
        query, places = row.name("qid"), _places(row, "pos", corpus)
        if not places:
            continue  # officially without a right clip, and not asked
        right.setdefault(query, {}).update(dict.fromkeys(places))
        if task.name in _LOCAL:
            pools.setdefault(query, {}).update(dict.fromkeys(_pool(task, row, corpus)))
    pools = {query: {**right[query], **pool} for query, pool in pools.items()}
    if odd := [query for query, pool in pools.items() if len(pool) != _POOL]:
        raise DataError(
            f"{task.name}: each query must have {_POOL} candidates, but {odd[0]!r} has {len(pools[odd[0]])}."
        )
    return right, {query: tuple(pool) for query, pool in pools.items()}


def _pool(task: UVRBTask, row: Row, corpus: Candidates[_Entry]) -> Sequence[int]:
    """Return places of the candidates of a query of MS-TI or MS-TV."""
    for field in (*_POOL_FIELDS, *_NEGATIVE_FIELDS):
        if field in row.values:
            return _places(row, field, corpus)
    if len(corpus.rows) == _POOL:
        return range(_POOL)
    raise DataError(
        f"{row.where}: {task.name} ranks {_POOL} candidates for each query, which must be listed in one of "
        f"{[*_POOL_FIELDS, *_NEGATIVE_FIELDS]}, but the fields are {sorted(row.values)}. The whole corpus of "
        f"{len(corpus.rows):,} clips would give another number."
    )


def _places(row: Row, field: str, corpus: Candidates[_Entry]) -> list[int]:
    names = row.list(field)
    unknown = [name for name in names if not isinstance(name, str | int) or name not in corpus.places]
    if unknown:
        raise DataError(
            f"{row.where}: each of {field!r} must be an id of the corpus, but {unknown[:3]!r} are not."
        )
    return [corpus.places[name] for name in names]


def _counted(
    task: UVRBTask, asked: Sequence[_Entry], queries: Sequence[_Entry], corpus: Candidates[_Entry]
) -> list[str]:
    notes = []
    for what, read, official in (
        ("queries", len(queries), task.queries),
        ("clips", len(corpus.rows), task.corpus),
    ):
        if read != official:
            notes.append(f"{read:,} {what} were read, but officially there are {official:,}")
    notes += repeated([one.name for one in asked])
    if len(asked) < len(queries):
        notes.append(f"{len(queries) - len(asked):,} queries have no right clip, and are not asked")
    return notes
