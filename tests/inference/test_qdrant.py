"""The how-to about Qdrant: an index in a collection with two named vectors, searched in two steps at once."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import open_index
from tests.inference.test_index_search import TEXTS, build


def test_one_query_of_qdrant_is_our_two_step_search(loaded: Retriever, tmp_path: Path) -> None:
    qdrant = pytest.importorskip("qdrant_client")
    models = qdrant.models
    folder = build(tmp_path / "texts", loaded, list(MODES))
    client = qdrant.QdrantClient(":memory:")
    client.create_collection(
        "photos",
        vectors_config={
            name: models.VectorParams(size=loaded.dimension, distance=models.Distance.DOT)
            for name in ("disc", "gen")
        },
    )
    first = 0
    for part in sorted(folder.glob("part-*.parquet")):
        rows = pq.read_table(part, columns=["id", "disc", "gen", "rewrite", "media"]).to_pylist()
        points = [
            models.PointStruct(
                id=number, vector={"disc": row.pop("disc"), "gen": row.pop("gen")}, payload=row
            )
            for number, row in enumerate(rows, first)
        ]
        client.upsert("photos", points)
        first += len(points)
    assert client.count("photos").count == len(TEXTS)
    index = open_index(folder, loaded)
    for text in TEXTS[::9]:
        disc, gen = (loaded.encode(text, mode).tolist() for mode in MODES)
        found = client.query_points(
            "photos",
            prefetch=models.Prefetch(query=disc, using="disc", limit=10),
            query=gen,
            using="gen",
            limit=3,
        )
        wanted = index.search(text, strategy="two-step", candidates=10, top_k=3, instruction="").hits
        assert [point.payload["id"] for point in found.points] == [hit.id for hit in wanted]
        assert [point.score for point in found.points] == pytest.approx(
            [hit.score for hit in wanted], abs=1e-4
        )
