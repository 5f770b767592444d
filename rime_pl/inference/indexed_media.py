"""Opens the items of an index by the references that it keeps: files below a root, or samples of a corpus.

Used while an index is built, and to show what a search has found. No file outside the root is opened.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rime_pl.clips import read_pages
from rime_pl.datamodules.builders.sources.drafts import Refused
from rime_pl.datamodules.builders.sources.paths import file_below
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.index_folder import Record
from rime_pl.inference.sources import Source
from rime_pl.media import open_picture
from rime_pl.types import Item, Page, Pair

#: "manual.pdf#3": a page, counted from 1. "scan.png#1": a picture that is a page.
PAGE = re.compile(r"(.+)#(\d{1,9})", re.DOTALL)
#: "test#57": the target of sample 57 of a split.
SAMPLE = re.compile(r"([^#]+)#(\d{1,18})", re.DOTALL)

#: Characters of a text that stands for a name.
NAME = 60
_HASH = re.compile("[0-9a-f]{16,64}")


class Media(Protocol):
    """Where the media of an index are."""

    def source(self, record: Record) -> Source:
        """Return an item as the retriever takes it; media that are files are not opened.

        Raises:
            DataError: If it is not there any more, or cannot be used.
        """

    def is_file(self, record: Record) -> bool:
        """Return whether ``source`` opens nothing."""

    def name(self, record: Record) -> str:
        """Return what a person calls an item."""


class Files:
    """Pictures, videos and pages below a root.

    Args:
        root: The folder; None if the index has only vectors and texts.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root

    def source(self, record: Record) -> Source:
        media = tuple(self._medium(name) for name in record.media)
        if not media and not record.text:
            raise DataError(f"{record.id}: the index keeps only its vectors.")
        if len(media) == 1 and isinstance(media[0], Path) and not record.text and not record.instruction:
            return media[0]
        return Item(record.text, media, record.id, record.instruction)

    def is_file(self, record: Record) -> bool:
        return not any(PAGE.fullmatch(name) for name in record.media)

    def name(self, record: Record) -> str:
        return record.id

    def _medium(self, name: str) -> Any:
        if self.root is None:
            raise DataError(f"{name}: the index does not say where its media are. Give the folder (--media).")
        page = PAGE.fullmatch(name)
        try:
            path = file_below(self.root, page[1] if page else name)
        except Refused as refused:
            raise DataError(refused.says) from refused
        if page is None:
            return path
        number, is_pdf = int(page[2]), path.suffix.lower() == ".pdf"
        if number < 1 or (number > 1 and not is_pdf):
            raise DataError(f"{name}: pages count from 1, and a picture has only that one.")
        return next(read_pages(path, [number - 1])) if is_pdf else Page(open_picture(path))


def short(text: str) -> str:
    """Return a text on one line, cut to the length of a name.

    Example:
        >>> short(" a red\\nmug "), len(short("mug " * 50)) == NAME
        ('a red mug', True)
    """
    words = " ".join(text.split())
    return words if len(words) <= NAME else f"{words[: NAME - 1]}…"


def called(pair: Pair) -> str:
    """Return what a person calls the target of a sample.

    It is the content id that its corpus gives, or its text, or the row of the table that it comes from. A
    content id may also be a hash, which tells a person nothing.

    Example:
        >>> hashed = Item("", (), "0123456789abcdef")
        >>> called(Pair("train-0.tar/row-00000004", "pairs", "pictures", None, hashed))
        'line 4'
        >>> called(Pair("train-0.tar/row-00000004", "pairs", "texts", None, Item("a red mug", (), "mug")))
        'mug'
    """
    target = pair.target
    if target.content_id and not _HASH.fullmatch(target.content_id):
        return target.content_id
    if words := short(target.text):
        return words
    row = re.fullmatch(r"(?:.*/)?row-(\d+)", pair.key)
    return pair.source or (f"line {int(row[1])}" if row else pair.key)


class CorpusTargets:
    """Targets of samples in shards.

    Args:
        corpus: Its folder.
        max_media: Largest number of media of an item; None for any.
    """

    def __init__(self, corpus: Path, max_media: int | None = None) -> None:
        self.corpus, self.max_media = corpus, max_media
        self._readers: dict[str, ShardReader] = {}
        self._lock = threading.Lock()

    def source(self, record: Record) -> Source:
        return self._pair(record).target

    def name(self, record: Record) -> str:
        """Return the name of a target, or its place in the corpus if its sample is not there any more."""
        try:
            return called(self._pair(record))
        except (RimeError, OSError):
            return record.id

    def _pair(self, record: Record) -> Pair:
        found = SAMPLE.fullmatch(record.media[0]) if record.media else None
        if found is None:
            raise DataError(f"{record.id}: the index must name its sample, such as test#57, but does not.")
        reader, row = self._reader(found[1]), int(found[2])
        if row >= len(reader) or reader.entries[row].name != record.id:
            raise DataError(
                f"{record.id} must be sample {row} of the split {found[1]!r} of {self.corpus}, but is not. "
                "The corpus was built again: give `rime index` again."
            )
        with self._lock:  # the search page reads from two threads
            return reader.read(row, "target")

    def is_file(self, record: Record) -> bool:
        return False

    def _reader(self, split: str) -> ShardReader:
        if split not in self._readers:
            entries: Samples = read_split(self.corpus, split)
            self._readers[split] = ShardReader(entries, max_media=self.max_media)
        return self._readers[split]


class Opened(Sequence[Source]):
    """Items that are opened when they are asked for.

    Args:
        media: Where they are.
        records: Which ones.
    """

    def __init__(self, media: Media, records: Sequence[Record]) -> None:
        self.media, self.records = media, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Opened(self.media, self.records[index])
        return self.media.source(self.records[index])
