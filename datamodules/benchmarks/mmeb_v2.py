"""Reads MMEB-V2: 36 image, 18 video and 24 document tasks from a local copy in the official layout.

Called by reading.py. docs/reference/benchmarks.md says what to download.

Source: TIGER-AI-Lab/VLM2Vec and the data sets that mmeb_v2_tasks.csv names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rime_pl.datamodules.benchmarks.mmeb_v2_documents import read_documents
from rime_pl.datamodules.benchmarks.mmeb_v2_image import read_image_task
from rime_pl.datamodules.benchmarks.mmeb_v2_moments import read_moments, read_momentseeker
from rime_pl.datamodules.benchmarks.mmeb_v2_questions import read_questions
from rime_pl.datamodules.benchmarks.mmeb_v2_table import MMEBTask
from rime_pl.datamodules.benchmarks.mmeb_v2_videos import (
    VideoTask,
    read_classes,
    read_local_classes,
    read_retrieval,
)
from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.task import BenchmarkTask

_VIDEO: dict[str, Callable[[VideoTask], BenchmarkTask]] = {
    "cls": read_classes,
    "cls_local": read_local_classes,
    "ret": read_retrieval,
    "moments": read_moments,
    "momentseeker": read_momentseeker,
}


def read_mmeb_v2(task: MMEBTask, root: Path, options: ReadOptions) -> BenchmarkTask:
    """Return a task of MMEB-V2.

    Args:
        task: Its row of the table.
        root: Folder with image-tasks/, video-tasks/ and visdoc-tasks/.
        options: How it is read.

    Raises:
        MissingFilesError: If files are missing.
        DataError: If a row cannot be used.
    """
    if task.modality == "image":
        return read_image_task(task, root, options)
    if task.modality == "visdoc":
        return read_documents(task, root, options)
    return _VIDEO.get(task.parser, read_questions)(VideoTask(task, root, options))
