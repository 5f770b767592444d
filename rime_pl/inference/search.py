"""Searches an index: in any pair of modes, in two steps, or with a rewrite only where it is needed.

Called by `rime search --index`, the search page, and in a notebook. Vectors are read from the parts row group
by row group, and only those of the modes that a search needs; a small index is kept in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.inference.adaptive import limit_of, margins
from rime_pl.inference.approximate import EXACT_ITEMS, Approximate
from rime_pl.inference.encoding import Wanted
from rime_pl.inference.hits import Found, IndexHit
from rime_pl.inference.index import model_difference
from rime_pl.inference.index_folder import (
    COLUMNS,
    IndexFolder,
    Part,
    Record,
    read_blocks,
    read_columns,
    vectors_of,
)
from rime_pl.inference.indexed_media import CorpusTargets, Files, Media
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.sources import Source, is_one
from rime_pl.metrics.top_k import top_k as nearest
from rime_pl.places import tried
from rime_pl.types import Mode

Strategy = Literal["one-pass", "two-step", "adaptive"]
#: Vectors of a mode that take less memory than this are kept after the first search.
KEPT_BYTES = 1 << 29
#: Items that the second step of a two-step search ranks again.
CANDIDATES = 100


class Index(Sequence[Source]):
    """An index that can be searched; as a sequence, its items, each opened when it is asked for.

    Args:
        folder: Where it is.
        retriever: The model that made it.
        media: Opens items for display.
        approximate: Whether searches over all items may use FAISS (None: from ``EXACT_ITEMS`` items on).
    """

    def __init__(
        self, folder: IndexFolder, retriever: Retriever, media: Media, approximate: bool | None = None
    ) -> None:
        self.folder, self.facts, self.retriever, self.media = folder, folder.facts, retriever, media
        self.parts = folder.parts()
        self._state = folder.state()
        self.approximate = len(self) > EXACT_ITEMS if approximate is None else approximate
        self._kept: dict[Mode, Tensor] = {}
        self._faiss: dict[Mode, Approximate] = {}
        self._table = lru_cache(maxsize=64)(self._read_part)

    def __len__(self) -> int:
        return self.parts[-1].start + self.parts[-1].rows if self.parts else 0

    def __getitem__(self, row: Any) -> Any:
        return self.media.source(self.record(range(len(self))[row])[0])

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, items={len(self)}, modes={self.facts.modes})"

    # -- what it holds --------------------------------------------------------------------------------

    def record(self, row: int) -> tuple[Record, str | None]:
        """Return what the index keeps of an item, and its rewrite."""
        part = self._part_of(row)
        table, at = self._table(part), row - part.start
        id, digest, media, text, own, rewrite = (table[n][at].as_py() for n in table.column_names)
        return Record(id, digest, tuple(media), text, own), rewrite

    def _read_part(self, part: Part) -> Any:
        return read_columns(part, ("id", "digest", "media", "text", "instruction", "rewrite"))

    def _part_of(self, row: int) -> Part:
        low, high = 0, len(self.parts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.parts[middle].start <= row else (low, middle)
        return self.parts[low]

    def blocks(self, mode: Mode) -> Iterator[Tensor]:
        """Yield the vectors of a mode, (n, D) float32 on the CPU, in order.

        Raises:
            RimeError: If the index lacks the mode.
        """
        self._need(mode)
        if mode in self._kept:
            yield self._kept[mode]
        elif 4 * len(self) * self.facts.dimension <= KEPT_BYTES:
            self._kept[mode] = torch.cat(list(read_blocks(self.parts, mode)))
            yield self._kept[mode]
        else:
            yield from read_blocks(self.parts, mode)

    def vectors(self, mode: Mode, rows: Tensor) -> Tensor:
        """Return the vectors of some items, (..., D) float32, for rows (...) int64."""
        self._need(mode)
        if mode not in self._kept and 4 * len(self) * self.facts.dimension <= KEPT_BYTES:
            next(self.blocks(mode))
        if mode in self._kept:
            return self._kept[mode][rows]
        distinct, places = rows.unique(return_inverse=True)
        found = torch.empty(len(distinct), self.facts.dimension)
        for part in self.parts:
            mine = (distinct >= part.start) & (distinct < part.start + part.rows)
            if bool(mine.any()):
                table = read_columns(part, [COLUMNS[mode]])
                found[mine] = vectors_of(table, mode)[distinct[mine] - part.start]
        return found[places]

    def _need(self, mode: Mode) -> None:
        if mode not in COLUMNS:
            raise RimeError(f"mode must be {' or '.join(map(repr, COLUMNS))}, but is {mode!r}.")
        if mode not in self.facts.modes:
            raise RimeError(
                f"{self.folder} must hold vectors of mode {mode!r}, but holds {', '.join(self.facts.modes)}."
            )

    # -- search ---------------------------------------------------------------------------------------

    def search(
        self,
        query: Source,
        mode: Mode | None = None,
        target_mode: Mode | None = None,
        top_k: int = 8,
        strategy: Strategy = "one-pass",
        candidates: int = CANDIDATES,
        threshold: float | None = None,
        task: str | None = None,
        instruction: str | None = None,
    ) -> Found:
        """Return the items that are most similar to a query.

        Args:
            query: A text (str), a picture, clip or page, the path of a picture or video, or an Item.
            mode: Mode of the query (default: ``discriminative`` in one pass, else ``generative``).
            target_mode: Mode of the items (default: that of the query).
            top_k: Number of items.
            strategy: ``one-pass`` compares the query with all items. ``two-step`` finds ``candidates`` in the
                discriminative mode, and ranks them again in the modes given. ``adaptive`` writes a rewrite
                only where the discriminative search is unsure, and searches again with it.
            candidates: Number of items that two-step ranks again.
            threshold: Of adaptive: the margin below which a rewrite is written (default: the one that
                `rime search --calibrate` keeps in the run folder).
            task: Task whose instruction the query gets; see ``Retriever.encode_query``.
            instruction: Instruction in the place of the task's.

        Returns:
            The hits, best first; ``rewrite`` is None where none was written.

        Raises:
            RimeError: If the index lacks a mode, or an argument cannot be.
        """
        if not is_one(query):
            raise RimeError(f"query must be one text, path, picture or Item, not a {type(query).__name__}.")
        given = (mode, target_mode, top_k, strategy, candidates, threshold, task, instruction)
        return self.search_many([query], *given)[0]

    def search_many(
        self,
        queries: Iterable[Source],
        mode: Mode | None = None,
        target_mode: Mode | None = None,
        top_k: int = 8,
        strategy: Strategy = "one-pass",
        candidates: int = CANDIDATES,
        threshold: float | None = None,
        task: str | None = None,
        instruction: str | None = None,
        batch_size: int = 64,
    ) -> list[Found]:
        """Return the results of ``search`` for many queries; all share each forward and each pass."""
        asked = list(queries)
        mode = mode or ("discriminative" if strategy == "one-pass" else "generative")
        if strategy == "adaptive" and mode != "generative":
            raise RimeError("An adaptive search writes rewrites, so its mode must be 'generative'.")
        limit = limit_of(self.retriever, strategy, threshold, target_mode)
        target_mode = limit.target_mode if limit else target_mode or mode
        self._check(mode, target_mode, top_k, strategy, candidates)
        if instruction is None:
            instruction = self.retriever.instruction("query", task)
        search = _Search(self, asked, mode, target_mode, top_k, instruction, batch_size)
        if strategy == "one-pass":
            return search.one_pass()
        if strategy == "two-step":
            return search.two_step(max(candidates, top_k))
        assert limit is not None, "the strategy is adaptive"
        return search.adaptive(limit.margin)

    def _check(self, mode: Mode, target_mode: Mode, top_k: int, strategy: str, candidates: int) -> None:
        self.refuse_change()
        if strategy not in get_args(Strategy):
            raise RimeError(f"strategy must be {', '.join(get_args(Strategy))}, but is {strategy!r}.")
        if mode not in COLUMNS:
            raise RimeError(f"mode must be {' or '.join(map(repr, COLUMNS))}, but is {mode!r}.")
        self._need(target_mode)
        if strategy != "one-pass":
            self._need("discriminative")
        for name, value in (("top_k", top_k), ("candidates", candidates)):
            if value < 1:
                raise RimeError(f"{name} must be 1 or more, but is {value}.")

    def refuse_change(self) -> None:
        """Raise a RimeError if the index was built again since it was opened: old vectors, new items."""
        if self.folder.state() != self._state:
            raise RimeError(f"{self.folder} was changed since it was opened. Open it again.")

    def nearest(self, queries: Tensor, mode: Mode, count: int) -> tuple[Tensor, Tensor]:
        """Return scores and rows, each (Q, count), of the items nearest to queries (Q, D)."""
        if self.approximate:
            if mode not in self._faiss:
                self._need(mode)
                self._faiss[mode] = Approximate.of(self.folder, self.parts, mode)
            return self._faiss[mode].nearest(queries, min(count, len(self)))
        return nearest(queries, self.blocks(mode), count)

    def hits(self, scores: Tensor, rows: Tensor) -> list[IndexHit]:
        """Return the hits for scores (k,) and rows (k,); rows below 0 are none."""
        found = []
        for score, row in zip(scores.tolist(), rows.tolist(), strict=True):
            if row >= 0:
                record, rewrite = self.record(row)
                found.append(IndexHit(row, score, rewrite, self, record, self.media))
        return found


class _Search:
    """One call of ``search_many``: encodes, compares, and takes the time of both."""

    def __init__(
        self,
        index: Index,
        queries: list[Source],
        mode: Mode,
        target_mode: Mode,
        top_k: int,
        instruction: str,
        batch_size: int,
    ) -> None:
        self.index, self.queries, self.mode, self.target_mode = index, queries, mode, target_mode
        self.top_k, self.instruction, self.batch_size = top_k, instruction, batch_size
        self.encode_seconds = self.search_seconds = 0.0
        self.rewrites: list[str | None] = [None] * len(queries)

    def one_pass(self) -> list[Found]:
        vectors = self._encode(self.queries, (self.mode,))[self.mode]
        return self._found(*self._nearest(vectors, self.target_mode, self.top_k))

    def two_step(self, candidates: int) -> list[Found]:
        modes = tuple(dict.fromkeys(("discriminative", self.mode)))
        vectors = self._encode(self.queries, modes)
        _, rows = self._nearest(vectors["discriminative"], "discriminative", candidates)
        began = time.perf_counter()
        items = self.index.vectors(self.target_mode, rows.clamp(min=0))  # (Q, candidates, D)
        scores = torch.einsum("qd,qcd->qc", vectors[self.mode], items)
        scores = scores.masked_fill(rows < 0, -torch.inf)
        best, order = scores.sort(dim=1, descending=True, stable=True)
        self.search_seconds += time.perf_counter() - began
        return self._found(best[:, : self.top_k], rows.gather(1, order)[:, : self.top_k])

    def adaptive(self, threshold: float) -> list[Found]:
        width = min(max(2, self.top_k), len(self.index))
        scores = torch.empty(len(self.queries), width)
        rows = torch.empty(len(self.queries), width, dtype=torch.int64)

        def unsure(numbers: Sequence[int], vectors: Tensor) -> Tensor:
            at = torch.tensor(numbers)
            scores[at], rows[at] = self._nearest(vectors, "discriminative", width)
            return margins(scores[at]) < threshold

        vectors = self._encode(self.queries, MODES, unsure)["generative"]
        margin = margins(scores)
        chosen = (margin < threshold).nonzero().flatten()
        scores, rows = scores[:, : self.top_k].clone(), rows[:, : self.top_k].clone()
        if len(chosen):
            scores[chosen], rows[chosen] = self._nearest(vectors[chosen], self.target_mode, self.top_k)
        sure = set(range(len(self.queries))) - set(chosen.tolist())
        self.rewrites = [None if n in sure else text for n, text in enumerate(self.rewrites)]
        found = self._found(scores, rows)
        for one, value in zip(found, margin.tolist(), strict=True):
            one.margin = value
        return found

    def _encode(
        self, queries: list[Source], modes: Sequence[Mode], wanted: Wanted | None = None
    ) -> dict[Mode, Tensor]:
        began, searched = time.perf_counter(), self.search_seconds
        encoded = self.index.retriever.encode_modes(
            queries, modes, self.batch_size, self.instruction, wanted=wanted
        )
        self.encode_seconds += time.perf_counter() - began - (self.search_seconds - searched)
        if "generative" in encoded:
            self.rewrites = list(encoded["generative"].rewrites or [])
        return {mode: one.embeddings for mode, one in encoded.items()}

    def _nearest(self, vectors: Tensor, mode: Mode, count: int) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        found = self.index.nearest(vectors, mode, count)
        self.search_seconds += time.perf_counter() - began
        return found

    def _found(self, scores: Tensor, rows: Tensor) -> list[Found]:
        share = 1000 / max(1, len(self.queries))
        times = (share * self.encode_seconds, share * self.search_seconds)
        return [
            Found(list(self.index.hits(s, r)), text, *times)
            for s, r, text in zip(scores, rows, self.rewrites, strict=True)
        ]


def open_index(
    folder: str | Path,
    retriever: Retriever,
    media: str | Path | None = None,
    approximate: bool | None = None,
) -> Index:
    """Return an index that can be searched.

    Args:
        folder: Its folder.
        retriever: The model that made it, from ``rime_pl.load``.
        media: Folder of its media, if they are not where they were.
        approximate: See :class:`Index`.

    Raises:
        RimeError: If there is no index, it is not complete or damaged, or another model made it.
    """
    there = IndexFolder(folder)
    facts = there.facts
    there.refuse_incomplete()
    differs = model_difference(facts.model, retriever.name)
    if facts.dimension != retriever.dimension:
        differs.append(f"the dimension is {facts.dimension} there and {retriever.dimension} here")
    if differs:
        raise RimeError(
            f"{folder} must be an index of this model, but is not: {'; '.join(differs)}. It was made "
            f"with {facts.run or 'a run that it does not name'}, as that was then. Name the run that made it "
            "(--run), or index again in another folder."
        )
    index = Index(there, retriever, _media_of(there, media), approximate)
    if not len(index):
        raise RimeError(f"{folder} must hold items to search, but holds none. Give `rime index` again.")
    if len(index) != facts.count:
        raise RimeError(
            f"{folder} must hold {facts.count} items, as index.json says, but its parts hold {len(index)}. "
            "Give the same `rime index` again."
        )
    return index


def _media_of(folder: IndexFolder, given: str | Path | None) -> Media:
    facts = folder.facts
    places = [Path(given)] if given is not None else tried(facts.roots, folder.path, "")[: len(facts.roots)]
    if given is not None and not places[0].is_dir():
        raise RimeError(f"--media must be a folder, but is {given}.")
    root = next((place for place in places if place.is_dir()), places[0] if places else None)
    return CorpusTargets(root) if facts.kind == "corpus" and root else Files(root)
