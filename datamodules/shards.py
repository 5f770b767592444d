"""Corpora on disk: WebDataset tars, an index beside each tar, and ``corpus.json`` over all of them.

Builders write through ``write_corpus``; the data module reads single samples through ``ShardReader``,
which needs no scan of a tar because the index holds the offset of every member.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

import webdataset
from PIL import Image, ImageFile, ImageOps
from rich.progress import MofNCompleteColumn, Progress

from rime_pl.datamodules.annotation import Written, with_written
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair

FORMAT_VERSION = 1
CORPUS_FILE = "corpus.json"
_ITEM_FIELDS = {
    **{"text": (str,), "images": (list,), "content_id": (str,)},
    **dict.fromkeys(("instruction", "rewrite", "cot"), (str, NoneType)),
}
_BLOCK = 512  # bytes of a tar header
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Entry:
    """What the index knows of a sample, without reading its tar."""

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
        """Unique in the corpus; every error names it."""
        return f"{self.shard.name}/{self.key}"


# -- writing ----------------------------------------------------------------------------------------------


def write_corpus(
    output: Path,
    name: str,
    licence: str,
    splits: Mapping[str, Iterable[Pair]],
    totals: Mapping[str, int],
    seed: int,
    arguments: Mapping[str, Any] | None = None,
    samples_per_shard: int = 512,
) -> dict[str, Any]:
    """Write a corpus folder: equal samples, equal bytes. ``corpus.json`` comes last and marks a whole one.

    Args:
        output: Folder to make. A corpus that is already there is replaced.
        name: Name of the corpus.
        licence: Licence and attribution of what is inside.
        splits: Samples of each split. Keys are unique in a split and hold no dot, where WebDataset cuts.
        totals: Number of samples of each split, for the progress bar.
        seed: Seed of the builder; recorded.
        arguments: Other settings of the builder; recorded.
        samples_per_shard: Samples per tar.
    """
    output = Path(output)
    _make_folder(output)
    digest, encoder = hashlib.sha256(), _Encoder()
    about: dict[str, Any] = {}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        bar = progress.add_task(f"shards of {name}", total=sum(totals.values()))
        for split, pairs in splits.items():
            tasks: Counter[str] = Counter()
            shards: list[str] = []
            stream = _checked(split, pairs, tasks, lambda: progress.advance(bar))
            while chunk := list(itertools.islice(stream, samples_per_shard)):
                path = output / split / f"{split}-{len(shards):06d}.tar"
                _write_shard(path, chunk, encoder)
                digest.update(f"{split}/{path.name}\n".encode() + path.read_bytes())
                shards.append(path.name)
            about[split] = {"shards": shards, "samples": tasks.total(), "tasks": dict(sorted(tasks.items()))}
    corpus = {
        **{"name": name, "format": FORMAT_VERSION, "licence": licence, "seed": seed},
        **{"arguments": dict(arguments or {}), "data_hash": digest.hexdigest(), "splits": about},
    }
    (output / CORPUS_FILE).write_text(json.dumps(corpus, indent=1, ensure_ascii=False) + "\n")
    return corpus


def _make_folder(output: Path) -> None:
    """An empty corpus folder. Only what an earlier build wrote is removed."""
    output.mkdir(parents=True, exist_ok=True)
    (output / CORPUS_FILE).unlink(missing_ok=True)
    for shard in output.glob("*/*.tar"):
        if shard.stem.startswith(f"{shard.parent.name}-"):
            shard.unlink()
            shard.with_suffix(".json").unlink(missing_ok=True)


def _checked(
    split: str, pairs: Iterable[Pair], tasks: Counter[str], advance: Callable[[], None]
) -> Iterator[Pair]:
    """The pairs, counted, with keys that a tar and WebDataset can hold."""
    keys: set[str] = set()
    for pair in pairs:
        if not pair.key or "." in pair.key or "/" in pair.key or pair.key in keys:
            raise DataError(f"split {split!r}: sample key {pair.key!r} must be unique, without '.' and '/'.")
        keys.add(pair.key)
        tasks[pair.dataset] += 1
        yield pair
        advance()


def _write_shard(path: Path, pairs: list[Pair], encoder: _Encoder) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
        for pair in pairs:
            tar.write({"__key__": pair.key, **_members(pair, encoder)})
    path.with_suffix(".json").write_text(json.dumps(_index(path, pairs), ensure_ascii=False) + "\n")


class _Encoder:
    """Images to bytes. Builders show one picture in many samples, so the last ones are kept."""

    def __init__(self) -> None:
        # holding the image pins its id
        self._known: OrderedDict[int, tuple[Image.Image, bytes]] = OrderedDict()

    def __call__(self, image: Image.Image) -> bytes:
        # A picture opened from a file and not changed keeps its bytes: a photo is no smaller as PNG.
        if isinstance(image, ImageFile.ImageFile) and image.format in ("PNG", "JPEG") and image.filename:
            return Path(os.fsdecode(image.filename)).read_bytes()
        if id(image) not in self._known:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            self._known[id(image)] = image, buffer.getvalue()
            if len(self._known) > 4096:
                self._known.popitem(last=False)
        return self._known[id(image)][1]


def _members(pair: Pair, encoder: _Encoder) -> dict[str, bytes]:
    """The tar members of a sample: its JSON and the media that the JSON names."""
    members: dict[str, bytes] = {}

    def side(item: Item | None, prefix: str) -> dict[str, Any] | None:
        if item is None:
            return None
        names = []
        for number, image in enumerate(item.images):
            data = encoder(image)
            name = f"{prefix}{number}." + ("png" if data.startswith(_PNG) else "jpg")
            members[name] = data
            names.append(name)
        return {**{f.name: getattr(item, f.name) for f in fields(item)}, "images": names}

    sample = {
        "key": pair.key,
        "dataset": pair.dataset,
        "gallery": pair.gallery,
        "query": side(pair.query, "q"),
        "target": side(pair.target, "t"),
        "hard_negatives": [side(item, f"n{number}.") for number, item in enumerate(pair.hard_negatives)],
    }
    return {"json": json.dumps(sample, ensure_ascii=False).encode(), **members}


def _index(path: Path, pairs: list[Pair]) -> dict[str, Any]:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            members.setdefault(key, {})[extension] = (info.offset_data, info.size)
    samples = [
        {
            "key": pair.key,
            "dataset": pair.dataset,
            "gallery": pair.gallery,
            "query_content": None if pair.query is None else pair.query.content_id,
            "target_content": pair.target.content_id,
            "has_rewrite": [bool(pair.query and pair.query.rewrite), bool(pair.target.rewrite)],
            "members": members[pair.key],
        }
        for pair in pairs
    ]
    return {"shard": path.name, "size": path.stat().st_size, "samples": samples}


# -- reading ----------------------------------------------------------------------------------------------


def read_corpus(path: str | Path) -> dict[str, Any]:
    """``corpus.json`` of a corpus folder.

    Raises:
        DataError: If the folder or the file is missing, unreadable or of another format version.
    """
    file = Path(path) / CORPUS_FILE
    build = "Build a corpus with `rime shards openmoji --output <folder>` and give that folder as data.path."
    if not Path(path).is_dir():
        raise DataError(f"data.path: folder {str(path)!r} does not exist. {build}")
    if not file.is_file():
        raise DataError(f"data.path: folder {str(path)!r} has no {CORPUS_FILE}: no finished corpus. {build}")
    corpus = _json(file.read_bytes(), str(file))
    if corpus.get("format") != FORMAT_VERSION:
        raise DataError(
            f"{file}: field 'format' is {corpus.get('format')!r}, not {FORMAT_VERSION}. Build it again."
        )
    return corpus


def read_split(path: str | Path, split: str) -> list[Entry]:
    """The index of one split, in the order of its shards.

    Raises:
        DataError: If the split is missing or empty, a tar is missing, has another size than its index says,
            or ends before one of its members.
    """
    corpus = read_corpus(path)
    if split not in corpus["splits"]:
        raise DataError(f"{path}/{CORPUS_FILE}: no split {split!r}; there are {sorted(corpus['splits'])}.")
    folder = Path(path) / split
    shards = corpus["splits"][split]["shards"]
    entries = [entry for name in shards for entry in _read_index(folder / name)]
    if not entries:
        raise DataError(f"{folder}: split {split!r} holds no samples. Build the corpus again.")
    return entries


def _read_index(shard: Path) -> Iterator[Entry]:
    file = shard.with_suffix(".json")
    for needed in (shard, file):
        if not needed.is_file():
            raise DataError(f"{needed}: missing, but {CORPUS_FILE} lists the shard. Build the corpus again.")
    index = _json(file.read_bytes(), str(file))
    size = shard.stat().st_size
    for field in ("size", "samples"):
        if field not in index:
            raise DataError(f"{file}: field {field!r} is missing. Build the corpus again.")
    for sample in index["samples"]:
        try:
            entry = _entry(shard, sample)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{file}: malformed sample {sample!r:.90} ({error!r}). Build it again."
            ) from error
        for name, (start, length) in entry.members.items():
            if start + length > size:
                raise DataError(
                    f"{entry.name}: member {name!r} ends at byte {start + length}, but {shard} has {size}: "
                    "truncated tar. Copy or build it again."
                )
        yield entry
    if size != index["size"]:
        raise DataError(f"{shard}: has {size} bytes, its index says {index['size']}. Copy or build it again.")


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
    """Random access to the samples of a split; usable from several processes at once.

    Args:
        entries: The index of the split, from ``read_split``.
        require_rewrites: Whether a query or target without a rewrite is an error.
        written: What stands in the place of the rewrite. A target without ``cot`` keeps its rewrite.
    """

    def __init__(
        self, entries: list[Entry], require_rewrites: bool = False, written: Written = "rewrite"
    ) -> None:
        self.entries, self.require_rewrites, self.written = entries, require_rewrites, written
        self._files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a spawned worker opens its own

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    def read(self, index: int) -> Pair:
        """One sample with decoded RGB images.

        Raises:
            DataError: If a member is missing, broken or malformed; names shard, key and field.
        """
        entry = self.entries[index]
        sample = _json(self._member(entry, "json"), f"{entry.name}: field 'json'")
        for field in ("dataset", "gallery", "target"):
            if field not in sample:
                raise DataError(f"{entry.name}: field {field!r} is missing in the JSON.")
        query, negatives = sample.get("query"), sample.get("hard_negatives") or []
        pair = Pair(
            key=entry.name,
            dataset=sample["dataset"],
            gallery=sample["gallery"],
            query=None if query is None else self._item(entry, "query", query),
            target=self._item(entry, "target", sample["target"]),
            hard_negatives=tuple(
                self._item(entry, f"hard_negatives[{n}]", item) for n, item in enumerate(negatives)
            ),
        )
        return with_written(pair, self.written)

    def _item(self, entry: Entry, field: str, item: Any) -> Item:
        if not isinstance(item, dict):
            raise DataError(f"{entry.name}: field {field!r} is {type(item).__name__}, an object is needed.")
        for name, kinds in _ITEM_FIELDS.items():
            if not isinstance(item.get(name), kinds):
                allowed = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                raise DataError(f"{entry.name}: field '{field}.{name}' is {item.get(name)!r}, not {allowed}.")
        if not item["text"] and not item["images"]:
            raise DataError(f"{entry.name}: field {field!r} has neither text nor images.")
        if self.require_rewrites and field in ("query", "target") and not (item.get("rewrite") or "").strip():
            raise DataError(
                f"{entry.name}: field '{field}.rewrite' is missing or empty, but rewrites are trained on. "
                "Write one, or set data.require_rewrites to false."
            )
        return Item(
            text=item["text"],
            images=tuple(self._image(entry, f"{field}.images", name) for name in item["images"]),
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
            raise DataError(f"{entry.name}: {field}member {name!r} is not in the tar {entry.shard}.")
        offset, size = entry.members[name]
        # pread has no shared position, so that descriptors inherited by a forked worker stay usable.
        block = os.pread(self._descriptor(entry), size + _BLOCK, offset - _BLOCK)
        if len(block) != size + _BLOCK:
            raise DataError(f"{entry.name}: member {name!r} ends beyond the end of {entry.shard}: truncated.")
        header = block[:100].split(b"\0")[0].decode(errors="replace")
        if not f"{entry.key}.{name}".endswith(header) or not header:
            raise DataError(f"{entry.name}: the index points at {header!r}, not {name!r}. Build it again.")
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
        raise DataError(f"{name}: malformed JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: holds {type(content).__name__}, a JSON object is needed.")
    return content
