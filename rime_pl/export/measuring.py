"""Recall of an export on the test split of its run: beside the run, and with shorter or quantised vectors.

Called by exporting.py where the corpus is at hand. Stored vectors take most of the memory of an index, so the
targets are cut and quantised, and the queries stay float32.

Shape legend: N items, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rime_pl.datamodules.eval_plan import gallery_of
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.metrics.modes import dimension_results
from rime_pl.metrics.retrieval import RecallMetric
from rime_pl.run_folder import RunFolder, headline_tasks
from rime_pl.types import MODE_PAIRS, Mode, Side, content_hash

#: Targets of the training split that say in which range each number of an embedding lies.
CALIBRATION = 1000
KINDS = ("float32", "int8", "binary")


@dataclass(frozen=True)
class Measured:
    """Recall@1 on the test split, mean over the headline tasks."""

    queries: int
    gallery: int  # distinct targets
    tasks: list[str]
    run: dict[str, float]  # mode pair -> recall@1 of the run
    export: dict[str, float] | None  # the same of the exported weights
    stored: dict[str, dict[str, float]]  # kind of stored vector -> length -> recall@1 of disc-disc
    ranges: dict[str, list[float]]  # least and greatest value of each dimension, over training targets


class _Items(Sequence[Any]):
    """One side of some samples, each read when it is asked for."""

    def __init__(self, entries: Sequence[Any], side: Side) -> None:
        self.reader, self.side = ShardReader(entries), side

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        return getattr(self.reader.read(range(len(self))[index], self.side), self.side)


@dataclass(frozen=True)
class _Split:
    """The queries and the gallery of a test."""

    queries: list[Any]  # entries
    gallery: list[Any]
    tasks: list[str]


def measure(source: Retriever, exported: Retriever | None, run: Path, say: Callable[[str], None]) -> Measured:
    """Return the recalls of a run and of its export.

    Args:
        source: The run.
        exported: The export; None for an adapter, which is the run itself.
        run: As the user named it.
        say: Told what is done.

    Raises:
        RimeError: If there is no run, or its corpus is gone.
    """
    stage, corpus = corpus_of(source, run)
    split = _test_split(stage, corpus)
    say(f"measuring {len(split.queries)} queries among {len(split.gallery)} targets of {corpus}")
    measured = stage.summary["after"].get("recall@1", {}) if stage.tested else dict.fromkeys(MODE_PAIRS)
    pairs = [pair for pair in MODE_PAIRS if pair in measured]  # a run may be tested in one mode only
    modes = MODES if len(pairs) > 1 else MODES[:1]
    ours = _vectors(source, split, modes)
    theirs = ours if exported is None else _vectors(exported, split, modes)
    training = list(read_split(corpus, "train", split.tasks))
    chosen = training[:: -(-len(training) // CALIBRATION)]
    targets = (exported or source).encode(_Items(chosen, "target"))
    return Measured(
        len(split.queries),
        len(split.gallery),
        split.tasks,
        _recalls(split, *ours, pairs),
        None if exported is None else _recalls(split, *theirs, pairs),
        _stored(split, *theirs, targets),
        {"least": targets.amin(0).tolist(), "greatest": targets.amax(0).tolist()},
    )


def corpus_of(source: Retriever, run: Path) -> tuple[RunFolder, Path]:
    """Return the run of a model and the folder of its corpus; raises as :func:`measure`."""
    corpus = source.run.corpus if source.run is not None else None
    if source.run is None or corpus is None:
        raise RimeError(
            f"--measure needs a run whose corpus is at hand, but {run} has none. Leave --measure out, or put "
            "the corpus back where the run looks for it."
        )
    return source.run, corpus


def _test_split(stage: RunFolder, corpus: Path) -> _Split:
    data = stage.settings.get("data", {})
    entries = read_split(corpus, "test", data.get("tasks"))
    for name in data.get("memory_splits") or []:
        entries = entries + read_split(corpus, name)
    asked = [entry for entry in entries if entry.query_content is not None]
    wanted = headline_tasks(stage.settings, {entry.dataset for entry in asked})
    queries = [entry for entry in asked if entry.dataset in wanted]
    galleries = {entry.gallery for entry in queries}
    gallery = [entries[number] for number in gallery_of(entries)]
    return _Split(queries, [entry for entry in gallery if entry.gallery in galleries], wanted)


_Side = dict[str, Tensor]  # view ("disc", "gen") -> (N, D)


_VIEWS: dict[Mode, str] = {"discriminative": "disc", "generative": "gen"}


def _vectors(model: Retriever, split: _Split, modes: Sequence[Mode]) -> tuple[_Side, _Side]:
    """Return the vectors of queries and gallery in some modes."""
    found = []
    sides: tuple[tuple[list[Any], Side], ...] = ((split.queries, "query"), (split.gallery, "target"))
    for entries, side in sides:
        encoded = model.encode_modes(_Items(entries, side), modes, 32)
        found.append({_VIEWS[mode]: encoded[mode].embeddings for mode in modes})
    return found[0], found[1]


def _recalls(
    split: _Split, queries: _Side, gallery: _Side, pairs: Sequence[str] = MODE_PAIRS
) -> dict[str, float]:
    """Return recall@1 of mode pairs: mean over tasks."""
    named = {pair: (pair.split("-")[0], pair.split("-")[1]) for pair in pairs}
    metric = RecallMetric(named, (1,))
    sides: tuple[tuple[Side, list[Any], _Side], ...] = (
        ("query", split.queries, queries),
        ("target", split.gallery, gallery),
    )
    for side, entries, vectors in sides:
        metric.update(
            side,
            vectors,
            torch.tensor([content_hash(f"{side} {number}") for number in range(len(entries))]),
            torch.tensor([content_hash(entry.target_content) for entry in entries]),
            torch.tensor([content_hash(entry.gallery) for entry in entries]),
            torch.tensor([content_hash(entry.dataset) for entry in entries]),
            torch.zeros(len(entries), dtype=torch.bool),
        )
    table = metric.ranks()
    return dimension_results([table.of_task(content_hash(name)) for name in split.tasks])


def _stored(split: _Split, queries: _Side, gallery: _Side, training: Tensor) -> dict[str, dict[str, float]]:
    """Return recall@1 of disc-disc for each kind and length of stored vectors."""
    width = training.shape[1]
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for size in (width, width // 2, width // 4):
        asked = {"disc": normalize(queries["disc"][:, :size], dim=1)}
        whole, known = (normalize(rows[:, :size], dim=1) for rows in (gallery["disc"], training))
        for kind in KINDS:
            stored = {"disc": stored_as(kind, whole, known)}
            found[kind][str(size)] = _recalls(split, asked, stored, ["disc-disc"])["disc-disc"]
    return found


def stored_as(kind: str, vectors: Tensor, training: Tensor) -> Tensor:
    """Return what a query is compared with when vectors are stored in another type.

    Args:
        kind: One of KINDS. "int8" has 256 steps between the least and the greatest value of a dimension;
            "binary" keeps the signs.
        vectors: (N, D) float32.
        training: (T, D) float32, which say the ranges; a value outside of them is moved to their end.

    Returns:
        (N, D) float32.

    Example:
        >>> training = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
        >>> stored_as("int8", torch.tensor([[0.5, 2.0]]), training)
        tensor([[0.4980, 0.5000]])
        >>> stored_as("binary", torch.tensor([[0.5, -2.0]]), training)
        tensor([[ 1., -1.]])
    """
    if kind == "float32":
        return vectors
    if kind == "binary":
        return torch.where(vectors > 0, 1.0, -1.0)
    least, greatest = training.amin(0), training.amax(0)
    step = (greatest - least).clamp(min=1e-12) / 255
    return ((vectors - least) / step).round().clamp(0, 255) * step + least
