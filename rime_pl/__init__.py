"""rime_pl: train and study multimodal embeddings that rewrite before they embed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rime_pl.inference.retriever import Retriever

__version__ = "0.1.0"


def load(run: str | Path, device: str = "cpu") -> Retriever:
    """Load the model of a finished run: ``rime_pl.load("runs/mine/cma").encode(["a cat"], "generative")``.

    Args:
        run: Folder of a stage, or the folder above it.
        device: Device of the model, e.g. "cuda".
    """
    from rime_pl.inference.retriever import load as load_run  # here, because it is slow to import

    return load_run(run, device)
