"""Builds corpora from COCO and Flickr30k in Karpathy's splits: captions and pictures, both ways.

Called by ``rime shards coco`` and ``rime shards flickr30k``; see docs/reference/training-sets.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.building import build_corpus
from rime_pl.datamodules.builders.planning import Expected, OwnSplits, Source
from rime_pl.datamodules.builders.sources.drafts import Draft, Refused, text_of
from rime_pl.datamodules.builders.sources.json_files import JsonFile
from rime_pl.datamodules.builders.sources.paths import picture_below
from rime_pl.datamodules.builders.sources.records import SourceFile
from rime_pl.types import Item

#: Split of the source -> ours.
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_FIND_PICTURE = "Find me an everyday image that matches the given caption:"
_FIND_CAPTION = "Find an image caption describing the given everyday image."


def build_coco(
    output: Path,
    common: OwnSplits = OwnSplits(),
    *,
    source: Path,
    media: Path,
) -> None:
    """Build COCO in Karpathy's splits: captions find pictures, and pictures captions.

    Download dataset_coco.json (Karpathy's splits) and the pictures of COCO 2014, train and val. Captions are
    CC BY 4.0, pictures under the terms of Flickr. The split restval counts as train. A picture is a row.

    For example: rime shards coco --source dataset_coco.json --media coco --output data/coco

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: The file dataset_coco.json.
        media: Folder with train2014/ and val2014/.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    expected = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
    licence = "COCO captions: CC BY 4.0. Pictures: terms of use of Flickr."
    build_corpus(output, Karpathy("coco", licence, source, media, expected), common)


def build_flickr30k(
    output: Path,
    common: OwnSplits = OwnSplits(),
    *,
    source: Path,
    media: Path,
) -> None:
    """Build Flickr30k in Karpathy's splits: captions find pictures, and pictures captions.

    Download dataset_flickr30k.json (Karpathy's splits) and the pictures of Flickr30k. Captions are CC BY 3.0,
    pictures under the terms of Flickr. A picture is a row.

    For example: rime shards flickr30k --source dataset_flickr30k.json --media images --output data/flickr30k

    Args:
        output: Corpus folder to write.
        common: Settings that the builders share.
        source: The file dataset_flickr30k.json.
        media: Folder of the pictures.

    Raises:
        RimeError: If too many rows are refused, or a split gets no rows.
    """
    expected = {"train": 29_000, "val": 1_014, "test": 1_000}
    licence = "Flickr30k captions: CC BY 3.0. Pictures: terms of use of Flickr."
    build_corpus(output, Karpathy("flickr30k", licence, source, media, expected), common)


class Karpathy(Source):
    """Pictures, each with its captions and its split."""

    def __init__(self, name: str, licence: str, path: Path, media: Path, expected: dict[str, int]) -> None:
        self.name, self.licence, self.media = name, licence, media
        self.files = [JsonFile(path, path.name, "images")]
        self.expected = {split: Expected(rows) for split, rows in expected.items()}
        self.arguments: dict[str, Any] = {}

    def subset(self, file: SourceFile, values: dict[str, Any]) -> str:
        """Return the split of the source."""
        return str(values.get("split", ""))

    def drafts(self, file: SourceFile, row: int, values: dict[str, Any]) -> Iterator[Draft | Refused]:
        """Yield two pairs of each caption. Captions of a picture have its content, so none is a negative."""
        split = _SPLITS.get(self.subset(file, values))
        if split is None:
            raise Refused("unknown split", f"the split must be one of {list(_SPLITS)}.")
        sentences, number = values.get("sentences"), values.get("imgid")
        if (
            not isinstance(sentences, list)
            or not all(isinstance(one, dict) for one in sentences)
            or not sentences
        ):
            raise Refused("no captions", f"'sentences' must be a list of objects, but is {sentences!r:.90}.")
        if not isinstance(number, int):
            raise Refused("no picture id", f"'imgid' must be a whole number, but is {number!r:.90}.")
        content = f"{self.name}-{number}"
        try:
            parts = [text_of(values, "filepath"), text_of(values, "filename")]
            picture = (picture_below(self.media, "/".join(part for part in parts if part)),)
        except Refused as refused:  # counted as often as it costs a pair
            yield from [refused] * (2 * len(sentences))
            return
        for sentence in sentences:
            try:
                caption = text_of(sentence, "raw").strip()
            except Refused as refused:
                yield from [refused] * 2
                continue
            asked = Item(caption, (), content, _FIND_PICTURE)
            yield Draft(
                "caption_to_picture", "pictures", asked, Item("", (), content), (), picture, split, content
            )
            shown, told = Item("", (), content, _FIND_CAPTION), Item(caption, (), content)
            yield Draft("picture_to_caption", "captions", shown, told, picture, (), split, content)
