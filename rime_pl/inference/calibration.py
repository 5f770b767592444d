"""Chooses on the validation split below which margin a query gets a rewrite, and keeps it in the run folder.

Called by `rime search --calibrate` and by benchmarks/search.py; adaptive.py reads what is kept.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.inference.adaptive import FILE, Point, choose, curve
from rime_pl.inference.labelled import Vectors, embed_labelled, read_labelled
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.run_folder import write_json
from rime_pl.types import Mode

#: The split that a threshold is chosen on.
SPLIT = "val"


@dataclass(frozen=True)
class Calibration:
    """A threshold and where it comes from."""

    chosen: Point
    target_mode: Mode
    curves: dict[Mode, list[Point]]  # target mode -> from never to always
    queries: int

    def json(self, model: str) -> dict[str, Any]:
        """Return what the run folder keeps; JSON has no infinity, so null stands for it."""
        return {
            "model": model,
            "split": SPLIT,
            "queries": self.queries,
            "target_mode": self.target_mode,
            **_point(self.chosen),
            "curves": {mode: [_point(one) for one in points] for mode, points in self.curves.items()},
        }


def _point(point: Point) -> dict[str, float | None]:
    return {name: None if math.isinf(value) else value for name, value in asdict(point).items()}


def corpus_of(retriever: Retriever) -> Path:
    """Return the corpus of the run of a model.

    Raises:
        RimeError: If it has none, or that is gone.
    """
    corpus = retriever.run.corpus if retriever.run else None
    if corpus is None:
        raise RimeError(
            f"{retriever.run or 'the model'} must have its corpus, whose validation split the threshold is "
            "chosen on, but it is gone. Copy it where it was in training."
        )
    return corpus


def measure(retriever: Retriever, split: str, batch_size: int = 64, progress: bool = False) -> Vectors:
    """Return both vectors of the queries of a run's headline tasks and of their galleries."""
    assert retriever.run is not None, "corpus_of refuses it"
    limit = retriever.backbone.processor.prompt.media_limit
    settings = retriever.run.settings if retriever.run.config.is_file() else {}
    found = read_labelled(corpus_of(retriever), split, limit, settings)
    return embed_labelled(retriever, found, batch_size, progress)


def calibrate(vectors: Vectors) -> Calibration:
    """Return the threshold with the highest recall@1; of equal ones that with the fewest rewrites.

    Both target modes are tried.
    """
    curves = {mode: curve(vectors.asked(mode)) for mode in MODES}
    best = {mode: choose(points) for mode, points in curves.items()}
    target_mode = max(reversed(MODES), key=lambda mode: (best[mode].recall, -best[mode].share))
    return Calibration(best[target_mode], target_mode, curves, len(vectors.split.tasks))


def keep(retriever: Retriever, found: Calibration) -> Path:
    """Write the threshold into the run folder and return its file."""
    assert retriever.run is not None, "corpus_of refuses it"
    file = retriever.run.path / FILE
    write_json(file, found.json(retriever.name))
    return file
