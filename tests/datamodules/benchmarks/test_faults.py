"""Damaged and hostile copies: each fault is an error that names it; no file outside the copy is opened."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.reading import read_task, read_tasks
from rime_pl.datamodules.benchmarks.rows import MissingFilesError
from rime_pl.errors import DataError
from tests.datamodules.benchmarks.official_copies import save, write_image_task, write_lines, write_parquet
from tests.datamodules.benchmarks.official_documents import (
    write_document_task,
    write_mrmr_task,
    write_uvrb_task,
)
from tests.datamodules.benchmarks.official_videos import write_video_task

Rows = list[dict[str, Any]]
DATA = "video-tasks/data"
FRAMES = "video-tasks/frames"
PARQUET = "test-00000-of-00001.parquet"


def edit(file: Path, change: Callable[[Rows], object]) -> None:
    """Change the rows of a file, Parquet or JSON lines."""
    if file.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(file).to_pylist()
        change(rows)
        write_parquet(file, rows)
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    write_lines(file, rows)


def put(row: int, **fields: Any) -> Callable[[Rows], object]:
    return lambda rows: rows[row].update(fields)


def drop(field: str) -> Callable[[Rows], object]:
    return lambda rows: [row.pop(field) for row in rows]


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("SUN397", drop("qry_img_path"), "row 1 must have the field 'qry_img_path', but has"),
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


TABLES: list[tuple[str, Any, str]] = [
    ("corpus", drop("corpus-id"), r"must have the columns \['corpus-id'\], but has"),
    ("queries", drop("query"), r"must have the columns \['query'\]"),
    ("queries", put(1, query=None), "row 2: 'query' must be a text"),
    ("qrels", drop("score"), r"must have the columns \['score'\]"),
    ("qrels", drop("query-id"), r"must have the columns \['query-id'\]"),
    ("qrels", put(0, **{"corpus-id": 99}), r"1 are not. The first: \[99\]"),
    ("qrels", put(0, score=float("nan")), "'score' must be a finite number"),
    (
        "qrels",
        lambda rows: [row.update({"query-id": 1}) for row in rows],
        r"2 of 3 have none. The first: \[0, 2\]",
    ),
    ("qrels", lambda rows: [row.update(score=0) for row in rows], "3 of 3 have none"),
    (
        "qrels",
        lambda rows: [row.update({"corpus-id": str(row["corpus-id"])}) for row in rows],
        "different ids",
    ),
]


@pytest.mark.parametrize(("table", "change", "says"), TABLES)
def test_a_faulty_table_of_documents(table: str, change: Any, says: str, tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    edit(tmp_path / "visdoc-tasks/data/tatdqa_test_beir" / table / PARQUET, change)
    with pytest.raises(DataError, match=says):
        read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({"bytes": None, "path": "/etc/hostname"}, "row 3, 'image' must hold the bytes of a picture"),
        ({"bytes": b"", "path": None}, "must hold the bytes of a picture, but holds none"),
        ({"bytes": b"no picture", "path": None}, "row 3, 'image' must be a picture"),
    ],
)
def test_a_faulty_page_is_found_when_it_is_due(image: Mapping[str, Any], says: str, tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    edit(tmp_path / f"visdoc-tasks/data/tatdqa_test_beir/corpus/{PARQUET}", put(2, image=image))
    task = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa")
    assert task.candidates[1].media
    with pytest.raises(DataError, match=says):
        task.candidates[2]
    assert task.candidates[3].media


def test_pages_are_missing(tmp_path: Path) -> None:
    write_document_task(tmp_path, "VisRAG_ArxivQA", dumped=True)
    folder = tmp_path / "visdoc-tasks/images/VisRAG_ArxivQA"
    next(folder.iterdir()).unlink()
    with pytest.raises(DataError, match=r"all 5 files or folders of its media .* 1 are missing"):
        read_task("mmeb-v2", tmp_path, "VisRAG_ArxivQA")
    shutil.rmtree(folder)
    with pytest.raises(MissingFilesError, match="the corpus has no column 'image'") as caught:
        read_task("mmeb-v2", tmp_path, "VisRAG_ArxivQA")
    assert caught.value.code == "DIR_N/A"


def test_pages_are_read_in_any_order(tmp_path: Path) -> None:
    expected = write_document_task(tmp_path, "ViDoRe_docvqa")
    task = read_task("mmeb-v2", tmp_path, "ViDoRe_docvqa")
    colours = [shown.media for shown in expected.candidates.values()]
    for place in (0, 1, 4, 2, 2, 3, 0, 4):
        page: Any = task.candidates[place].media[0]
        assert (f"page: {page.image.getpixel((0, 0))}",) == colours[place]
    assert len(task.candidates[1:3]) == 2


MRMR: list[tuple[str, str, Any, str]] = [
    ("knowledge", "query", put(0, category="Cooking"), r"must be one of .* but there are \['Cooking'\]"),
    ("knowledge", "query", drop("modality"), r"must have the columns \['modality'\]"),
    (
        "knowledge",
        "query",
        put(0, modality="video"),
        "must be 'text', 'image' or 'image,text', but is .'video'",
    ),
    ("knowledge", "corpus", put(0, text=None), "row 1 must have a text or a picture, but has neither"),
    ("knowledge", "qrels", drop("corpus_id"), r"must have the columns \['corpus_id'\]"),
    ("negation", "corpus", lambda rows: rows.pop(), r"for query 'q2', but lacks \['q2_4'\]"),
    ("negation", "qrels", put(0, **{"corpus-id": "q1_1"}), "a right document of query 'q0' must be one of"),
]


@pytest.mark.parametrize(("name", "table", "change", "says"), MRMR)
def test_a_faulty_table_of_mrmr(name: str, table: str, change: Any, says: str, tmp_path: Path) -> None:
    write_mrmr_task(tmp_path, name)
    edit(tmp_path / name / table / PARQUET, change)
    with pytest.raises(DataError, match=says):
        read_task("mrmr", tmp_path, name)


def test_mrmr_without_categories_or_captions(tmp_path: Path) -> None:
    write_mrmr_task(tmp_path, "knowledge")
    edit(tmp_path / "knowledge/query" / PARQUET, drop("category"))
    task = read_task("mrmr", tmp_path, "knowledge")
    assert not task.categories
    assert any("no column 'category'" in note for note in task.notes)
    with pytest.raises(DataError, match=r"all_captions_knowledge.json must be a list"):
        read_task("mrmr", tmp_path, "knowledge", ReadOptions(captions=tmp_path))
    (tmp_path / "all_captions_knowledge.json").write_text("[]")
    task = read_task("mrmr", tmp_path, "knowledge", ReadOptions(captions=tmp_path))
    with pytest.raises(DataError, match=r"query 'q0' must have captions of \['image'\], but lacks"):
        task.queries[0]


UVRB: list[tuple[str, str, Any, str]] = [
    ("CMRB", "instances", put(0, pos=["c99"]), r"must be an id of the corpus, but \['c99'\] are not"),
    ("CMRB", "instances", put(0, pos="c1"), "'pos' must be a list"),
    ("CMRB", "instances", put(0, qid="q99"), r"each 'qid' must be a query, but \['q99'\] are not"),
    ("CMRB", "queries", put(0, text=""), "must have a text, an image or a video, but has none"),
    ("CMRB", "corpus", put(0, video="../secret.mp4"), "must not contain '..'"),
    ("CMRB", "corpus", put(0, video="gone.mp4"), "1 are missing. The first: gone"),
    ("CMRB", "corpus", put(0, video=""), "row 1 must name a video"),
    ("MS-TI", "instances", drop("neg"), "must be listed in one of .* but the fields are .*'pos', 'qid'"),
    ("MS-TV", "instances", put(0, neg=["c11"]), "must have 10 candidates, but 'q0' has"),
    ("MS-TI", "queries", put(0, image="x/../../y.png"), "must not contain '..'"),
]


@pytest.mark.parametrize(("name", "table", "change", "says"), UVRB)
def test_a_faulty_table_of_uvrb(name: str, table: str, change: Any, says: str, tmp_path: Path) -> None:
    write_uvrb_task(tmp_path, name)
    edit(tmp_path / f"{name}/UVRB/{name}/jsonl/{table}.jsonl", change)
    with pytest.raises(DataError, match=says):
        read_task("uvrb", tmp_path, name)


@pytest.mark.parametrize(
    ("benchmark", "names", "says"),
    [
        ("mteb", None, "must be one of mmeb-v2, mrmr, uvrb, but is 'mteb'"),
        ("mmeb-v2", ["SUN398"], r"but \['SUN398'\] are not"),
        ("uvrb", None, "must hold a local copy, but there is none"),
    ],
)
def test_wrong_names_and_folders(benchmark: str, names: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        next(read_tasks(benchmark, tmp_path / "none", names))
    with pytest.raises(DataError, match="A task of mrmr must be among"):
        read_task("mrmr", tmp_path, "none")


def test_rows_of_a_corpus_with_one_id_are_told(tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    file = tmp_path / f"visdoc-tasks/data/tatdqa_test_beir/corpus/{PARQUET}"
    first: Any = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa").candidates[3].media[0]
    edit(file, lambda rows: rows.append({**rows[0], "corpus-id": 30}))
    task = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa")
    assert "1 rows of the corpus repeat an id, and are left out" in task.notes
    page: Any = task.candidates[3].media[0]
    assert page.image.tobytes() == first.image.tobytes()
