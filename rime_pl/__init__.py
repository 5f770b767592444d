"""rime_pl: train and study multimodal embeddings that rewrite before they embed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rime_pl.inference.retriever import Retriever

__version__ = "0.1.0"


def load(run: str | Path, device: str = "cpu") -> Retriever:
    """The model of a finished run: ``rime_pl.load("runs/mine/cma").encode(["a cat"], mode="generative")``.

    Args:
        run: A stage's folder, or the folder above it.
        device: Where the model goes.
    """
    from rime_pl.inference.retriever import load as load_run  # here, so that `import rime_pl` stays fast

    return load_run(run, device)
