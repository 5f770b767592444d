"""Reads the samples of a corpus from disk: the index of a split, and single samples by their byte offset.

Called by the data module and by commands that look at samples; shard_writer.py writes what is read here.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from rime_pl.datamodules.annotation import CompletionKind, with_completion, without_rewrites
from rime_pl.datamodules.corpus_file import AGAIN as _AGAIN
from rime_pl.datamodules.corpus_file import CORPUS_FILE, read_corpus
from rime_pl.datamodules.corpus_file import read_object as _json
from rime_pl.datamodules.remote import CacheSettings, is_remote, open_remote
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.split_index import FACTS, INDEX_AGAIN, Entry, SplitIndex
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.datamodules.tar_samples import members_of, with_todays_names
from rime_pl.errors import DataError, RimeError
from rime_pl.media import checked_clip, open_picture, thinned
from rime_pl.prompts import refuse_many_media
from rime_pl.types import Clip, Item, Medium, Page, Pair, Side, content_hash

#: The split of gallery items that answer no query of the test split.
DISTRACTORS = "distractors"
_ITEM_FIELDS = {
    **{"text": (str,), "media": (list,), "content_id": (str,)},
    **dict.fromkeys(("instruction", "rewrite", "cot"), (str, NoneType)),
}
_JSON_NAMES = {str: "a string", list: "a list", NoneType: "null"}
#: Fields of a sample that hold targets beside its own.
FURTHER = ("hard_negatives", "positives")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, and no tokenizer can read it


def read_split(
    path: str | Path,
    split: str,
    tasks: Collection[str] | None = None,
    prefix: str = "",
    cache: CacheSettings = CacheSettings(),
) -> Samples:
    """Return the index of one split, in the order of its shards.

    Args:
        path: Corpus folder, or the place of a remote corpus; its tars are copied when they are read.
        split: Name of the split.
        tasks: Tasks to keep; None keeps all.
        prefix: Text before the names of the samples, to tell corpora apart.
        cache: Where the files of a remote corpus are kept.

    Raises:
        DataError: If the split is missing or empty, or if a tar is missing, truncated or of another size than
            its index says.
        RimeError: If the split has no samples of one of the tasks.
    """
    corpus = read_corpus(path, cache)
    if split not in corpus["splits"]:
        raise DataError(
            f"{path}/{CORPUS_FILE}: split {split!r} is missing; the corpus has {sorted(corpus['splits'])}."
        )
    remote = open_remote(str(path), cache)[0] if is_remote(path) else None
    index = SplitIndex(remote.folder / split if remote else Path(path) / split, prefix, remote)
    _refuse_other_index(index, corpus["splits"][split], f"{path}/{CORPUS_FILE}: split {split!r}")
    index.check()
    return of_tasks(Samples([index]), tasks, f"{path}/{split}")


def _refuse_other_index(index: SplitIndex, about: dict[str, Any], where: str) -> None:
    """Raise a DataError unless ``corpus.json`` and the index name the same tars and samples."""
    if not about["shards"] or not len(index):
        raise DataError(f"{index.folder}: split {index.folder.name!r} holds no samples. {_AGAIN}")
    if about["shards"] != [shard.name for shard in index.shards] or about["samples"] != len(index):
        raise DataError(
            f"{where} must have {about['samples']} samples in {len(about['shards'])} tars, as it says, but "
            f"{FACTS} lists {len(index)} in {len(index.shards)}, or other tars. {INDEX_AGAIN}"
        )


def of_tasks(samples: Samples, tasks: Collection[str] | None, where: str | Path) -> Samples:
    """Return the samples of some tasks; None keeps all.

    Raises:
        RimeError: If there is no sample of one of the tasks.
    """
    if tasks is None:
        return samples
    codes = samples.task_codes()
    known = {samples.tasks[code] for code in np.unique(codes).tolist()}
    if unknown := sorted(set(tasks) - known):
        raise RimeError(
            f"data.tasks must name tasks of {where}, but {unknown} are not there. It has {sorted(known)}."
        )
    wanted = np.array([task in tasks for task in samples.tasks])
    return samples if wanted.all() else samples.select(np.flatnonzero(wanted[codes]))


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
        entries: Sequence[Entry],
        require_rewrites: bool = False,
        completion: CompletionKind = "rewrite",
        hidden: Sequence[bool] | NDArray[np.bool_] | None = None,
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
        self._open(entry)
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
            distractor=entry.index.folder.name == DISTRACTORS,
            source=sample["source"] if isinstance(sample.get("source"), str) else "",
        )
        _refuse_unlike(entry, pair)
        if entry.crc32 not in (None, zlib.crc32(self._block)):  # a JPEG with a flipped bit can be decoded
            raise DataError(
                f"{entry.name}: the bytes of the sample must be those that its index was made of, but have "
                f"changed. Is the disk or the copy damaged? Copy {entry.shard.name} again. {INDEX_AGAIN}"
            )
        if self.hidden is not None and self.hidden[index]:
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
        item = with_todays_names(item)
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
        seconds = _seconds(times)
        if not isinstance(names, list) or not names or len(names) != len(seconds):
            raise DataError(
                f"{entry.name}: field '{field}': a clip must have 'frames' and the 'times' of each in "
                f"seconds, but has {names!r:.60} and {times!r:.60}."
            )
        kept = thinned(Clip(tuple(names), seconds), self.max_frames or len(names))
        frames = tuple(self._image(entry, field, name) for name in kept.frames)
        return checked_clip(Clip(frames, kept.times), f"{entry.name}: field '{field}'")

    def _image(self, entry: Entry, field: str, name: Any) -> Image:
        data = self._member(entry, name, f"field '{field}': ")
        return open_picture(data, f"{entry.name}: field '{field}': {name!r}")

    def _open(self, entry: Entry) -> None:
        """Read all bytes of a sample at once: its members lie side by side."""
        start, size = entry.extent
        self._block = self.tars.read(entry.shard, start, size, entry.fetch)
        if len(self._block) != size:
            raise DataError(
                f"{entry.name}: the sample ends after the end of {entry.shard}. "
                "The tar is truncated: copy it or build it again."
            )
        try:
            self._members = members_of(self._block, entry.key)
        except ValueError as error:
            raise DataError(
                f"{entry.name}: the index must point at the sample, but {error}. {INDEX_AGAIN}"
            ) from error

    def _member(self, entry: Entry, name: str, field: str = "") -> bytes:
        if not isinstance(name, str) or name not in self._members:
            raise DataError(f"{entry.name}: {field}member {name!r} is not in the tar {entry.shard}. {_AGAIN}")
        offset, size = self._members[name]
        return self._block[offset : offset + size]


def _seconds(times: Any) -> tuple[float, ...]:
    """Return the times of a clip; () if they are no list of numbers."""
    if not isinstance(times, list) or not all(type(one) in (int, float) for one in times):
        return ()
    try:
        return tuple(map(float, times))
    except OverflowError:  # JSON may hold a whole number of 310 digits
        return ()


def _refuse_unlike(entry: Entry, pair: Pair) -> None:
    """Raise a DataError if a sample is not what its index says, because epochs are planned from the index."""
    query, target = pair.query, pair.target
    columns, row = entry.index.columns, entry.row
    rewrites = entry.has_rewrite
    for field, alike, found in (
        ("dataset", entry.dataset == pair.dataset, pair.dataset),
        ("gallery", entry.gallery == pair.gallery, pair.gallery),
        ("query", entry.has_query == (query is not None), "a query" if query else "none"),
        (
            "query.content_id",
            query is None or int(columns["query_content"][row]) == content_hash(query.content_id),
            query and query.content_id,
        ),
        (
            "target.content_id",
            int(columns["target_content"][row]) == content_hash(target.content_id),
            target.content_id,
        ),
        (
            "query.rewrite",
            rewrites[0] == (query is not None and query.rewrite is not None),
            query and query.rewrite,
        ),
        ("target.rewrite", rewrites[1] == (target.rewrite is not None), target.rewrite),
    ):
        if not alike:
            raise DataError(
                f"{entry.name}: the index of the split must describe the sample, but field {field!r} gives "
                f"{found!r:.90}, and the index says otherwise. {INDEX_AGAIN}"
            )
