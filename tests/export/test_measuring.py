"""Recall of an export is that of its run, ranked as the training ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rime_pl
from rime_pl.errors import RimeError
from rime_pl.export import exporting
from rime_pl.export.exporting import Order, export
from rime_pl.export.measuring import KINDS, Measured, corpus_of, measure, stored_as
from rime_pl.inference.retriever import Retriever
from rime_pl.run_folder import RunFolder, write_json
from rime_pl.types import MODE_PAIRS
from tests.export.conftest import make_run
from tests.micro import read_pairs


@pytest.fixture(scope="module")
def run(micro_base: Path, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    stage = RunFolder(make_run(tmp_path_factory.mktemp("measured") / "cma", micro_base))
    write_json(stage.path / "manifest.json", {"data": str(scenes_corpus)})
    stage.config.write_text(yaml.safe_dump({"data": {}, "recall": {}, "model": {}}))
    return stage


def test_recalls_and_stored_vectors(run: RunFolder, scenes_corpus: Path) -> None:
    model = rime_pl.load(run.path)
    said: list[str] = []
    measured = measure(model, model, run.path, said.append)
    pairs = [pair for pair in read_pairs(scenes_corpus, "test") if pair.query is not None]
    assert measured.queries == len(pairs) and measured.tasks == sorted({pair.dataset for pair in pairs})
    assert measured.export == measured.run and set(measured.run) == set(MODE_PAIRS)
    assert measured.stored["float32"]["64"] == measured.run["disc-disc"]
    assert {kind: list(values) for kind, values in measured.stored.items()} == {
        kind: ["64", "32", "16"] for kind in KINDS
    }
    # a naive ranking of each task among the distinct targets of its gallery
    hits: dict[str, list[float]] = {}
    for pair in pairs:
        gallery = {
            one.target.content_id: one.target
            for one in reversed(read_pairs(scenes_corpus, "test"))
            if one.gallery == pair.gallery
        }
        assert pair.query is not None
        scores = model.encode(list(gallery.values())) @ model.encode(pair.query)
        best = list(gallery)[int(scores.argmax())]
        hits.setdefault(pair.dataset, []).append(float(best == pair.target.content_id))
    naive = sum(sum(one) / len(one) for one in hits.values()) / len(hits)
    assert measured.run["disc-disc"] == pytest.approx(naive, abs=1e-6)
    assert "measuring" in said[0] and len(measured.ranges["least"]) == 64


def test_what_is_measured_of_the_export_is_measured_of_the_export(
    run: RunFolder, micro_base: Path, tmp_path: Path
) -> None:
    """With another adapter in the place of the export, each result must be that of the other adapter."""
    model, other = rime_pl.load(run.path), rime_pl.load(make_run(tmp_path / "other", micro_base, seed=2))
    mixed = measure(model, other, run.path, lambda line: None)
    other.run, model.run = model.run, None  # the corpus is that of the run
    only_other = measure(other, None, run.path, lambda line: None)
    assert mixed.export == only_other.run and mixed.stored == only_other.stored
    assert mixed.ranges["least"] == pytest.approx(only_other.ranges["least"], abs=1e-6)
    assert mixed.run != mixed.export, "two random adapters rank in other ways"


def test_the_command_measures_the_folder_that_it_writes(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[Retriever, Retriever | None]] = []

    def told(source: Retriever, exported: Retriever | None, *more: Any) -> Measured:
        loaded.append((source, exported))
        return measure(source, exported, *more)

    monkeypatch.setattr(exporting, "measure", told)
    export(Order("huggingface", run.path, tmp_path / "out", measure=True), lambda line: None)
    ((source, exported),) = loaded
    assert source.run == run and exported is not None
    assert Path(exported.backbone.config.name_or_path).name.startswith("out.half-")


def test_a_run_without_its_corpus_is_refused(run: RunFolder) -> None:
    model = rime_pl.load(run.path)
    model.run = None
    with pytest.raises(RimeError, match="--measure needs a run whose corpus is at hand"):
        corpus_of(model, run.path)


def test_int8_is_within_half_a_step_and_binary_keeps_signs() -> None:
    torch.manual_seed(0)
    training, vectors = torch.randn(500, 8), torch.randn(20, 8).clamp(-2, 2)
    step = (training.amax(0) - training.amin(0)) / 255
    assert ((stored_as("int8", vectors, training) - vectors).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(stored_as("binary", vectors, training), vectors.sign())
    assert torch.equal(stored_as("float32", vectors, training), vectors)
