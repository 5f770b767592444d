"""What the search page asks of whatever searches for it, and the two that there are: an index, or a gallery.

Called by the server beside it. Nothing here knows of requests.
"""

from __future__ import annotations

import io
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from PIL import Image, ImageDraw

from rime_pl.errors import RimeError
from rime_pl.inference.adaptive import margins, read_threshold
from rime_pl.inference.gallery_cache import Encoded
from rime_pl.inference.hits import Found, Hit
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import Index
from rime_pl.inference.sources import Source, to_item
from rime_pl.media import thinned
from rime_pl.types import MODE_PAIRS, Clip, Item, Mode, frames_of

SHORT: dict[str, Mode] = {"disc": "discriminative", "gen": "generative"}
#: Pixels of the longer side of a picture on the page, and how many of them are kept.
SIDE = 240
KEPT = 1024
#: Frames of a clip on the page, milliseconds of each, and how often they are shown.
FRAMES, FRAME_MS, LOOPS = 8, 200, 3
#: Media of an item that are shown at most.
BESIDE = 4


@dataclass
class Result:
    """One item in a column."""

    id: int  # its row in the index; pictures are asked for by it
    score: float  # cosine
    name: str
    text: str
    rewrite: str  # "" without one
    pictured: bool  # whether there is a picture to show


@dataclass
class Column:
    """What one mode pair finds."""

    pair: str
    results: list[Result] = field(default_factory=list)
    encode_ms: float = 0.0  # to embed the query, with its rewrite in the generative mode
    search_ms: float = 0.0
    missing: str = ""  # why there are no results, in a sentence


@dataclass
class Answer:
    """What is found for one query."""

    columns: list[Column]  # in the order of MODE_PAIRS
    rewrite: str
    adaptive: str  # whether a rewrite was worth writing, in a sentence


class Searcher(Protocol):
    """What the page needs. One thread calls ``search``, another one ``picture``."""

    about: str  # what is searched, such as "1,860 items of photos.index"

    def search(self, query: Item, top_k: int) -> Answer:
        """Return the best items of each mode pair; a RimeError says what is wrong with the query."""

    def picture(self, id: int) -> bytes | None:
        """Return a small WebP of an item, by its row; None if there is no such row, or nothing to show."""


class Pictures:
    """Small pictures of the items of a gallery, each opened once; safe to use from several threads."""

    def __init__(self, items: Sequence[Source]) -> None:
        self._items, self._lock = items, threading.Lock()
        self._kept = lru_cache(maxsize=KEPT)(self._opened)

    def picture(self, id: int) -> bytes | None:
        """Return a small WebP of the item in a row; that of a clip moves, several media are side by side."""
        if not 0 <= id < len(self._items):
            return None
        with self._lock:  # shards are read by one thread at a time
            return self._kept(id)

    def item(self, id: int) -> Source:
        """Return the item in a row, as the gallery holds it."""
        with self._lock:
            found: Source = self._items[id]
            return found

    def _opened(self, id: int) -> bytes | None:
        try:
            item = to_item(self._items[id])
            shown = [thinned(one, FRAMES) if isinstance(one, Clip) else one for one in item.media[:BESIDE]]
            media = replace(item, media=tuple(shown)).thumbnail(SIDE).media
        except (RimeError, OSError):  # gone or changed since it was indexed
            return None
        if not media:
            return None
        if len(media) == 1:
            frames = frames_of(media[0])
        else:
            frames = (_beside([frames_of(one)[0] for one in media], len(item.media) - len(media)),)
        file = io.BytesIO()
        # a clip plays by itself for less than 5 seconds: what moves for longer would need a button
        moving = {"append_images": frames[1:], "duration": FRAME_MS, "loop": LOOPS}
        frames[0].save(file, "WEBP", quality=85, save_all=len(frames) > 1, **moving)
        return file.getvalue()


