"""Finds rows and frames of the 18 video tasks of MMEB-V2, and reads classes and retrieval.

Called by mmeb_v2.py and by the readers of questions and moments beside it. Raw videos are never needed: the
official archives hold up to 64 frames of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rime_pl.datamodules.benchmarks.frames import clip_in
from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems
from rime_pl.datamodules.benchmarks.mmeb_v2_table import CLASSES, MMEBTask, counted
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.rows import (
    Row,
    find_files,
    find_folder,
    open_rows,
    refuse_missing,
    rows_of,
)
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, Name
from rime_pl.datamodules.benchmarks.wording import Layout, item_of
from rime_pl.datamodules.builders.sources.paths import folder_below
from rime_pl.errors import DataError
from rime_pl.types import Item

_DATA = "video-tasks/data"
_FRAMES = "video-tasks/frames"
#: Where the archive of retrieval keeps its folders.
_INNER = "data/ziyan/video_retrieval"
#: The official code reads so many rows of SmthSmthV2.
_MOST_ROWS = {"SmthSmthV2": 1000}
#: Columns of the retrieval tasks: what names the video, and the text.
_RETRIEVAL = {
    "DiDeMo": ("video", "caption"),
    "MSR-VTT": ("video_id", "caption"),
    "MSVD": ("video_id", "caption"),
    "VATEX": ("videoID", "enCap"),
    "YouCook2": ("id", "sentence"),
}


@dataclass(frozen=True, slots=True)
class ClipWords:
    """An item of words, a clip, or both, not yet opened."""

    layout: Layout
    instruction: str = ""
    text: str | None = None
    folder: str = ""  # of the frames, below that of the task; "": no clip


class VideoTask:
    """What the readers of all video tasks need.

    Args:
        task: Row of the table.
        root: Folder of the benchmark.
        options: How tasks are read.
    """

    def __init__(self, task: MMEBTask, root: Path, options: ReadOptions) -> None:
        self.task, self.root, self.options = task, root, options

    def rows(
        self, columns: Sequence[str], optional: Sequence[str] = (), places: Sequence[str] = ()
    ) -> Iterator[Row]:
        """Yield the rows of the annotations, JSON lines or Parquet.

        Args:
            columns: Fields that are read; a Parquet file must have them.
            optional: Further fields, read if they are there.
            places: Files to look for (default: those of the task).

        Raises:
            MissingFilesError: If there are none.
            DataError: If a row is malformed.
        """
        task = self.task
        paths = find_files(self.root, places or self._places(), f"{task.name}: the rows of {task.hub}")
        for number, (_, row) in enumerate(rows_of(open_rows(self.root, paths, columns, (), optional))):
            if number == _MOST_ROWS.get(task.name):
                return
            yield row

    def _places(self) -> list[str]:
        task = self.task
        stem = PurePosixPath(task.annotations).stem
        folders = [f"{_DATA}/{name}" for name in dict.fromkeys((stem, task.name, task.repository))]
        inner = (task.subset,) if task.subset else ("data", "")
        parquet = [
            "/".join(part for part in (folder, one, f"{task.split}-*.parquet") if part)
            for folder in folders
            for one in inner
        ]
        return [f"{_DATA}/{task.annotations}", f"{_DATA}/{stem}.parquet", *parquet]

    def frames(self) -> Path:
        """Return the folder of the frames, which has several places and spellings in the wild."""
        folder = PurePosixPath(self.task.folder)
        spellings = dict.fromkeys(
            (
                folder.name,
                folder.name.replace("_", "-"),
                *(("egoschema",) if folder.name == "EgoSchema" else ()),
            )
        )
        names = []
        for name in spellings:
            names.append(f"{_FRAMES}/{folder.parent}/{name}")
            if self.task.parser == "ret":
                names.append(f"{_FRAMES}/{folder.parent}/{_INNER}/{name}/frames")
                names.append(f"{_FRAMES}/{_INNER}/{name}/frames")
            names.append(f"{_FRAMES}/{name}")
        return find_folder(self.root, names, f"{self.task.name}: the folder of its frames")

    def items(self, frames: Path, rows: Sequence[ClipWords], every: bool = False) -> LazyItems[ClipWords]:
        """Return the items of some rows; see ``clip_in`` for ``every``."""

        def make(words: ClipWords) -> Item:
            media: tuple[Any, ...] = ()
            if words.folder:
                media = (clip_in(frames, words.folder, self.options.pad_clips, every),)
            return item_of(self.options, words.layout, words.instruction, words.text, media)

        return LazyItems(rows, make)

    def refuse_missing(self, frames: Path, rows: Sequence[ClipWords]) -> None:
        """Raise a DataError if folders of frames are missing."""
        folders = dict.fromkeys(one.folder for one in rows if one.folder)
        refuse_missing(frames, folders, self.task.name, folder_below)

    def finished(
        self,
        queries: Sequence[Item],
        candidates: Sequence[Item],
        names: Sequence[Name],
        labels: Sequence[dict[int, float]],
        pools: Sequence[Sequence[int]] | None = None,
        **more: Any,
    ) -> BenchmarkTask:
        """Return the task; ``more`` are further fields of it."""
        task = self.task
        more.setdefault("version", self.options.told_of_clips)
        return BenchmarkTask(
            *("mmeb-v2", task.name, task.modality, task.group, task.metric),
            *(queries, candidates, names, labels, pools),
            **more,
        )


def read_classes(video: VideoTask) -> BenchmarkTask:
    """Return a task that finds the class of a clip among all classes: those of the rows, then the others.

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used.
    """
    task, frames = video.task, video.frames()
    queries: list[ClipWords] = []
    candidates: Candidates[ClipWords] = Candidates()
    labels = []
    for row in video.rows(("video_id", "pos_text")):
        queries.append(ClipWords("clip", task.query_instruction, None, str(row.name("video_id"))))
        label = row.text("pos_text")
        labels.append({candidates.add(label, ClipWords("raw", text=label)): 1.0})
    for name in _further_classes(video):
        candidates.add(name, ClipWords("raw", text=name))
    video.refuse_missing(frames, queries)
    return video.finished(
        video.items(frames, queries),
        video.items(frames, candidates.rows),
        candidates.names,
        labels,
        notes=[*counted(task, len(queries), len(candidates.rows)), *_lacking(video, candidates.names)],
    )


def _lacking(video: VideoTask, names: Sequence[Name]) -> list[str]:
    """Return what to do if classes without a row are not known: fewer candidates make each query easier."""
    if video.task.name in CLASSES or len(names) >= int(video.task.pool_size):
        return []
    return [f"classes without a row are missing: list all in {_labels(video)}, one in each line"]


def _labels(video: VideoTask) -> str:
    return f"{_DATA}/{PurePosixPath(video.task.annotations).stem}_labels.txt"


def _further_classes(video: VideoTask) -> list[str]:
    """Return the fixed list of classes; a file beside the annotations may hold another one."""
    path = video.root / _labels(video)
    if not path.is_file():
        return CLASSES.get(video.task.name, "").split()
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 with a class in each line. Convert it.") from error


def read_local_classes(video: VideoTask) -> BenchmarkTask:
    """Return SmthSmthV2: the right class of a clip among those of its row (``neg_text``).

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used, or its class is not among its candidates.
    """
    task, frames = video.task, video.frames()
    queries: list[ClipWords] = []
    candidates: Candidates[ClipWords] = Candidates()
    labels, pools = [], []
    for row in video.rows(("video_id", "pos_text", "neg_text")):
        queries.append(ClipWords("clip", task.query_instruction, None, str(row.name("video_id"))))
        texts, label = row.texts("neg_text"), row.text("pos_text")
        if label not in texts:
            raise DataError(f"{row.where}: 'pos_text' must be one of 'neg_text', but {label!r:.90} is not.")
        pools.append(tuple(candidates.add(text, ClipWords("raw", text=text)) for text in texts))
        labels.append({candidates.places[label]: 1.0})
    video.refuse_missing(frames, queries)
    return video.finished(
        video.items(frames, queries),
        video.items(frames, candidates.rows),
        candidates.names,
        labels,
        pools,
        notes=counted(task, len(queries)),
    )


def read_retrieval(video: VideoTask) -> BenchmarkTask:
    """Return a task that finds the video of a caption; rows of one video share its candidate.

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used.
    """
    task, frames = video.task, video.frames()
    named_by, said_in = _RETRIEVAL[task.name]
    queries: list[ClipWords] = []
    candidates: Candidates[ClipWords] = Candidates()
    labels = []
    for row in video.rows((named_by, said_in)):
        caption = row.values.get(said_in)
        text = row.texts(said_in)[0] if isinstance(caption, list) else row.text(said_in)
        name = str(row.name(named_by))
        if task.name == "DiDeMo":  # a file name
            name = PurePosixPath(name).stem
        queries.append(ClipWords("words", task.query_instruction, text))
        clip = ClipWords("clip", task.target_instruction, None, name)
        labels.append({candidates.add(name, clip): 1.0})
    video.refuse_missing(frames, candidates.rows)
    return video.finished(
        video.items(frames, queries),
        video.items(frames, candidates.rows),
        candidates.names,
        labels,
        notes=counted(task, len(queries), len(candidates.rows)),
    )
