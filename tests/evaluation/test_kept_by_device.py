"""Embeddings that are kept belong to one kind of device: others round in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rime_pl.evaluation.embedding import store_of
from rime_pl.inference.retriever import Retriever


def test_each_kind_of_device_has_embeddings_of_its_own(tmp_path: Path) -> None:
    def folder(device: str) -> Path:
        weights: Any = torch.nn.Linear(1, 1, device=device)
        return store_of(tmp_path, Retriever(weights, name="a model")).folder

    assert folder("cpu") == folder("cpu") != folder("meta")
