"""Reads corpora from disk: ``corpus.json``, the index of each tar, and single samples by their byte offset.

The index holds the offset of every member, so reading a sample needs no scan of its tar. Called by the data
module and by commands that look at samples; shard_writer.py writes what is read here.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image, ImageOps

from rime_pl.datamodules.annotation import CompletionKind, with_completion
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Item, Pair, Side

FORMAT_VERSION = 1
CORPUS_FILE = "corpus.json"
_ITEM_FIELDS = {
    **{"text": (str,), "images": (list,), "content_id": (str,)},
    **dict.fromkeys(("instruction", "rewrite", "cot"), (str, NoneType)),
}
_JSON_NAMES = {str: "a string", list: "a list", NoneType: "null"}
_BLOCK = 512  # bytes of a tar header
_AGAIN = "Build the corpus again."


@dataclass(frozen=True)
class Entry:
    """One sample as the index describes it; its tar is not read."""

    shard: Path
    key: str
    dataset: str
    gallery: str
    query_content: str | None  # None: the sample has no query
    target_content: str
    has_rewrite: tuple[bool, bool]  # query, target
    members: dict[str, tuple[int, int]]  # "json", "q0.png" ... -> (byte offset, size)

    @property
    def name(self) -> str:
        """The unique name of the sample in its corpus, ``<tar>/<key>``; every error names it."""
        return f"{self.shard.name}/{self.key}"


def read_corpus(path: str | Path) -> dict[str, Any]:
    """Return ``corpus.json`` of a corpus folder.

    Raises:
        DataError: If the folder or the file is missing, unreadable or of another format version.
    """
    file = Path(path) / CORPUS_FILE
    build = "Build one with `rime shards openmoji --output FOLDER` and set data.path to FOLDER."
    if not Path(path).is_dir():
        raise DataError(f"data.path must be a corpus folder, but {str(path)!r} does not exist. {build}")
    if not file.is_file():
        raise DataError(
            f"data.path must be a finished corpus, but folder {str(path)!r} has no {CORPUS_FILE}. {build}"
        )
    corpus = _json(file.read_bytes(), str(file))
    if corpus.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{file}: field 'format' must be {FORMAT_VERSION}, but is {corpus.get('format')!r}. {_AGAIN}"
        )
    return corpus


def read_split(path: str | Path, split: str, tasks: Collection[str] | None = None) -> list[Entry]:
    """Return the index of one split, in the order of its shards.

    Args:
        path: Corpus folder.
        split: Name of the split.
        tasks: Tasks to keep; None keeps all.

    Raises:
        DataError: If the split is missing or empty, or if a tar is missing, truncated or of another size than
            its index says.
        RimeError: If the split has no samples of one of the tasks.
    """
    corpus = read_corpus(path)
    if split not in corpus["splits"]:
        raise DataError(
            f"{path}/{CORPUS_FILE}: split {split!r} is missing; the corpus has {sorted(corpus['splits'])}."
        )
    folder = Path(path) / split
    shards = corpus["splits"][split]["shards"]
    entries = [entry for name in shards for entry in _read_index(folder / name)]
    if not entries:
        raise DataError(f"{folder}: split {split!r} holds no samples. {_AGAIN}")
    if tasks is None:
        return entries
    known = {entry.dataset for entry in entries}
    if unknown := sorted(set(tasks) - known):
        raise RimeError(
            f"data.tasks must name tasks of {folder}, but {unknown} are not there. It has {sorted(known)}."
        )
    return [entry for entry in entries if entry.dataset in tasks]


def _read_index(shard: Path) -> Iterator[Entry]:
    file = shard.with_suffix(".json")
    for needed in (shard, file):
        if not needed.is_file():
            raise DataError(f"{needed}: this file is missing, but {CORPUS_FILE} lists it. {_AGAIN}")
    index = _json(file.read_bytes(), str(file))
    size = shard.stat().st_size
    for field in ("size", "samples"):
        if field not in index:
            raise DataError(f"{file}: field {field!r} is missing. {_AGAIN}")
    for sample in index["samples"]:
        try:
            entry = _entry(shard, sample)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: sample {sample!r:.90} is malformed ({error!r}). {_AGAIN}") from error
        for name, (start, length) in entry.members.items():
            if start + length > size:
                raise DataError(
                    f"{entry.name}: member {name!r} ends at byte {start + length}, but {shard} has only "
                    f"{size} bytes. The tar is truncated: copy it or build it again."
                )
        yield entry
    if size != index["size"]:
        raise DataError(
            f"{shard}: the tar must have {index['size']} bytes, as its index says, but has {size}. "
            "Copy it or build it again."
        )


def _entry(shard: Path, sample: dict[str, Any]) -> Entry:
    query, target = sample["has_rewrite"]
    return Entry(
        shard=shard,
        key=sample["key"],
        dataset=sample["dataset"],
        gallery=sample["gallery"],
        query_content=sample["query_content"],
        target_content=sample["target_content"],
        has_rewrite=(bool(query), bool(target)),
        members={name: (int(start), int(length)) for name, (start, length) in sample["members"].items()},
    )


class ShardReader:
    """Reads samples of a split in any order. Several processes can use it at once.

    Args:
        entries: Index of the split, from ``read_split``.
        require_rewrites: Whether a query or target without a rewrite is an error.
        completion: Text in the place of the rewrite. A target without a chain of thought keeps its rewrite.
    """

    def __init__(
        self, entries: list[Entry], require_rewrites: bool = False, completion: CompletionKind = "rewrite"
    ) -> None:
        self.entries, self.require_rewrites, self.completion = entries, require_rewrites, completion
        self._files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a spawned worker opens the tars itself

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def read(self, index: int, side: Side | None = None) -> Pair:
        """Return one sample with its images decoded to RGB.

        Args:
            index: Number of the sample in the split.
            side: The side whose images are needed; None for both and the hard negatives.

        Raises:
            DataError: If a member is missing, broken or malformed; it names shard, key and field.
        """
        entry = self.entries[index]
        sample = _json(self._member(entry, "json"), f"{entry.name}: field 'json'")
        for field in ("dataset", "gallery", "target"):
            if field not in sample:
                raise DataError(f"{entry.name}: field {field!r} is missing in the JSON. {_AGAIN}")
        query, negatives = sample.get("query"), [] if side else sample.get("hard_negatives") or []
        pair = Pair(
            key=entry.name,
            dataset=sample["dataset"],
            gallery=sample["gallery"],
            query=None if query is None else self._item(entry, "query", query, side != "target"),
            target=self._item(entry, "target", sample["target"], side != "query"),
            hard_negatives=tuple(
                self._item(entry, f"hard_negatives[{n}]", item) for n, item in enumerate(negatives)
            ),
        )
        return with_completion(pair, self.completion)

    def _item(self, entry: Entry, field: str, item: Any, with_images: bool = True) -> Item:
        if not isinstance(item, dict):
            raise DataError(f"{entry.name}: field {field!r} must be an object, but is {item!r:.90}.")
        for name, kinds in _ITEM_FIELDS.items():
            if not isinstance(item.get(name), kinds):
                allowed = " or ".join(_JSON_NAMES[kind] for kind in kinds)
                raise DataError(
                    f"{entry.name}: field '{field}.{name}' must be {allowed}, but is {item.get(name)!r:.90}."
                )
        if not item["text"] and not item["images"]:
            raise DataError(f"{entry.name}: field {field!r} must have text or images, but has neither.")
        if self.require_rewrites and field in ("query", "target") and not (item.get("rewrite") or "").strip():
            raise DataError(
                f"{entry.name}: field '{field}.rewrite' is missing or empty, but data.require_rewrites is "
                "true. Add a rewrite to the sample, or set data.require_rewrites to false."
            )
        return Item(
            text=item["text"],
            images=tuple(
                self._image(entry, f"{field}.images", name) for name in item["images"] if with_images
            ),
            content_id=item["content_id"],
            instruction=item.get("instruction") or "",
            rewrite=item.get("rewrite"),
            cot=item.get("cot"),
        )

    def _image(self, entry: Entry, field: str, name: str) -> Image.Image:
        data = self._member(entry, name, f"field '{field}': ")
        try:
            with Image.open(io.BytesIO(data)) as image:
                turned = ImageOps.exif_transpose(image) if image.format == "JPEG" else image
                return turned.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{entry.name}: field '{field}': {name!r} cannot be read ({error}).") from error

    def _member(self, entry: Entry, name: str, field: str = "") -> bytes:
        if not isinstance(name, str) or name not in entry.members:
            raise DataError(f"{entry.name}: {field}member {name!r} is not in the tar {entry.shard}. {_AGAIN}")
        offset, size = entry.members[name]
        # pread does not move a shared file position, so a forked worker can use inherited descriptors.
        block = os.pread(self._descriptor(entry), size + _BLOCK, offset - _BLOCK)
        if len(block) != size + _BLOCK:
            raise DataError(
                f"{entry.name}: member {name!r} ends after the end of {entry.shard}. "
                "The tar is truncated: copy it or build it again."
            )
        header = block[:100].split(b"\0")[0].decode(errors="replace")
        if not f"{entry.key}.{name}".endswith(header) or not header:
            raise DataError(
                f"{entry.name}: the index must point at member {name!r}, but points at {header!r}. {_AGAIN}"
            )
        return block[_BLOCK:]

    def _descriptor(self, entry: Entry) -> int:
        if entry.shard not in self._files:
            try:
                self._files[entry.shard] = os.open(entry.shard, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{entry.name}: the tar {entry.shard} cannot be opened ({error}).") from error
        return self._files[entry.shard]


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{name}: malformed JSON ({error}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: must hold a JSON object, but holds {content!r:.90}. {_AGAIN}")
    return content
