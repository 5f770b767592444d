"""FAISS against exact search, with and without lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.search_scale import write_index
from rime_pl.inference import approximate
from rime_pl.inference.approximate import Approximate
from rime_pl.inference.index_folder import IndexFolder, read_blocks
from rime_pl.metrics.top_k import top_k

pytest.importorskip("faiss")


@pytest.mark.parametrize(("flat", "least"), [(10_000, 1.0), (1000, 0.9)])
def test_the_nearest_are_found(
    flat: int, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate, "FLAT_ITEMS", flat)
    monkeypatch.setattr(approximate, "_TRAINED", 8)
    monkeypatch.setattr("benchmarks.search_scale._CLUSTERS", 50)
    folder = IndexFolder(tmp_path)
    queries = write_index(folder, 5000, 16, 3)
    parts = folder.parts()
    exact = top_k(queries, read_blocks(parts, "discriminative"), 10)[1]
    for _ in range(2):  # made, then read from the folder
        scores, rows = Approximate.of(folder, parts, "discriminative").nearest(queries, 10)
        found = [len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), rows.tolist(), strict=True)]
        assert sum(found) / len(found) >= least
        assert bool((scores[:, :-1] >= scores[:, 1:]).all())


def test_an_index_of_other_parts_or_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    folder = IndexFolder(tmp_path)
    queries = write_index(folder, 3000, 16, 2)
    parts = folder.parts()
    wanted = Approximate.of(folder, parts, "discriminative").nearest(queries, 5)[1]
    (file,) = tmp_path.glob("disc-*.faiss")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(Approximate.of(folder, parts, "discriminative").nearest(queries, 5)[1], wanted)
    assert Approximate.of(folder, parts[:1], "discriminative").index.ntotal == parts[0].rows
    assert [one.name for one in tmp_path.glob("*.faiss")] != [file.name]
