"""The results of a search. Made by the retriever, shown by ``rime search`` or in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rime_pl.inference.sources import Source, to_item
from rime_pl.types import Item


@dataclass
class Hit:
    """One gallery item that a search found."""

    place: int  # index in the gallery, from 0
    score: float  # cosine
    rewrite: str | None  # rewrite of the gallery item
    gallery: Sequence[Source] = field(repr=False)

    @property
    def item(self) -> Item:
        """The item; its pictures are opened again, because a gallery of photos does not fit into memory."""
        return to_item(self.gallery[self.place], name=f"item {self.place} of the gallery")

    @property
    def name(self) -> str:
        """The content id of the item, or the path of its picture."""
        source = self.gallery[self.place]
        return str(source) if isinstance(source, str | Path) else self.item.content_id


@dataclass
class Found:
    """The results of one search."""

    hits: Sequence[Hit]  # best first
    rewrite: str | None  # rewrite of the query; None: none was written
    encode_ms: float  # time to encode the query, in ms: with its rewrite in the generative mode
    search_ms: float  # time to compare it with the gallery, in ms; of many queries both are means
    margin: float | None = None  # of an adaptive search: best score minus second best, discriminative
