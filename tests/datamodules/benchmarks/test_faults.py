"""Damaged and hostile copies: each fault is an error that names it; no file outside the copy is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rime_pl.datamodules.benchmarks.reading import read_task
from rime_pl.errors import DataError
from tests.datamodules.benchmarks.damage import PARQUET, drop, edit, put
from tests.datamodules.benchmarks.official_copies import save, write_image_task
from tests.datamodules.benchmarks.official_documents import (
    write_document_task,
)
from tests.datamodules.benchmarks.official_videos import write_video_task

DATA = "video-tasks/data"
FRAMES = "video-tasks/frames"


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("SUN397", drop("qry_img_path"), "row 1 must have the field 'qry_img_path', but has"),
        ("SUN397", drop("qry_text"), "row 1 must have the field 'qry_text'"),
        ("SUN397", drop("tgt_text"), "row 1 must have the field 'tgt_text'"),
        ("SUN397", put(1, tgt_text=[]), "row 2: 'tgt_text' must be a list of texts, one or more"),
        ("SUN397", put(1, tgt_text=None), "row 2: 'tgt_text' must be a list of texts"),
        ("SUN397", put(0, qry_img_path=""), "row 1 must name a picture, but the path is empty"),
        ("SUN397", put(2, qry_img_path="SUN397/none.png"), "1 are missing. The first: SUN397/none.png"),
        ("SUN397", put(2, qry_img_path="../../secret.png"), "must not contain '..'"),
        ("SUN397", put(0, qry_img_path="/etc/hostname"), "must be a path below"),
        ("CIRR", put(1, tgt_img_path=["CIRR/3.png"]), "must have the same length, but have 3 and 1"),
        ("CIRR", put(1, tgt_img_path=["CIRR/3.png", "CIRR/../../x", ""]), "the path is empty"),
        ("CIRR", put(1, tgt_img_path=["CIRR/3.png", "CIRR/../../x", "a"]), "must not contain '..'"),
    ],
)
def test_a_faulty_row_of_pictures(task: str, change: Any, says: str, tmp_path: Path) -> None:
    save(tmp_path.parent / "secret.png")
    write_image_task(tmp_path, task)
    edit(tmp_path / "image-tasks" / task / PARQUET, change)
    with pytest.raises(DataError, match=says):
        read_task("mmeb-v2", tmp_path, task)


VIDEO: list[tuple[str, str, Any, str]] = [
    ("SmthSmthV2", "ssv2", put(1, neg_text=["own label", "\ud800"]), "half characters"),
    ("K700", "k700", put(1, pos_text=None), "row 2: 'pos_text' must be a text, but is None"),
    ("K700", "k700", put(1, video_id=True), "'video_id' must be an id, a text or a whole number"),
    ("K700", "k700", put(1, video_id="gone"), "1 are missing. The first: gone"),
    ("K700", "k700", put(1, video_id="../.."), "must not contain '..'"),
    ("K700", "k700", put(1, pos_text="half \ud800"), "half characters"),
    (
        "SmthSmthV2",
        "ssv2",
        put(1, pos_text="other"),
        "'pos_text' must be one of 'neg_text', but 'other' is not",
    ),
    ("VATEX", "vatex", put(1, enCap=[]), "'enCap' must be a list of texts, one or more"),
    ("Video-MME", "video-mme", put(1, answer="E"), "must be the letter of an option, but is 'E'"),
    ("Video-MME", "video-mme", put(1, answer=""), "must be the letter of an option, but is ''"),
    ("Video-MME", "video-mme", put(0, options="A. x"), "'options' must be a list of texts"),
    ("EgoSchema", "egoschema", put(1, answer="5"), "'answer' must be a whole number from 0 to 4, but is '5'"),
    ("EgoSchema", "egoschema", put(1, answer="-1"), "'answer' must be a whole number from 0 to 4"),
    ("NExTQA", "nextqa", put(1, answer=7), "'answer' must be a whole number from 0 to 4, but is 7"),
    ("NExTQA", "nextqa", drop("a4"), "must have the field 'a4'"),
    ("ActivityNetQA", "activitynetqa", put(1, answer="maybe"), "must be 'yes' or 'no', but is 'maybe'"),
    (
        "MVBench",
        "mvbench/state_change",
        put(0, answer="other"),
        "must be one of 'candidates', but 'other' is not",
    ),
    (
        "QVHighlight",
        "qvhighlight",
        put(1, video_path="none.mp4", clips_dir_path=None),
        "has none of: .'none'",
    ),
    ("QVHighlight", "qvhighlight", put(1, video_path="..", clips_dir_path=None), "must not contain '..'"),
    ("MomentSeeker", "momentseeker_1k6", put(0, positive_frames=[]), "must name a clip, but is empty"),
    ("MomentSeeker", "momentseeker_1k6", put(0, negative_frames=[{}]), "must be objects with 'output_path'"),
    (
        "MomentSeeker",
        "momentseeker_1k6",
        lambda rows: rows[2].pop("input_frames"),
        "MomentSeeker: .*momentseeker_1k6.jsonl row 3 must have the field 'input_frames', a path or null",
    ),
    ("MomentSeeker", "momentseeker_1k6", put(1, input_frames="a.jpg"), "The first: query_a.jpg"),
    ("MomentSeeker", "momentseeker_1k6", put(2, input_frames="a.mp4"), "The first: video_frames/a"),
    ("MomentSeeker", "momentseeker_1k6", put(1, input_frames="/../../a.jpg"), "must not contain '..'"),
]


@pytest.mark.parametrize(("task", "file", "change", "says"), VIDEO)
def test_a_faulty_row_of_clips(task: str, file: str, change: Any, says: str, tmp_path: Path) -> None:
    write_video_task(tmp_path, task)
    path = tmp_path / DATA / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # in ASCII, as half a character needs
    with pytest.raises(DataError, match=says):
        read_task("mmeb-v2", tmp_path, task)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"video_id": "a", "pos_text": "\xff"}\n', "row 1: the row must be UTF-8"),
        (b'{"video_id": "a", "pos_text": NaN}\n', "must be JSON, but is not"),
        (b'{"video_id": "a", "video_id": "b", "pos_text": "c"}\n', "names"),
        (b'{"video_id": "a"', "must be JSON, but is not"),
        (b"video_id,pos_text\n", "must be a list of JSON objects or JSON lines"),
        (b"", "but is empty"),
        (b"[]", "K700: its files must have rows, but have none"),
    ],
)
def test_a_file_that_is_no_json(content: bytes, says: str, tmp_path: Path) -> None:
    write_video_task(tmp_path, "K700")
    (tmp_path / DATA / "k700.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_task("mmeb-v2", tmp_path, "K700")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("SUN397", f"image-tasks/SUN397/{PARQUET}"),
        ("CIRR", f"image-tasks/CIRR/{PARQUET}"),
        ("ViDoRe_tatdqa", f"visdoc-tasks/data/tatdqa_test_beir/queries/{PARQUET}"),
    ],
)
def test_a_table_without_rows(name: str, file: str, tmp_path: Path) -> None:
    (write_document_task if name.startswith("V") else write_image_task)(tmp_path, name)
    table = pyarrow.parquet.read_table(tmp_path / file)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / file)
    with pytest.raises(DataError, match=f"{name}: its files must have rows, but have none"):
        read_task("mmeb-v2", tmp_path, name)


def test_classes_that_are_not_utf8(tmp_path: Path) -> None:
    write_video_task(tmp_path, "K700")
    (tmp_path / DATA / "k700_labels.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="must be UTF-8 with a class in each line"):
        read_task("mmeb-v2", tmp_path, "K700")


def test_an_incomplete_or_mixed_set_of_files_is_refused(tmp_path: Path) -> None:
    write_image_task(tmp_path, "SUN397")
    file = tmp_path / "image-tasks/SUN397" / PARQUET
    shutil.copy(file, file.with_name("test-00000-of-00002.parquet"))
    with pytest.raises(DataError, match="must be one whole set of files"):
        read_task("mmeb-v2", tmp_path, "SUN397")
    file.unlink()
    with pytest.raises(DataError, match=r"numbered up to 2, but there are: test-00000-of-00002\.parquet"):
        read_task("mmeb-v2", tmp_path, "SUN397")


def test_files_that_are_no_frames(tmp_path: Path) -> None:
    write_video_task(tmp_path, "K700")
    folder = tmp_path / FRAMES / "video_cls/K700/clip 1"
    before = read_task("mmeb-v2", tmp_path, "K700").queries[1].media
    for file in [*folder.glob("*.jpg")]:
        (folder / f"._{file.name}").write_bytes(b"of macOS")
    assert read_task("mmeb-v2", tmp_path, "K700").queries[1].media == before
    shutil.copy(next(folder.glob("[!.]*.jpg")), folder / "²9.jpg")  # a digit that is no number
    assert read_task("mmeb-v2", tmp_path, "K700").queries[1].media != before


def test_a_folder_without_frames_and_one_that_has_gone(tmp_path: Path) -> None:
    write_video_task(tmp_path, "K700")
    folder = tmp_path / FRAMES / "video_cls/K700/clip 1"
    for file in folder.glob("*.jpg"):
        file.unlink()
    task = read_task("mmeb-v2", tmp_path, "K700")
    assert task.queries[0].media
    with pytest.raises(DataError, match=r"clip 1 must hold the frames of a clip .* but holds none"):
        task.queries[1]
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="does not exist"):
        task.queries[1]


def test_a_moment_without_clips_and_one_with_fewer_than_ten(tmp_path: Path) -> None:
    write_video_task(tmp_path, "QVHighlight")
    folder = tmp_path / FRAMES / "video_mret/QVHighlight/video_1"
    shutil.rmtree(folder / "negative_3")
    assert "1 queries have 9 candidates instead of 10" in read_task("mmeb-v2", tmp_path, "QVHighlight").notes
    shutil.rmtree(folder / "positive_1")
    with pytest.raises(DataError, match=r"must hold folders of clips, 'positive\*'"):
        read_task("mmeb-v2", tmp_path, "QVHighlight")


def test_a_folder_that_is_a_link_does_not_lead_outside(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    write_video_task(root, "K700")
    clip = root / FRAMES / "video_cls/K700/clip 2"
    shutil.move(clip, tmp_path / "outside")
    clip.symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="is a link that leaves"):
        read_task("mmeb-v2", root, "K700")


def test_a_frame_that_is_a_link_does_not_lead_outside(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    write_video_task(root, "K700")
    frame = root / FRAMES / "video_cls/K700/clip 2/frame_1.jpg"
    shutil.move(frame, tmp_path / "outside.jpg")
    frame.symlink_to(tmp_path / "outside.jpg")
    task = read_task("mmeb-v2", root, "K700")
    with pytest.raises(DataError, match="is a link that leaves"):
        task.queries[2]


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    write_image_task(tmp_path, "SUN397")
    path = tmp_path / "image-tasks/SUN397/query_1.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="1 are missing"):
        read_task("mmeb-v2", tmp_path, "SUN397")
