"""Reads corpora from disk: ``corpus.json``, the index of each tar, and single samples by their byte offset.

The index holds the offset of every member, so reading a sample needs no scan of its tar. Called by the data
module and by commands that look at samples; shard_writer.py writes what is read here.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any

from PIL.Image import Image

from rime_pl.datamodules.annotation import CompletionKind, with_completion, without_rewrites
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.errors import DataError, RimeError
from rime_pl.media import checked_clip, open_picture, thinned
from rime_pl.prompts import refuse_many_media
from rime_pl.types import Clip, Item, Medium, Page, Pair, Side

FORMAT_VERSION = 2
CORPUS_FILE = "corpus.json"
#: The split of gallery items that answer no query of the test split.
DISTRACTORS = "distractors"
_ITEM_FIELDS = {
    **{"text": (str,), "media": (list,), "content_id": (str,)},
    **dict.fromkeys(("instruction", "rewrite", "cot"), (str, NoneType)),
}
_JSON_NAMES = {str: "a string", list: "a list", NoneType: "null"}
#: Fields of a sample that hold targets beside its own.
FURTHER = ("hard_negatives", "positives")
_BLOCK = 512  # bytes of a tar header
_LONGEST_NAME = 200  # bytes; systems take 255, and a process adds a suffix
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, and no tokenizer can read it
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
        near = _near(Path(path))
        raise DataError(f"data.path must be a corpus folder, but {str(path)!r} does not exist. {near}{build}")
    if not file.is_file():
        raise DataError(
            f"data.path must be a finished corpus, but folder {str(path)!r} has no {CORPUS_FILE}. {build}"
        )
    corpus = _json(file.read_bytes(), str(file))
    if corpus.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{file}: field 'format' must be {FORMAT_VERSION}, but is {corpus.get('format')!r}. {_AGAIN}"
        )
    splits = corpus.get("splits")
    if not isinstance(splits, dict) or not all(_names_shards(*split) for split in splits.items()):
        raise DataError(f"{file}: field 'splits' must name the tars of each split, but does not. {_AGAIN}")
    if not isinstance(data_hash := corpus.get("data_hash"), str):
        raise DataError(f"{file}: field 'data_hash' must be text, but is {data_hash!r:.90}. {_AGAIN}")
    return corpus


def _near(path: Path) -> str:
    """Return a question about a corpus whose name is like that of a folder that does not exist."""
    folders = [
        file.parent for parent in (path.parent, Path("data")) for file in parent.glob(f"*/{CORPUS_FILE}")
    ]
    known = {folder.name: folder for folder in folders}
    return "".join(
        f"Did you mean {str(known[name])!r}? " for name in get_close_matches(path.name, known, n=1)
    )


def _names_shards(split: str, about: Any) -> bool:
    """Return whether a split of ``corpus.json`` lists plain file names, and so none outside its folder."""
    shards, samples = (about.get("shards"), about.get("samples")) if isinstance(about, dict) else (None, None)
    return (
        isinstance(shards, list)
        and isinstance(samples, int)
        and _is_plain(split)
        and all(_is_plain(name) and name.endswith(".tar") for name in shards)
    )


def _is_plain(name: Any) -> bool:
    """Return whether a name leads to nothing outside its folder."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return False
    return Path(name).name == name not in ("", "..")


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
    if len(entries) != (samples := corpus["splits"][split]["samples"]):
        raise DataError(
            f"{path}/{CORPUS_FILE}: split {split!r} must have {samples} samples, as it says, but its tars "
            f"hold {len(entries)}. Is a tar missing or named twice? {_AGAIN}"
        )
    if tasks is None:
        return entries
    known = {entry.dataset for entry in entries}
    if unknown := sorted(set(tasks) - known):
        raise RimeError(
            f"data.tasks must name tasks of {folder}, but {unknown} are not there. It has {sorted(known)}."
        )
    return [entry for entry in entries if entry.dataset in tasks]


