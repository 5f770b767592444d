"""Every task of the three benchmarks is read as its official page says: pool, label, words, media, metric."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.reading import read_task, read_tasks, task_names
from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.inference.sources import to_item
from rime_pl.types import Clip, Item, Page
from tests.datamodules.benchmarks.official_copies import Expected, Shown, facts, write_image_task
from tests.datamodules.benchmarks.official_documents import (
    KEYS,
    write_document_task,
    write_mrmr_task,
    write_uvrb_task,
)
from tests.datamodules.benchmarks.official_videos import write_video_task

WRITERS = {
    **{("mmeb-v2", row["task"]): write_image_task for row in facts("image")},
    **{("mmeb-v2", row["task"]): write_video_task for row in facts("video")},
    **{("mmeb-v2", row["task"]): write_document_task for row in facts("documents")},
    **{("mrmr", row["task"]): write_mrmr_task for row in facts("mrmr")},
    **{("uvrb", row["task"]): write_uvrb_task for row in facts("uvrb")},
}


def described(media: Sequence[Any], root: Path) -> tuple[str, ...]:
    """What an item shows, in the words of official_copies.py; files below the root."""
    found: list[str] = []
    for medium in media:
        if isinstance(medium, Clip):
            assert list(medium.times) == sorted(set(medium.times))
            found += ["clip:", *(below(frame, root) for frame in medium.frames)]
        elif isinstance(medium, Page):
            page: Any = medium.image
            found.append(
                f"page: {page.getpixel((0, 0)) if isinstance(page, Image.Image) else below(page, root)}"
            )
        elif isinstance(medium, Image.Image):
            found.append(f"picture: {medium.getpixel((0, 0))} {medium.size}")
        else:
            found.append(below(medium, root))
    return tuple(found)


def below(path: Any, root: Path) -> str:
    assert Path(path).is_file()
    return Path(path).relative_to(root).as_posix()


def compare(task: BenchmarkTask, expected: Expected, root: Path, wording: str) -> None:
    about = (task.name, task.group, task.modality, task.metric)
    assert about == (expected.name, expected.group, expected.modality, expected.metric)
    check_items(task.queries, expected.queries, root, wording)
    names = list(task.names)
    assert len(names) == len(set(names)) == len(task.candidates)
    assert {type(name) for name in names} == {type(name) for name in expected.candidates}
    if task.name not in ("HMDB51", "UCF101"):  # their other classes are counted below
        assert len(names) == len(expected.candidates)
    known = [names.index(name) for name in expected.candidates]
    check_items([task.candidates[n] for n in known], list(expected.candidates.values()), root, wording)
    assert [{names[n]: grade for n, grade in label.items()} for label in task.labels] == expected.labels
    pools = task.pools if task.pools is None else [[names[n] for n in pool] for pool in task.pools]
    assert pools == expected.pools
    assert list(task.categories) == expected.categories
    assert ("official text" in task.version) == (wording == "official")


def check_items(items: Sequence[Item], expected: Sequence[Shown], root: Path, wording: str) -> None:
    assert len(items) == len(expected)
    for item, shown in zip(items, expected, strict=True):
        words = (item.instruction, item.text)
        assert words == (("", shown.official) if wording == "official" else (shown.instruction, shown.text))
        assert described(item.media, root) == shown.media
        if shown.media:
            to_item(item)  # the retriever can open it


@pytest.mark.parametrize("wording", ["parts", "official"])
@pytest.mark.parametrize(("benchmark", "name"), WRITERS, ids=lambda part: str(part))
def test_a_task_is_read_as_its_page_says(benchmark: str, name: str, wording: Any, tmp_path: Path) -> None:
    expected = WRITERS[benchmark, name](tmp_path, name)
    (task,) = read_tasks(benchmark, tmp_path, [name], ReadOptions(wording=wording))
    assert isinstance(task, BenchmarkTask)
    compare(task, expected, tmp_path, wording)


def test_the_tables_name_the_same_tasks_in_the_same_order() -> None:
    mmeb = [
        KEYS.get(row["task"], row["task"]) for part in ("image", "video", "documents") for row in facts(part)
    ]
    assert task_names("mmeb-v2") == mmeb
    assert len(mmeb) == 78
    for benchmark, count in (("mrmr", 5), ("uvrb", 16)):
        assert task_names(benchmark) == [row["task"] for row in facts(benchmark)]
        assert len(task_names(benchmark)) == count


@pytest.mark.parametrize("section", ["video", "documents", "uvrb"])
def test_official_counts_that_differ_are_told(section: str, tmp_path: Path) -> None:
    benchmark = "uvrb" if section == "uvrb" else "mmeb-v2"
    for row in facts(section):
        WRITERS[benchmark, row["task"]](tmp_path, row["task"])
        task = read_task(benchmark, tmp_path, KEYS.get(row["task"], row["task"]))
        read = len(task.queries) + (benchmark == "uvrb")  # one query there has no right clip
        said = f"{read} queries were read, but officially there are {int(row['queries']):,}"
        assert said in task.notes, row["task"]


#: Task -> number of its classes, and the SHA-256 of their names, sorted and joined with newlines. Both come
#: from video_classification_utils.py of the official code (TIGER-AI-Lab/VLM2Vec, commit 418e3f1).
CLASSES = {
    "HMDB51": (51, "154ef596b60371212a4963ee5f33996f926eb53ca8e44fa2499c8267f9db561e"),
    "UCF101": (101, "01e7e1408d08ad15372e4042fab008938a1eebc76f9a4044babc82a0697cd45c"),
    "Breakfast": (10, "7fe338e9192c8aa4e24888e5307dbef08d0b1b63a11726fb8b82ce9f590782b4"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_without_a_row_are_candidates_too(name: str, tmp_path: Path) -> None:
    write_video_task(tmp_path, name)
    task = read_task("mmeb-v2", tmp_path, name)
    names = list(task.names)
    assert names[1] == "own label", "those of the rows come first"
    assert [item.text for item in task.candidates] == names
    names.remove("own label")
    found = (len(names), hashlib.sha256("\n".join(sorted(map(str, names))).encode()).hexdigest())
    assert found == CLASSES[name]


def test_a_file_of_classes_takes_the_place_of_the_list(tmp_path: Path) -> None:
    write_video_task(tmp_path, "K700")
    path = tmp_path / "video-tasks/data/k700_labels.txt"
    task = read_task("mmeb-v2", tmp_path, "K700")
    assert len(task.names) == 2
    assert "2 candidates were read, but officially there are 700" in task.notes
    assert any("list all in video-tasks/data/k700_labels.txt" in note for note in task.notes)
    path.write_text("waiting_in_line\narchery\n")
    assert list(read_task("mmeb-v2", tmp_path, "K700").names) == ["waiting_in_line", "own label", "archery"]
