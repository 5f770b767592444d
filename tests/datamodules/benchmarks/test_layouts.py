"""Layouts that are met in the wild, versions of the data, and options of reading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.reading import read_task, read_tasks, task_names
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, MissingTask
from rime_pl.types import Clip
from tests.datamodules.benchmarks.official_copies import (
    Expected,
    fact,
    save,
    write_image_task,
    write_lines,
    write_parquet,
)
from tests.datamodules.benchmarks.official_documents import (
    write_document_task,
    write_mrmr_task,
    write_uvrb_task,
)
from tests.datamodules.benchmarks.official_videos import write_video_task
from tests.datamodules.benchmarks.test_official_copies import compare

INNER = "data/ziyan/video_retrieval"


def check(expected: Expected, root: Path, benchmark: str = "mmeb-v2") -> BenchmarkTask:
    task = read_task(benchmark, root, expected.name)
    compare(task, expected, root, "parts")
    return task


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("K700", "K700"),
        ("DiDeMo", f"video_ret/{INNER}/DiDeMo/frames"),
        ("VATEX", f"{INNER}/VATEX/frames"),
        ("MSVD", "MSVD"),
        ("Charades-STA", "video_mret/Charades-STA"),
        ("Charades-STA", "Charades_STA"),
        ("EgoSchema", "video_qa/egoschema"),
    ],
)
def test_frames_are_found_in_each_known_place(name: str, folder: str, tmp_path: Path) -> None:
    check(write_video_task(tmp_path, name, folder), tmp_path)


@pytest.mark.parametrize("folder", ["image-query/{}", "MMEB_Test_Instruct/{}", "image-tasks/MMEB/{}"])
def test_image_rows_are_found_in_each_known_place(folder: str, tmp_path: Path) -> None:
    expected = write_image_task(tmp_path, "CIRR")
    file = tmp_path / "image-tasks/CIRR/test-00000-of-00001.parquet"
    place = tmp_path / folder.format("CIRR") / file.name
    place.parent.mkdir(parents=True)
    shutil.move(file, place)
    check(expected, tmp_path)


def test_pictures_may_lie_in_the_folder_of_their_archive(tmp_path: Path) -> None:
    expected = write_image_task(tmp_path, "VOC2007")
    (tmp_path / "image-tasks/VOC2007").rename(tmp_path / "VOC2007")
    (tmp_path / "image-tasks/MMEB").mkdir()
    (tmp_path / "VOC2007").rename(tmp_path / "image-tasks/MMEB/VOC2007")
    for query in expected.queries:
        query.media = tuple(path.replace("image-tasks/", "image-tasks/MMEB/") for path in query.media)
    check(expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("K700", "Kinetics-700/data/test-00000-of-00001.parquet"),
        ("NExTQA", "NExTQA/MC/test-00000-of-00001.parquet"),
        ("YouCook2", "YouCook2/data/val-00000-of-00001.parquet"),
        ("MomentSeeker", "MomentSeeker/data/test-00000-of-00001.parquet"),
        ("MVBench", "MVBench/{}/train-00000-of-00001.parquet"),
        ("MVBench", "MVBench/json/{}.json"),
    ],
)
def test_rows_of_videos_may_be_parquet(name: str, place: str, tmp_path: Path) -> None:
    expected = write_video_task(tmp_path, name)
    data = tmp_path / "video-tasks/data"
    for file in sorted(data.rglob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
        target = data / place.format(file.stem)
        if target.suffix == ".json":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(rows))
        else:
            write_parquet(target, rows)
    check(expected, tmp_path)


@pytest.mark.parametrize("name", ["ViDoRe_docvqa", "VisRAG_PlotQA"])
def test_pages_may_be_the_files_that_the_official_code_dumps(name: str, tmp_path: Path) -> None:
    expected = write_document_task(tmp_path, name, dumped=True)
    check(expected, tmp_path)
    (tmp_path / "visdoc-tasks/images").rename(tmp_path / "pages")
    for page in (tmp_path / "pages").iterdir():
        page.rename(tmp_path / "visdoc-tasks" / page.name)
    for shown in expected.candidates.values():
        shown.media = tuple(path.replace("visdoc-tasks/images/", "visdoc-tasks/") for path in shown.media)
    check(expected, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("ViDoSeek-page", "ViDoSeek-page"), ("MMLongBench-page", "MMLongBench")]
)
def test_broken_page_sets_are_told_from_fixed_ones(name: str, folder: str, tmp_path: Path) -> None:
    write_document_task(tmp_path, name, folder=folder)
    broken = read_task("mmeb-v2", tmp_path, f"{name}-fixed")
    assert broken.name == name
    assert broken.version.startswith("page sets broken; ")
    assert any("not comparable" in note for note in broken.notes)
    assert any("check where the data come from" in note for note in broken.notes)  # their scores are all 3
    write_document_task(tmp_path, name)
    fixed = read_task("mmeb-v2", tmp_path, f"{name}-fixed")
    assert (fixed.name, fixed.version.split(";")[0]) == (f"{name}-fixed", "page sets fixed (2025-11)")
    assert not any("page" in note for note in fixed.notes)


def test_the_old_momentseeker_is_told_from_the_new_one(tmp_path: Path) -> None:
    write_video_task(tmp_path, "MomentSeeker")
    path = tmp_path / "video-tasks/data/momentseeker_1k6.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    write_lines(path, [row] * 1602)
    task = read_task("mmeb-v2", tmp_path, "MomentSeeker")
    assert task.version.startswith("MomentSeeker of 1,602 rows; ")
    assert not task.notes
    write_lines(path, [row] * 1800)
    old = read_task("mmeb-v2", tmp_path, "MomentSeeker")
    assert "not comparable" in old.version
    assert old.notes == ["1,800 queries were read, but officially there are 1,602"]


def test_only_the_first_thousand_rows_of_smthsmthv2_count(tmp_path: Path) -> None:
    write_video_task(tmp_path, "SmthSmthV2")
    path = tmp_path / "video-tasks/data/ssv2.jsonl"
    write_lines(path, [json.loads(path.read_text().splitlines()[0])] * 1003)
    assert len(read_task("mmeb-v2", tmp_path, "SmthSmthV2").queries) == 1000


def test_a_short_clip_is_padded_only_if_that_is_asked_for(tmp_path: Path) -> None:
    write_video_task(tmp_path, "HMDB51")
    counts = {}
    for pad in (False, True):
        task = read_task("mmeb-v2", tmp_path, "HMDB51", ReadOptions(pad_clips=pad))
        clips: list[Any] = [query.media[0] for query in task.queries]
        assert all(isinstance(clip, Clip) for clip in clips)
        counts[pad] = [len(clip.frames) for clip in clips]
        assert ("not padded" in task.version) == (not pad)
    assert counts == {False: [3, 8, 8], True: [8, 8, 8]}
    assert clips[0].frames[2:] == (clips[0].frames[2],) * 6
    assert len(set(clips[0].times)) == 8


def test_a_missing_instruction_is_that_of_the_table(tmp_path: Path) -> None:
    expected = write_image_task(tmp_path, "NIGHTS")
    file = tmp_path / "image-tasks/NIGHTS/test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(file).drop_columns(["qry_inst", "tgt_inst"]).to_pylist()
    write_parquet(file, rows)
    check(expected, tmp_path)


def test_the_empty_string_stays_a_candidate(tmp_path: Path) -> None:
    write_image_task(tmp_path, "OK-VQA")
    task = read_task("mmeb-v2", tmp_path, "OK-VQA")
    place = list(task.names).index("")
    blank = task.candidates[place]
    assert (blank.text, blank.media, blank.instruction) == ("", (), "")
    assert task.pools is not None
    assert place in task.pools[1]


def test_missing_tasks_are_reported_and_the_others_read(tmp_path: Path) -> None:
    write_image_task(tmp_path, "DocVQA")
    write_video_task(tmp_path, "K700")
    (tmp_path / "video-tasks/data/k700.jsonl").unlink()
    shutil.rmtree(tmp_path / "image-tasks/DocVQA")
    write_image_task(tmp_path, "GQA")
    tasks = list(read_tasks("mmeb-v2", tmp_path))
    assert [task.name for task in tasks] == task_names("mmeb-v2")
    read = [task for task in tasks if isinstance(task, BenchmarkTask)]
    assert [task.name for task in read] == ["GQA"]
    missing = {task.name: task for task in tasks if isinstance(task, MissingTask)}
    assert (missing["DocVQA"].code, missing["DocVQA"].group, missing["DocVQA"].modality) == (
        *("FILE_N/A", "I-QA", "image"),
    )
    assert "image-query/DocVQA/test-*.parquet, image-tasks/DocVQA/test-*.parquet" in missing["DocVQA"].reason
    assert missing["K700"].code == "FILE_N/A"
    assert "video-tasks/data/k700.jsonl" in missing["K700"].reason
    assert missing["DiDeMo"].code == "DIR_N/A"
    for folder in (f"video_ret/{INNER}/DiDeMo/frames", f"{INNER}/DiDeMo/frames", "video_ret/DiDeMo"):
        assert f"video-tasks/frames/{folder}" in missing["DiDeMo"].reason
    for benchmark, count, folder in (("mrmr", 5, "theorem"), ("uvrb", 16, "CMRB")):
        (tmp_path / folder).mkdir()
        tasks = list(read_tasks(benchmark, tmp_path))
        assert len(tasks) == count
        assert all(isinstance(task, MissingTask) and task.reason for task in tasks)


def captions_of(root: Path, name: str, marks: dict[str, list[str]]) -> None:
    entries = [
        {
            **{"subset": "query", "item_id": query},
            "captions": {mark: {"caption": f"a {mark} of {query}"} for mark in found},
        }
        for query, found in marks.items()
    ]
    entries.append({"subset": "corpus", "item_id": "q0", "captions": {"image": {"caption": "not a query"}}})
    (root / f"all_captions_{name}.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("name", ["traffic", "design", "knowledge"])
def test_captions_stand_at_the_marks_of_pictures(name: str, tmp_path: Path) -> None:
    write_mrmr_task(tmp_path, name)
    captions_of(tmp_path, name, {"q0": ["image"], "q1": ["image"], "q2": ["image"]})
    task = read_task("mrmr", tmp_path, name, ReadOptions(captions=tmp_path))
    asked = fact("mrmr", name)["caption"]
    asked = fact("mrmr", name)["query"] if asked == "same" else asked
    assert [query.text for query in task.queries] == [
        "case 0 <a image of q0>",
        "<a image of q1>",
        "case 2 <a image of q2>",
    ]
    assert {query.instruction for query in task.queries} == {asked}
    assert not any(query.media for query in task.queries)
    assert all(item.text == "" and len(item.media) == 1 for item in task.candidates)
    assert task.version.startswith("setting: captions; ")
    official = read_task("mrmr", tmp_path, name, ReadOptions("official", captions=tmp_path))
    space = "  " if name == "design" else " "  # the official prompt of design ends in a space
    assert official.queries[0].text == f"{asked}{space}case 0 <a image of q0>"


def test_numbered_marks_have_captions_of_their_own(tmp_path: Path) -> None:
    write_mrmr_task(tmp_path, "theorem")
    file = tmp_path / "theorem/query/test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(file).to_pylist()
    rows[2]["text"] = "Is <image 2> or <image 1> larger?"
    write_parquet(file, rows)
    captions_of(tmp_path, "theorem", {"q0": ["image"], "q1": ["image"], "q2": ["image 1", "image 2"]})
    task = read_task("mrmr", tmp_path, "theorem", ReadOptions(captions=tmp_path))
    assert task.queries[2].text == "Is <a image 2 of q2> or <a image 1 of q2> larger?"


def test_raw_videos_of_uvrb_are_taken_where_there_are_no_frames(tmp_path: Path) -> None:
    write_uvrb_task(tmp_path, "CRB-G")
    folder = tmp_path / "CRB-G/UVRB/CRB-G"
    shutil.rmtree(folder / "videos_frames")
    for number in range(4):
        save(folder / f"videos/v{number}.mp4")  # not opened here
    task = read_task("uvrb", tmp_path, "CRB-G")
    assert [item.media for item in task.candidates] == [(folder / f"videos/v{n}.mp4",) for n in range(4)]
    assert any("raw video" in note for note in task.notes)


def test_ids_of_mrmr_are_compared_as_texts(tmp_path: Path) -> None:
    write_mrmr_task(tmp_path, "traffic")
    for table, change in (
        ("query", lambda row: row | {"id": int(row["id"][1:])}),
        ("corpus", lambda row: row | {"id": row["id"][1:]}),
        (
            "qrels",
            lambda row: {"query-id": row["query-id"][1:], "corpus-id": int(row["corpus-id"][1:]), "score": 1},
        ),
    ):
        file = tmp_path / "traffic" / table / "test-00000-of-00001.parquet"
        write_parquet(file, [change(row) for row in pyarrow.parquet.read_table(file).to_pylist()])
    task = read_task("mrmr", tmp_path, "traffic")
    assert (list(task.names), list(task.labels)) == (["0", "1", "2", "3"], [{0: 1.0}, {1: 1.0}, {2: 1.0}])