def is_as_built(shard: Path) -> bool:
    """Return whether a tar has the bytes that its index was made of; True for an index without their hash."""
    index = _json(shard.with_suffix(".json").read_bytes(), str(shard.with_suffix(".json")))
    with shard.open("rb") as file:
        return index.get("sha256") in (None, hashlib.file_digest(file, "sha256").hexdigest())


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
    if not isinstance(index["samples"], list):
        raise DataError(f"{file}: field 'samples' must be a list, but is {index['samples']!r:.90}. {_AGAIN}")
    for sample in index["samples"]:
        try:
            entry = _entry(shard, sample)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
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
    names = [sample[field] for field in ("key", "dataset", "gallery", "target_content")]
    if not all(isinstance(name, str) for name in [*names, sample["query_content"] or ""]):
        raise TypeError("names must be strings")
    "".join(names).encode()  # half a character is no name either
    members = {name: (int(start), int(length)) for name, (start, length) in sample["members"].items()}
    if any(start < _BLOCK or length < 0 for start, length in members.values()):
        raise ValueError("an offset or a size is too small")
    return Entry(
        shard=shard,
        key=sample["key"],
        dataset=sample["dataset"],
        gallery=sample["gallery"],
        query_content=sample["query_content"],
        target_content=sample["target_content"],
        has_rewrite=(bool(query), bool(target)),
        members=members,
    )


