"""Vectors that were made elsewhere become an index, and an index is read by other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rime_pl.errors import RimeError
from rime_pl.inference.index_folder import Facts, IndexFolder, read_blocks
from rime_pl.inference.index_import import import_vectors
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.search import open_index
from tests.inference.test_index_search import TEXTS


def facts(model: Retriever) -> Facts:
    return Facts(model.name, model.dimension, ["discriminative"], "")


def test_vectors_of_another_program_are_searched_like_our_own(loaded: Retriever, tmp_path: Path) -> None:
    vectors = {
        name: loaded.encode(TEXTS, mode) for name, mode in (("disc", "discriminative"), ("gen", "generative"))
    }  # type: ignore[arg-type]
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float64(), 64), pa.large_list(pa.float16())):
        path = tmp_path / str(kind).replace(" ", "")
        columns = {
            name: pa.array(found.tolist(), pa.list_(pa.float64())).cast(kind)
            for name, found in vectors.items()
        }
        table = pa.table({"id": list(range(len(TEXTS))), **columns, "text": TEXTS})
        pq.write_table(table, tmp_path / "made.parquet")
        counts, notes = import_vectors(path, tmp_path / "made.parquet", facts(loaded))
        assert counts.total == len(TEXTS) and not counts.unusable and not notes
        index = open_index(path, loaded)
        found = index.search("a red ring", "generative", "discriminative", instruction="")
        loaded.index(TEXTS, instruction="")
        wanted = loaded.search("a red ring", "generative", 8, "discriminative", instruction="")
        assert [hit.score for hit in found.hits] == pytest.approx(
            [hit.score for hit in wanted.hits], abs=2e-3
        )
        assert found.hits[0].item.text == TEXTS[found.hits[0].place]
        with pytest.raises(RimeError, match="must be an empty folder"):
            import_vectors(path, tmp_path / "made.parquet", facts(loaded))


def test_rows_that_cannot_be_used_are_named(loaded: Retriever, tmp_path: Path) -> None:
    good = torch.nn.functional.normalize(torch.ones(64), dim=0).tolist()
    rows = [
        {"id": "good", "disc": good, "media": "a.png"},
        {"id": "long", "disc": [3 * number for number in good], "media": None},
        {"id": "good", "disc": good, "media": None},
        {"id": "short", "disc": good[:3], "media": None},
        {"id": "nan", "disc": [float("nan")] * 64, "media": None},
        {"id": "zero", "disc": [0.0] * 64, "media": None},
        {"id": "null", "disc": None, "media": None},
        {"id": None, "disc": good, "media": None},
        {"id": "hole", "disc": [None, *good[1:]], "media": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    counts, notes = import_vectors(tmp_path / "index", tmp_path / "made.parquet", facts(loaded))
    assert (counts.total, counts.unusable) == (2, 7) and "1 vector was not of length 1" in notes[0]
    told = [json.loads(line) for line in IndexFolder(tmp_path / "index").unusable.read_text().splitlines()]
    assert [line["id"] for line in told] == [f"row {n}" for n in (3, 4, 5, 6, 7, 8, 9)]
    (vectors,) = read_blocks(IndexFolder(tmp_path / "index").parts(), "discriminative")
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)
    hits = open_index(tmp_path / "index", loaded).search("a", instruction="").hits
    assert {hit.name for hit in hits} == {"good", "long"}


def test_absolute_media_below_the_folder_are_seen_from_it_and_others_are_refused(
    loaded: Retriever, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    good = torch.nn.functional.normalize(torch.ones(64), dim=0).tolist()
    names = [str(tmp_path / "photos" / "a.png"), "b.png", str(tmp_path / "c.png")]
    rows = [{"id": name, "disc": good, "media": name} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    given = (tmp_path / "made.parquet", facts(loaded), tmp_path / "photos")
    counts, _ = import_vectors(tmp_path / "index", *given)
    assert (counts.total, counts.unusable) == (2, 1)
    index = open_index(tmp_path / "index", loaded)
    assert [index.record(row)[0].media for row in range(2)] == [("a.png",), ("b.png",)]
    assert "field 'media' must be below" in IndexFolder(tmp_path / "index").unusable.read_text()


def test_a_file_that_cannot_be_an_index_is_refused(loaded: Retriever, tmp_path: Path) -> None:
    file = tmp_path / "made.parquet"
    for table, error in (
        ({"id": ["a"]}, "must have the column id, and disc or gen or both"),
        ({"disc": [[1.0]]}, "must have the column id"),
        ({"id": ["a"], "disc": ["x"]}, "column 'disc' must hold lists of numbers, but is string"),
        (
            {"id": ["a"], "disc": pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2))},
            "must have 64 numbers, .* has 2",
        ),
        ({"id": ["a"], "disc": [[1.0, 0.0]]}, r"must have rows that can be used, .* row 1: .* 64 numbers"),
    ):
        pq.write_table(pa.table(table), file)
        with pytest.raises(RimeError, match=error):
            import_vectors(tmp_path / "index", file, facts(loaded))
    file.write_bytes(b"PAR1 no")
    with pytest.raises(RimeError, match="cannot be read as Parquet"):
        import_vectors(tmp_path / "index", file, facts(loaded))
    with pytest.raises(RimeError, match="there is none"):
        import_vectors(tmp_path / "index", tmp_path / "nope", facts(loaded))