def _beside(pictures: Sequence[Image.Image], more: int) -> Image.Image:
    """Return pictures in a row, ``SIDE`` pixels wide, and how many more there are."""
    gap = 4
    small = [one.copy() for one in pictures]
    for one in small:
        one.thumbnail((SIDE // len(small) - gap, SIDE))  # at least one pixel high, and never larger
    height = max(one.height for one in small)
    row = Image.new("RGB", (SIDE, height + (16 if more else 0)), "white")
    for number, one in enumerate(small):
        row.paste(one, (number * SIDE // len(small), (height - one.height) // 2))
    if more:
        ImageDraw.Draw(row).text((0, height + 2), f"and {more} more", "black")
    return row


class IndexSearcher:
    """Searches an index; the query is embedded once in each mode.

    Args:
        index: From ``open_index``.
        name: What a reader calls it.
        task: Task whose instruction the queries get; see ``Retriever.encode_query``.
        instruction: Instruction in the place of the task's.
    """

    def __init__(
        self, index: Index, name: str, task: str | None = None, instruction: str | None = None
    ) -> None:
        self.index, self.pictures = index, Pictures(index)
        self.about = f"{len(index):,} items of {name}"
        self.asked = _instruction(index.retriever, task, instruction)

    def picture(self, id: int) -> bytes | None:
        try:
            self.index.refuse_change()  # another item may have this row by now
        except RimeError:
            return None
        return self.pictures.picture(id)

    def search(self, query: Item, top_k: int) -> Answer:
        self.index.refuse_change()
        query = replace(query, instruction=query.instruction or self.asked)
        encoded: dict[Mode, Encoded] = {}
        for mode in MODES:  # one after the other, because the page shows the time of each
            encoded[mode] = self.index.retriever.encode_full(query, mode)

        def found(asked: Mode, target: Mode) -> Found:
            began, one = time.perf_counter(), encoded[asked]
            scores, rows = self.index.nearest(one.embeddings, target, max(2, top_k))
            hits = self.index.hits(scores[0], rows[0])
            spent = 1000 * (time.perf_counter() - began)
            return Found(hits, one.rewrites[0] if one.rewrites else None, 1000 * one.seconds, spent)

        retriever = self.index.retriever
        return _answer(retriever, query, self.index.facts.modes, found, self._result, top_k)

    def _result(self, hit: Hit) -> Result:
        record = self.index.record(hit.place)[0]
        pictured = bool(record.media)
        if self.index.facts.kind == "corpus":  # a sample tells what it holds when it is opened
            pictured = self.pictures.picture(hit.place) is not None
        return Result(hit.place, hit.score, hit.name, record.text, hit.rewrite or "", pictured)


class GallerySearcher:
    """Searches the gallery that a retriever holds in memory.

    Args:
        retriever: With a gallery, from ``Retriever.index``.
        name: What a reader calls it.
        task, instruction: See :class:`IndexSearcher`.
    """

    def __init__(
        self, retriever: Retriever, name: str, task: str | None = None, instruction: str | None = None
    ) -> None:
        self.retriever, self.pictures = retriever, Pictures(retriever.gallery)
        self.about = f"{len(retriever.gallery) - len(retriever.unusable):,} items of {name}"
        self.asked = _instruction(retriever, task, instruction)

    def picture(self, id: int) -> bytes | None:
        return self.pictures.picture(id)

    def search(self, query: Item, top_k: int) -> Answer:
        def found(asked: Mode, target: Mode) -> Found:
            return self.retriever.search(query, asked, max(2, top_k), target, instruction=self.asked)

        return _answer(self.retriever, query, MODES, found, self._result, top_k)

    def _result(self, hit: Hit) -> Result:
        item = self.pictures.item(hit.place)
        pictured = self.pictures.picture(hit.place) is not None
        name = item.content_id if isinstance(item, Item) else str(item)
        text = item.text if isinstance(item, Item) else ""
        return Result(hit.place, hit.score, name, text, hit.rewrite or "", pictured)


def _answer(
    retriever: Retriever,
    query: Item,
    modes: Sequence[Mode],
    search: Callable[[Mode, Mode], Found],
    result: Callable[[Hit], Result],
    top_k: int,
) -> Answer:
    """Return a column for each mode pair; one whose targets have no vectors says so."""
    columns, rewrite, adaptive = [], "", ""
    for pair in MODE_PAIRS:
        asked, target = (SHORT[name] for name in pair.split("-"))
        if target not in modes:
            columns.append(Column(pair, missing=f"The index holds no {target} vectors."))
            continue
        found = search(asked, target)
        if pair == "disc-disc":
            adaptive = worth(retriever, [hit.score for hit in found.hits])
        rewrite = found.rewrite or rewrite
        results = [result(hit) for hit in found.hits[:top_k]]
        if target == "discriminative":  # there, the rewrite of an item plays no part
            results = [replace(one, rewrite="") for one in results]
        columns.append(Column(pair, results, found.encode_ms, found.search_ms))
    if words := retriever.unknown_words(query.text):
        adaptive += f" In no training text: {', '.join(words)}. The model may not know what this means."
    return Answer(columns, rewrite, adaptive.strip())


def worth(retriever: Retriever, scores: Sequence[float]) -> str:
    """Return whether an adaptive search would write a rewrite, in a sentence.

    Args:
        retriever: Its run folder keeps the threshold.
        scores: Of the discriminative search, best first.
    """
    margin = float(margins(torch.tensor([scores]))[0])
    if math.isinf(margin):
        return "There is one item only, so no rewrite is needed to choose it."
    told = f"The two best discriminative scores differ by {margin:.3f}."
    try:
        limit = read_threshold(retriever).margin
    except RimeError:
        return f"{told} The command rime search --calibrate true measures below which one a rewrite pays."
    if margin < limit:
        return f"{told} That is less than {limit:.3f}, so a rewrite is worth writing."
    return f"{told} That is not less than {limit:.3f}, so no rewrite is needed."


def _instruction(retriever: Retriever, task: str | None, instruction: str | None) -> str:
    if instruction is not None:
        return instruction
    return retriever.instruction("query", task) if retriever.tasks or task else ""
