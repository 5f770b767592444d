"""The results of a search. Made by the retriever, shown by ``rime search`` or in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rime_pl.inference.index_folder import Record
from rime_pl.inference.indexed_media import Media
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
class IndexHit(Hit):
    """One item of an index that a search found."""

    record: Record
    opens: Media = field(repr=False)

    @property
    def id(self) -> str:
        """The id of the item in the index."""
        return self.record.id

    @property
    def media(self) -> tuple[str, ...]:
        """References to its media: paths below the root, "manual.pdf#3" for page 3, "test#57" in a corpus."""
        return self.record.media

    @property
    def text(self) -> str:
        return self.record.text

    @cached_property
    def name(self) -> str:
        """What a person calls the item; of a corpus not its id, which is a place in a tar."""
        return self.opens.name(self.record)


@dataclass
class Found:
    """The results of one search."""

    hits: Sequence[Hit]  # best first
    rewrite: str | None  # rewrite of the query; None: none was written
    encode_ms: float  # time to encode the query, in ms: with its rewrite in the generative mode
    search_ms: float  # time to compare it with the gallery, in ms; of many queries both are means
    margin: float | None = None  # of an adaptive search: best score minus second best, discriminative
