"""Builds a corpus from MMEB-train, the 20 training sets of VLM2Vec (``TIGER-Lab/MMEB-train``).

Called by ``rime shards mmeb-train``. Its rows are described in docs/reference/training-sets.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import Expected, Settings, Source
from rime_pl.datamodules.builders.public.instructions import split_instruction
from rime_pl.datamodules.builders.public.placeholders import without_placeholders
from rime_pl.datamodules.builders.sources.drafts import (
    Draft,
    PictureFile,
    text_identity,
    text_of,
)
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile, files_in
from rime_pl.datamodules.builders.sources.paths import picture_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.errors import DataError
from rime_pl.types import Item

#: Rows of one split, by the card; it rounds to hundreds, and some to thousands.
ROWS = {
    **{"A-OKVQA": 17_100, "CIRR": 26_100, "ChartQA": 28_300, "DocVQA": 39_500, "HatefulMemes": 8_500},
    **{"ImageNet_1K": 100_000, "InfographicsVQA": 23_900, "MSCOCO": 100_000, "MSCOCO_i2t": 113_000},
    **{"MSCOCO_t2i": 100_000, "N24News": 49_000, "NIGHTS": 15_900, "OK-VQA": 9_000, "SUN397": 19_900},
    **{"VOC2007": 7_800, "VisDial": 124_000, "Visual7W": 70_000, "VisualNews_i2t": 100_000},
    **{"VisualNews_t2i": 100_000, "WebQA": 17_200},
}
_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def build(
    output: Path,
    common: Settings = Settings(),
    *,
    source: Path,
    media: Path | None = None,
    subsets: list[str] | None = None,
    instructions: Literal["original", "diverse"] = "original",
) -> None:
    """Build MMEB-train: 20 sets of picture questions, classes, retrieval and grounding.

    Download TIGER-Lab/MMEB-train (data Apache-2.0; pictures keep the terms of their origin) and unpack the
    files of images_zip/ into images/. Each subset becomes a task of its own.

    For example: rime shards mmeb-train --source MMEB-train --output data/mmeb-train

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: Folder of the data set, with one folder for each subset.
        media: Folder that the paths of the pictures begin in; that of --source if not given.
        subsets: Subsets to build; all that are there if not given.
        instructions: Whether instructions are the original ones, or diverse ones.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    build_corpus(output, MMEBTrain(source, media or source, subsets, instructions), common)


class MMEBTrain(Source):
    """The rows of MMEB-train."""

    name = "mmeb-train"
    licence = "MMEB-train: Apache-2.0. Each picture keeps the terms of its origin."

    def __init__(self, folder: Path, media: Path, subsets: list[str] | None, instructions: str) -> None:
        self.media = media
        there = sorted(path.name for path in folder.glob("*") if files_in(path, "*.parquet"))
        if unknown := sorted(set(subsets or ()) - set(there)):
            raise DataError(f"--subsets must name folders of {folder}, but {unknown} are not there: {there}.")
        if not there:
            raise DataError(f"--source must hold folders with Parquet files, but {folder} does not.")
        chosen = subsets or there
        self.files = [file for subset in chosen for file in self._files_of(folder, subset, instructions)]
        wanted = chosen if subsets else ROWS
        self.expected = {
            subset: Expected(ROWS[subset], 500 if ROWS[subset] % 1000 == 0 else 50)
            for subset in wanted
            if subset in ROWS
        }
        self.arguments = {"instructions": instructions, "subsets": chosen}

    @staticmethod
    def _files_of(folder: Path, subset: str, instructions: str) -> list[ParquetFile]:
        """Return the files of one wording. ``train-*`` holds the rows of ``original-*`` again."""
        stems = ("original", "train") if instructions == "original" else ("diverse_instruction",)
        for stem in stems:
            if paths := files_in(folder / subset, f"{stem}-*.parquet"):
                return [ParquetFile(path, f"{subset}/{path.name}", _COLUMNS) for path in paths]
        raise DataError(f"{folder / subset} must hold {stems[0]}-*.parquet, but does not.")

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the folder of the file."""
        return file.name.partition("/")[0]

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft]:
        """Yield the pair of a row."""
        subset = self.subset(file, values)
        query, query_files, query_notes = self._side(values, "qry", "qry_image_path")
        target, target_files, target_notes = self._side(values, "pos_text", "pos_image_path")
        yield Draft(
            subset, subset, query, target, query_files, target_files, notes=(*query_notes, *target_notes)
        )

    def _side(
        self, values: dict[str, object], text: str, path: str
    ) -> tuple[Item, tuple[PictureFile, ...], tuple[str, ...]]:
        name = text_of(values, path)
        files = (picture_below(self.media, name),) if name else ()
        words, notes = without_placeholders(text_of(values, text), len(files))
        instruction, words = split_instruction(words, bool(files))
        # a picture is the content; answers and classes are equal if their words are
        content = name if text == "pos_text" and files else text_identity(words, name)
        return Item(words, (), content, instruction), files, notes