class ShardReader:
    """Reads samples of a split in any order. Several processes can use it at once.

    Args:
        entries: Index of the split, from ``read_split``.
        require_rewrites: Whether a query or target without a rewrite is an error.
        completion: Text in the place of the rewrite. A target without a chain of thought keeps its rewrite.
        hidden: Whether each sample is read as if it had no rewrites; None hides none.
        tars: The open tars (default: its own).
        max_media: Largest number of media of an item; one with more is an error, and none is opened. None
            opens all.
        max_frames: Largest number of frames of a clip; of more, so many are decoded, evenly spaced. None
            decodes all.
        further: Number of hard negatives and of further positives that are read of each sample, drawn anew
            for each ``draw``. None reads all.
    """

    def __init__(
        self,
        entries: list[Entry],
        require_rewrites: bool = False,
        completion: CompletionKind = "rewrite",
        hidden: Sequence[bool] | None = None,
        tars: TarFiles | None = None,
        max_media: int | None = None,
        max_frames: int | None = None,
        further: tuple[int, int] | None = None,
    ) -> None:
        self.entries, self.require_rewrites, self.completion = entries, require_rewrites, completion
        self.hidden, self.max_media, self.max_frames = hidden, max_media, max_frames
        self.further = further
        self.tars = tars or TarFiles()

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int, side: Side | None = None, draw: object = None) -> Pair:
        """Return one sample with its media decoded to RGB.

        Args:
            index: Number of the sample in the split.
            side: The side whose media are needed; None for both, hard negatives and further positives.
            draw: What the choice of hard negatives and positives depends on, such as the number of a batch.

        Raises:
            DataError: If a member is missing, broken or malformed; it names shard, key and field.
            RimeError: If the machine fails to read the tar.
        """
        entry = self.entries[index]
        sample = _json(self._member(entry, "json"), f"{entry.name}: field 'json'")
        for field in ("dataset", "gallery", "target"):
            if field not in sample:
                raise DataError(f"{entry.name}: field {field!r} is missing in the JSON. {_AGAIN}")
        negatives, positives = (
            () if side else self._further(entry, field, sample.get(field), most, draw)
            for field, most in zip(FURTHER, self.further or (None, None), strict=True)
        )
        query = sample.get("query")
        pair = Pair(
            key=entry.name,
            dataset=sample["dataset"],
            gallery=sample["gallery"],
            query=None if query is None else self._item(entry, "query", query, side != "target"),
            target=self._item(entry, "target", sample["target"], side != "query"),
            hard_negatives=negatives,
            positives=positives,
            distractor=entry.shard.parent.name == DISTRACTORS,
        )
        _refuse_unlike(entry, pair)
        if self.hidden and self.hidden[index]:
            return without_rewrites(pair)
        for name, item in (("query", pair.query), ("target", pair.target)):
            if self.require_rewrites and item is not None and item.rewrite is None:
                raise DataError(
                    f"{entry.name}: field '{name}.rewrite' is missing or empty, but data.require_rewrites is "
                    "true. Add a rewrite to the sample, or set data.require_rewrites to false."
                )
        return with_completion(pair, self.completion)

    def _further(
        self, entry: Entry, field: str, items: Any, most: int | None, draw: object
    ) -> tuple[Item, ...]:
        """Return some of a sample's hard negatives or positives, in their order."""
        items = items or []
        if not isinstance(items, list):
            raise DataError(f"{entry.name}: field {field!r} must be a list, but is {items!r:.90}.")
        numbers = list(range(len(items)))
        if most is not None and most < len(items):
            numbers = sorted(random.Random(f"{draw} {entry.name} {field}").sample(numbers, most))
        return tuple(self._item(entry, f"{field}[{number}]", items[number]) for number in numbers)

    def _item(self, entry: Entry, field: str, item: Any, with_media: bool = True) -> Item:
        if not isinstance(item, dict):
            raise DataError(f"{entry.name}: field {field!r} must be an object, but is {item!r:.90}.")
        for name, kinds in _ITEM_FIELDS.items():
            if not isinstance(item.get(name), kinds):
                allowed = " or ".join(_JSON_NAMES[kind] for kind in kinds)
                raise DataError(
                    f"{entry.name}: field '{field}.{name}' must be {allowed}, but is {item.get(name)!r:.90}."
                )
            if isinstance(item.get(name), str) and (broken := _LONE_SURROGATE.search(item[name])):
                raise DataError(
                    f"{entry.name}: field '{field}.{name}' must be text, but holds {broken.group()!r}, half "
                    "of a character. Correct the text in the program that wrote it."
                )
        if not item["text"].strip() and not item["media"]:
            raise DataError(f"{entry.name}: field {field!r} must have text or media, but has neither.")
        if with_media and self.max_media is not None:
            refuse_many_media(len(item["media"]), self.max_media, f"{entry.name}: field {field!r}")
        return Item(
            text=item["text"],
            media=tuple(self._medium(entry, f"{field}.media", one) for one in item["media"] if with_media),
            content_id=item["content_id"],
            instruction=item.get("instruction") or "",
            rewrite=item.get("rewrite") if (item.get("rewrite") or "").strip() else None,
            cot=item.get("cot"),
        )

    def _medium(self, entry: Entry, field: str, medium: Any) -> Medium:
        """Return a picture, which is the name of a member, or a page or a clip, which are objects."""
        kind = medium.get("kind") if isinstance(medium, dict) else "picture"
        if kind == "page":
            return Page(self._image(entry, field, medium.get("file")))
        if kind == "clip":
            return self._clip(entry, field, medium.get("frames"), medium.get("times"))
        if kind != "picture":
            raise DataError(
                f"{entry.name}: field '{field}' must hold names of pictures, and objects of the kind 'page' "
                f"or 'clip', but has {medium!r:.90}."
            )
        return self._image(entry, field, medium)

    def _clip(self, entry: Entry, field: str, names: Any, times: Any) -> Clip:
        """Return a clip; of more frames than are read, the others are not decoded."""
        numbers = isinstance(times, list) and all(type(one) in (int, float) for one in times)
        if not isinstance(names, list) or not names or not numbers or len(names) != len(times):
            raise DataError(
                f"{entry.name}: field '{field}': a clip must have 'frames' and the 'times' of each in "
                f"seconds, but has {names!r:.60} and {times!r:.60}."
            )
        kept = thinned(Clip(tuple(names), tuple(map(float, times))), self.max_frames or len(names))
        frames = tuple(self._image(entry, field, name) for name in kept.frames)
        return checked_clip(Clip(frames, kept.times), f"{entry.name}: field '{field}'")

    def _image(self, entry: Entry, field: str, name: Any) -> Image:
        data = self._member(entry, name, f"field '{field}': ")
        return open_picture(data, f"{entry.name}: field '{field}': {name!r}")

    def _member(self, entry: Entry, name: str, field: str = "") -> bytes:
        if not isinstance(name, str) or name not in entry.members:
            raise DataError(f"{entry.name}: {field}member {name!r} is not in the tar {entry.shard}. {_AGAIN}")
        offset, size = entry.members[name]
        block = self.tars.read(entry.shard, offset - _BLOCK, size + _BLOCK)
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


def _refuse_unlike(entry: Entry, pair: Pair) -> None:
    """Raise a DataError if a sample is not what its index says, because epochs are planned from the index."""
    query, target = pair.query, pair.target
    for field, indexed, found in (
        ("dataset", entry.dataset, pair.dataset),
        ("gallery", entry.gallery, pair.gallery),
        ("query.content_id", entry.query_content, query and query.content_id),
        ("target.content_id", entry.target_content, target.content_id),
        ("query.rewrite", entry.has_rewrite[0], query is not None and query.rewrite is not None),
        ("target.rewrite", entry.has_rewrite[1], target.rewrite is not None),
    ):
        if indexed != found:
            name = "has_rewrite" if field.endswith("rewrite") else field
            raise DataError(
                f"{entry.name}: the index of the tar must describe the sample, but says {name} {indexed!r} "
                f"where field {field!r} gives {found!r:.90}. {_AGAIN}"
            )


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: malformed JSON ({error}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: must hold a JSON object, but holds {content!r:.90}. {_AGAIN}")
    return content
