"""mteb takes an export with no code of ours, and gives the scores of our own vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rime_pl
from rime_pl.inference.retriever import Retriever
from rime_pl.miniature.random_checkpoint import WORDS
from rime_pl.types import Item
from tests.families import noise

mteb = pytest.importorskip("mteb")
COUNT = 12


def task(queries: list[str], pictures: list[Image.Image]) -> Any:
    """Texts that ask for pictures; the right answers are as random as the model."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local",
            description="A task of a test.",
            dataset={"path": "local/local", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_5",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            names = range(len(queries))
            asked = Dataset.from_dict({"id": [f"q{n}" for n in names], "text": queries})
            corpus = Dataset.from_dict({"id": [f"d{n}" for n in names], "image": pictures})
            self.dataset = {
                "default": {
                    "test": {
                        "queries": asked,
                        "corpus": corpus,
                        "relevant_docs": {f"q{n}": {f"d{n}": 1} for n in names},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return Local()


def recalls(model: Retriever, queries: list[str], pictures: list[Image.Image]) -> dict[int, float]:
    """recall@k of our own vectors, with the instructions of the task."""
    asked = model.encode_query(queries)
    found = model.encode_target([Item("", (picture,)) for picture in pictures])
    order = (asked @ found.T).argsort(dim=1, descending=True)
    places = (order == torch.arange(len(queries)).unsqueeze(1)).int().argmax(dim=1)
    return {k: float((places < k).float().mean()) for k in (1, 3, 5, 10)}


def test_the_same_score(family_run: Callable[[str], Path], exported: Callable[..., Path]) -> None:
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

    queries = [f"{WORDS[n % 13]} {WORDS[(3 * n + 5) % 13]} {n}" for n in range(COUNT)]
    pictures = [noise(n, 40 + 6 * n, 90 - 4 * n) for n in range(COUNT)]
    folder = exported("qwen3_vl")
    model = SentenceTransformerEncoderWrapper(str(folder), device="cpu")
    # of a model of the hub, mteb reads this file itself; of a local folder it knows texts only
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    modalities = ModelMeta._detect_modalities_from_sbert_config(config)
    assert modalities == ["image", "text", "video"]
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": modalities})
    results = mteb.evaluate(model, task(queries, pictures), cache=None, show_progress_bar=False)
    (scores,) = results.task_results[0].scores["test"]
    ours = recalls(rime_pl.load(family_run("qwen3_vl")), queries, pictures)
    assert {k: round(scores[f"recall_at_{k}"], 4) for k in ours} == {k: round(v, 4) for k, v in ours.items()}
    assert 0 < ours[10] < 1, "a score that no ranking could miss proves nothing"
