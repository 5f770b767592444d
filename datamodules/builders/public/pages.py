"""Builds corpora of document pages: ColPali's training set and those of VisRAG.

Called by ``rime shards colpali`` and ``rime shards visrag``; see docs/reference/training-sets.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import ALL_ROWS, Expected, Settings, Source
from rime_pl.datamodules.builders.sources.drafts import (
    Draft,
    PictureBytes,
    Refused,
    identity,
    text_identity,
    text_of,
)
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile, files_in
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.errors import DataError
from rime_pl.types import Item

_FIND_PAGE = "Find a document image that matches the given query:"
_PAGE = "Understand the content of the provided document image."
_ASK_PAGE = "Represent the given image with the following question:"
_VISRAG_ROWS = {
    **{"ArxivQA": 25_856, "ChartQA": 4_224, "MP-DocVQA": 10_624, "InfoVQA": 17_664},
    **{"PlotQA": 56_192, "SlideVQA": 8_192},
}


def build_colpali(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    task: Literal["page", "qa"] = "page",
) -> None:
    """Build ColPali's training set: a question finds the page of a document, or the answer of the page.

    Download vidore/colpali_train_set (no licence on its card). ColPali trains --task page; VLM2Vec-V2 and
    UME-R1 train --task qa. Pages of the split test of the source are ours for test. If there is no such file
    (data/test-*.parquet), --test_share counts.

    For example: rime shards colpali --source colpali_train_set --output data/colpali

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: Folder of the data set, with data/train-*.parquet.
        task: Whether a question finds its page, or a page with a question its answer.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    corpus = ColPali(source, task)
    if corpus.has_test:
        common = replace(common, test_share=0.0)
    build_corpus(output, corpus, common)


def build_visrag(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    part: Literal["in-domain", "synthetic"] = "in-domain",
) -> None:
    """Build VisRAG's training set: a question finds the page that answers it.

    Download openbmb/VisRAG-Ret-Train-In-domain-data or openbmb/VisRAG-Ret-Train-Synthetic-data (no licence on
    the cards). Each source of the pages becomes a task of its own.

    For example: rime shards visrag --source VisRAG-Ret-Train-In-domain-data --output data/visrag

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: Folder of the data set, with data/train-*.parquet.
        part: Which of the two data sets this is.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    build_corpus(output, VisRAG(source, part), common)


class ColPali(Source):
    """Rows of ColPali's training set; a page is named by its file."""

    name = "colpali"
    licence = "vidore/colpali_train_set: no licence stated; the sources of the pages have their own."

    def __init__(self, folder: Path, task: str) -> None:
        self.task = task
        self.files = [
            ParquetFile(path, path.name, ["query", "image_filename"], ["image"], ["answer"])
            for path in _files(folder, "train", needed=True) + _files(folder, "test")
        ]
        self.has_test = any(self.subset(file, {}) == "test" for file in self.files)
        self.expected = {"train": Expected(118_195), "test": Expected(500)}
        self.arguments = {"task": task}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the split of the source."""
        return file.name.partition("-")[0]

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pair of a row."""
        query, name = text_of(values, "query").strip(), text_of(values, "image_filename").strip()
        if not name:
            raise Refused("no page name", "'image_filename' must name the page, but is empty.")
        split = "test" if self.subset(file, values) == "test" else ""
        page = (PictureBytes(name, _bytes(values), page=True),)
        if self.task == "page":
            asked, shown = Item(query, (), identity(query), _FIND_PAGE), Item("", (), name, _PAGE)
            yield Draft("colpali_page", "colpali_pages", asked, shown, (), page, split)
            return
        answer = text_of(values, "answer").strip()
        if not query:
            raise Refused("empty side", "the question is empty.")
        asked = Item(query, (), identity(name, query), _ASK_PAGE)
        told = Item(answer, (), text_identity(answer))
        yield Draft("colpali_qa", "colpali_answers", asked, told, page, (), split)


class VisRAG(Source):
    """Rows of VisRAG's training sets; a page is known by its bytes, because several questions share it."""

    name = "visrag"
    licence = "openbmb/VisRAG-Ret-Train: no licence stated; the sources of the pages have their own."

    def __init__(self, folder: Path, part: str) -> None:
        self.part = part
        self.files = [
            ParquetFile(path, path.name, ["query", "source"], ["image"], first_reads_media=True)
            for path in _files(folder, "train", needed=True)
        ]
        rows = _VISRAG_ROWS if part == "in-domain" else {ALL_ROWS: 239_358}
        self.expected = {name: Expected(number) for name, number in rows.items()}
        self.arguments = {"part": part}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the source of the page."""
        return str(values.get("source") or "")

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pair of a row."""
        query, origin = text_of(values, "query").strip(), text_of(values, "source").strip()
        data = _bytes(values)
        if not data:
            raise Refused("missing picture", "the row must hold the bytes of its page, but holds none.")
        content = hashlib.sha256(data).hexdigest()[:16]
        task = f"visrag_{origin}" if origin else "visrag"
        asked, shown = Item(query, (), identity(query), _FIND_PAGE), Item("", (), content, _PAGE)
        yield Draft(task, task, asked, shown, (), (PictureBytes(content, data, page=True),))


def _files(folder: Path, split: str, needed: bool = False) -> list[Path]:
    found = files_in(folder / "data", f"{split}-*.parquet") or files_in(folder, f"{split}-*.parquet")
    if needed and not found:
        raise DataError(f"--source must be a folder with data/{split}-*.parquet, but {folder} has none.")
    return found


def _bytes(values: dict[str, Any]) -> bytes | None:
    """Return the bytes of the picture of a row; ``path`` is a label, not a file."""
    image = values.get("image")
    data = image.get("bytes") if isinstance(image, dict) else None
    return data if isinstance(data, bytes) else None
