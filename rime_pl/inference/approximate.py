"""Approximate search over very large indices, by FAISS (extra `faiss`).

search.py uses it above ``EXACT_ITEMS`` items, or when it is asked for. A FAISS index is made from the parts
and kept beside them; one of other parts is made again. Small ones are flat, which is exact; large ones are
inverted lists (IVF), whose recall against exact search benchmarks/search_scale.py measures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.inference.index_folder import COLUMNS, IndexFolder, Part, read_blocks, read_columns
from rime_pl.types import Mode

#: Up to so many items, exact search is the default.
EXACT_ITEMS = 1_000_000
#: Up to so many items, a FAISS index is flat.
FLAT_ITEMS = 100_000
#: Vectors for each list that the lists are trained on.
_TRAINED = 64
#: Share of the lists that a query visits.
VISITED = 1 / 16


class Approximate:
    """A FAISS index over the vectors of one mode.

    Args:
        index: Of FAISS, by inner product.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def of(cls, folder: IndexFolder, parts: Sequence[Part], mode: Mode) -> Approximate:
        """Read the FAISS index of a mode, or make it and keep it.

        Raises:
            RimeError: If FAISS is not installed.
        """
        faiss = _faiss()
        file = folder.path / f"{COLUMNS[mode]}-{_state(parts)}.faiss"
        if file.is_file():
            try:
                return cls(faiss.read_index(str(file)))
            except RuntimeError:  # a damaged file is made again
                file.unlink()
        made = build(parts, mode, folder.facts.dimension)
        half_written = file.with_suffix(".half")
        faiss.write_index(made.index, str(half_written))
        half_written.replace(file)
        for old in folder.path.glob(f"{COLUMNS[mode]}-*.faiss"):
            if old != file:
                old.unlink()
        return made

    def nearest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return scores and rows, each (Q, count); row -1 where the lists visited held no more items."""
        scores, rows = self.index.search(np.ascontiguousarray(queries.cpu().float().numpy()), count)
        return torch.from_numpy(scores), torch.from_numpy(rows)


def build(parts: Sequence[Part], mode: Mode, dimension: int) -> Approximate:
    """Return a FAISS index over the vectors of some parts; flat, or with about 4 sqrt(N) lists."""
    faiss = _faiss()
    total = sum(part.rows for part in parts)
    if total <= FLAT_ITEMS:
        index = faiss.IndexFlatIP(dimension)
    else:
        lists = round(4 * math.sqrt(total))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.train(_sample(parts, mode, _TRAINED * lists, total))
        index.nprobe = max(1, round(lists * VISITED))
    for block in read_blocks(parts, mode):
        index.add(block.numpy())
    return Approximate(index)


def _sample(parts: Sequence[Part], mode: Mode, wanted: int, total: int) -> Any:
    """Return about ``wanted`` vectors, evenly spaced over all parts."""
    step = max(1, total // wanted)
    found, start = [], 0
    for block in read_blocks(parts, mode):
        found.append(block[-start % step :: step].numpy())
        start += len(block)
    return np.concatenate(found)


def _state(parts: Sequence[Part]) -> str:
    """Return a hash of the items in the parts, in their order."""
    state = hashlib.sha256()
    for part in parts:
        for digest in read_columns(part, ["digest"])["digest"].to_pylist():
            state.update(digest)
    return state.hexdigest()[:16]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RimeError(
            "An approximate search needs one more package: pip install 'rime_pl[faiss]'. Or search exactly: "
            "--faiss false."
        ) from error
    return faiss
