"""Reads the three tasks of MMEB-V2 that find a moment of a video among ten clips.

Called by mmeb_v2.py. A candidate is named by the folder of its frames, as seen from the folder of the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rime_pl.datamodules.benchmarks.items import Candidates, LazyItems
from rime_pl.datamodules.benchmarks.mmeb_v2_table import counted
from rime_pl.datamodules.benchmarks.mmeb_v2_videos import ClipWords, VideoTask
from rime_pl.datamodules.benchmarks.rows import Row, file_in, refuse_missing
from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.datamodules.benchmarks.wording import item_of
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.paths import file_below, folder_below
from rime_pl.errors import DataError
from rime_pl.types import Item

_OLD_ROWS = 1800  # of MomentSeeker until 2025-07-31


def read_moments(video: VideoTask) -> BenchmarkTask:
    """Return QVHighlight or Charades-STA. Each video has folders ``query``, ``positive*`` and ``negative*``.

    Officially the clips of a row stand in the order in which the system lists a folder; here by name.

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used, or a video lacks clips.
    """
    task, frames = video.task, video.frames()
    queries: list[ClipWords] = []
    candidates: Candidates[ClipWords] = Candidates()
    labels, pools = [], []
    for row in video.rows(("query", "video_path"), ("clips_dir_path",)):
        folder = _folder_of_video(frames, row)
        queries.append(ClipWords("clip", task.query_instruction, row.text("query"), f"{folder}/query"))
        pool, right = [], {}
        for name in _clips(frames, folder, row):
            clip = ClipWords("clip", task.target_instruction, None, f"{folder}/{name}")
            pool.append(candidates.add(clip.folder, clip))
            if name.startswith("positive"):
                right[pool[-1]] = 1.0
        pools.append(tuple(pool))
        labels.append(right)
    video.refuse_missing(frames, queries)
    return video.finished(
        video.items(frames, queries),
        video.items(frames, candidates.rows),
        candidates.names,
        labels,
        pools,
        notes=[*counted(task, len(queries)), *_pools_that_differ(pools)],
    )


def _folder_of_video(frames: Path, row: Row) -> str:
    """Return the folder of a row: the stem of its video, or the last part of its folder of clips."""
    names = [PurePosixPath(row.text("video_path")).stem]
    names += [PurePosixPath(row.text_or("clips_dir_path", "")).name]
    for name in filter(None, names):
        try:
            folder_below(frames, name)
        except Refused as refused:
            if refused.kind != "missing folder":
                raise DataError(f"{row.where}: {refused.says}") from refused
        else:
            return name
    raise DataError(f"{row.where}: {frames} must hold a folder of the video, but has none of: {names}.")


def _clips(frames: Path, folder: str, row: Row) -> list[str]:
    """Return the names of the clips of a video, sorted; loose files and the query do not count."""
    place = frames / folder
    names = sorted(one.name for one in place.iterdir() if one.is_dir() and one.name != "query")
    if not any(name.startswith("positive") for name in names):
        raise DataError(
            f"{row.where}: {place} must hold folders of clips, 'positive*' (the right one) and 'negative*', "
            f"but has {names!r:.200}."
        )
    return names


def _pools_that_differ(pools: Sequence[Sequence[int]]) -> list[str]:
    odd = Counter(len(pool) for pool in pools if len(pool) != 10)
    return [f"{count:,} queries have {size} candidates instead of 10" for size, count in sorted(odd.items())]


def read_momentseeker(video: VideoTask) -> BenchmarkTask:
    """Return MomentSeeker: a text, with a picture, a clip or neither, finds a clip. Several may be right.

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used, or pictures or frames are missing.
    """
    task, frames = video.task, video.frames()
    by_text, by_picture, by_clip = task.query_instruction.split("|")
    queries: list[tuple[ClipWords, str]] = []  # words, and the picture
    candidates: Candidates[ClipWords] = Candidates()
    labels, pools, odd = [], [], 0
    columns = ("query", "input_frames", "positive_frames", "negative_frames")
    for row in video.rows(columns, (), _places(video)):
        text, shown = row.text("query"), _shown_by(row, task.name)
        if shown.endswith(".mp4"):
            queries.append((ClipWords("clip", by_clip, text, _frames_of(shown)), ""))
        elif shown.endswith(".jpg"):
            queries.append((ClipWords("clip", by_picture, text), _picture(frames, shown)))
        else:
            odd += bool(shown)
            queries.append((ClipWords("words", by_text, text), ""))
        sides = []
        for side in ("positive_frames", "negative_frames"):
            clips = [_frames_of(path) for path in _paths(row, side)]
            words = [ClipWords("clip", task.target_instruction, None, clip) for clip in clips]
            sides.append([candidates.add(one.folder, one) for one in words])
        if not sides[0]:
            raise DataError(f"{row.where}: 'positive_frames' must name a clip, but is empty.")
        pools.append((*sides[0], *sides[1]))
        labels.append(dict.fromkeys(sides[0], 1.0))
    video.refuse_missing(frames, [*(words for words, _ in queries), *candidates.rows])
    refuse_missing(frames, dict.fromkeys(picture for _, picture in queries if picture), task.name)
    return video.finished(
        _queries(video, frames, queries),
        video.items(frames, candidates.rows, every=True),
        candidates.names,
        labels,
        pools,
        version=f"{_version(len(queries))}; {video.options.told_of_clips}",
        notes=[*counted(task, len(queries)), *_pools_that_differ(pools), *_not_shown(odd)],
    )


def _shown_by(row: Row, task: str) -> str:
    """Return the picture or the clip of a query; "" if the row says that it has none."""
    if "input_frames" not in row.values:  # it decides the kind of the query, and null is a text
        raise DataError(
            f"{task}: {row.where} must have the field 'input_frames', a path or null, but lacks it."
        )
    return row.text_or("input_frames", "")


def _not_shown(count: int) -> list[str]:
    if not count:
        return []
    return [f"{count:,} queries name neither .jpg nor .mp4, and are texts only, as officially"]


def _queries(
    video: VideoTask, frames: Path, rows: Sequence[tuple[ClipWords, str]]
) -> LazyItems[tuple[ClipWords, str]]:
    def make(row: tuple[ClipWords, str]) -> Item:
        words, picture = row
        if not picture:
            return video.items(frames, [words], every=True)[0]
        media: tuple[Any, ...] = (file_in(frames, picture),)
        return item_of(video.options, words.layout, words.instruction, words.text, media)

    return LazyItems(rows, make)


def _places(video: VideoTask) -> list[str]:
    data, split = "video-tasks/data", video.task.split
    files = [f"{data}/{stem}.jsonl" for stem in ("momentseeker_1k6", "momentseeker", "momentseeker_1k8")]
    folders = [f"{data}/{name}" for name in ("MomentSeeker", "momentseeker_1k6", "MomentSeeker_1k8")]
    return files + [f"{folder}/{inner}{split}-*.parquet" for folder in folders for inner in ("data/", "")]


def _paths(row: Row, field: str) -> list[str]:
    entries = row.list(field)
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("output_path"), str):
            raise DataError(
                f"{row.where}: {field!r} must be objects with 'output_path', but one is {entry!r:.90}."
            )
    return [entry["output_path"] for entry in entries]


def _frames_of(path: str) -> str:
    """Return the folder of the frames of a video.

    >>> _frames_of("movie101/77.mp4")
    'video_frames/movie101_77'
    """
    return "video_frames/" + path.replace("/", "_").split(".mp4")[0]


def _picture(frames: Path, shown: str) -> str:
    """Return the file of a query's picture: the official place, or that of another layout if it is there."""
    official, other = f"query_{shown}", f"query_images/{shown}"
    try:
        file_below(frames, other)
    except Refused:
        return official
    return official if (frames / official).is_file() else other


def _version(rows: int) -> str:
    if rows == _OLD_ROWS:
        return "MomentSeeker of 1,800 rows (before 2025-07-31): not comparable with 1,602 rows"
    return f"MomentSeeker of {rows:,} rows"
