"""Damaged tables of documents, of MRMR and of UVRB: each fault is an error that names it, or is counted."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.reading import read_task, read_tasks
from rime_pl.datamodules.benchmarks.rows import MissingFilesError
from rime_pl.datamodules.benchmarks.task import BenchmarkTask, MissingTask
from rime_pl.errors import DataError
from tests.datamodules.benchmarks.damage import PARQUET, drop, edit, put
from tests.datamodules.benchmarks.official_copies import write_image_task
from tests.datamodules.benchmarks.official_documents import (
    write_document_task,
    write_mrmr_task,
    write_uvrb_task,
)
from tests.datamodules.benchmarks.official_videos import write_video_task

DATA = "video-tasks/data"


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
    ("CMRB", "queries", put(0, text=" "), r"CMRB: .*queries.jsonl row 1 must have 'text', .* but 'text' is"),
    ("MS-TI", "queries", put(0, text=""), r"MS-TI: .* row 1 must have 'text' and 'image', .* but 'text' is"),
    ("MS-TI", "queries", put(1, image=None), r"MS-TI: .* row 2 must have .* but 'image' is missing or empty"),
    ("MS-TV", "queries", put(2, video=""), r"MS-TV: .* row 3 must have .* but 'video' is missing or empty"),
    ("LoVR-C2V", "queries", lambda rows: rows[0].pop("video"), r"LoVR-C2V: .* row 1 must have 'video'"),
    ("MSRVTT-I2V", "queries", lambda rows: rows[0].pop("image"), r"MSRVTT-I2V: .* row 1 must have 'image'"),
    (
        "CMRB",
        "corpus",
        lambda rows: rows[2].pop("video"),
        r"CMRB: .*corpus.jsonl row 3 must name a video in",
    ),
    ("CMRB", "corpus", put(0, video="../secret.mp4"), "must not contain '..'"),
    ("CMRB", "corpus", put(0, video="gone.mp4"), "1 are missing. The first: gone"),
    ("CMRB", "corpus", put(0, video=""), "row 1 must name a video in 'video'"),
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


@pytest.mark.parametrize(
    ("benchmark", "says"),
    [
        (
            "mmeb-v2",
            "must hold one of image-tasks, video-tasks, .*, but .* holds MMEB-V2, a, b, c, d and more",
        ),
        ("mrmr", "must hold one of MRMRbenchmark, knowledge, .*, but .* holds MMEB-V2, a, b, c, d and more"),
        ("uvrb", "must hold one of UVRB, MSRVTT, .*, but .* holds MMEB-V2, a, b, c, d and more"),
    ],
)
def test_a_folder_of_something_else_is_one_error(benchmark: str, says: str, tmp_path: Path) -> None:
    for name in ("MMEB-V2/image-tasks", *"abcde"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=says):
        read_tasks(benchmark, tmp_path)
    with pytest.raises(DataError, match=r"but .*/e holds nothing"):
        read_tasks(benchmark, tmp_path / "e")


def test_a_task_that_cannot_be_used_does_not_end_the_reading(tmp_path: Path) -> None:
    for name in ("CIRR", "NIGHTS"):
        write_image_task(tmp_path, name)
    edit(tmp_path / "image-tasks/CIRR" / PARQUET, put(1, qry_img_path="CIRR/none.png"))
    failed, read = read_tasks("mmeb-v2", tmp_path, ["CIRR", "NIGHTS"])
    assert isinstance(failed, MissingTask) and isinstance(read, BenchmarkTask)
    assert failed.code == "READ_ERROR" and str(failed).startswith("CIRR failed: ")
    assert "1 are missing. The first: CIRR/none.png" in failed.reason and read.name == "NIGHTS"


def test_rows_of_a_corpus_with_one_id_are_told(tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    file = tmp_path / f"visdoc-tasks/data/tatdqa_test_beir/corpus/{PARQUET}"
    first: Any = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa").candidates[3].media[0]
    edit(file, lambda rows: rows.append({**rows[0], "corpus-id": 30}))
    task = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa")
    assert "1 rows of the corpus repeat an id, and are left out" in task.notes
    page: Any = task.candidates[3].media[0]
    assert page.image.tobytes() == first.image.tobytes()


def test_queries_with_one_id_are_told(tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    write_uvrb_task(tmp_path, "CMRB")
    edit(
        tmp_path / f"visdoc-tasks/data/tatdqa_test_beir/queries/{PARQUET}", lambda rows: rows.append(rows[0])
    )
    edit(tmp_path / "CMRB/UVRB/CMRB/jsonl/queries.jsonl", lambda rows: rows.append(rows[0]))
    for benchmark, name in (("mmeb-v2", "ViDoRe_tatdqa"), ("uvrb", "CMRB")):
        task = read_task(benchmark, tmp_path, name)
        assert len(task.queries) == len(task.labels) == 4
        assert "1 queries repeat an id, and count" in task.notes


def test_a_query_of_another_kind_is_a_text_and_told(tmp_path: Path) -> None:
    write_video_task(tmp_path, "MomentSeeker")
    edit(tmp_path / DATA / "momentseeker_1k6.jsonl", put(1, input_frames="a.webp"))
    task = read_task("mmeb-v2", tmp_path, "MomentSeeker")
    assert not task.queries[1].media
    assert task.queries[1].instruction == "Find the clip that corresponds to the given text:"
    assert "1 queries name neither .jpg nor .mp4, and are texts only, as officially" in task.notes


def test_a_damaged_row_group_does_not_hide_the_others(tmp_path: Path) -> None:
    write_document_task(tmp_path, "ViDoRe_tatdqa")
    file = tmp_path / f"visdoc-tasks/data/tatdqa_test_beir/corpus/{PARQUET}"
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(1)
    data = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    task = read_task("mmeb-v2", tmp_path, "ViDoRe_tatdqa")
    assert task.candidates[1].media
    for _ in range(2):
        with pytest.raises(DataError, match="row group 1 cannot be read as Parquet"):
            task.candidates[2]
    assert task.candidates[4].media
