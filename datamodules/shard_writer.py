"""Writes a corpus folder: WebDataset tars, an index for each split, and ``corpus.json`` for all of them.

The builders call ``write_corpus``. Equal samples give equal bytes, so a hash identifies a corpus.
The format is documented in docs/reference/data-format.md.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image, ImageFile

from rime_pl.bars import Bar
from rime_pl.datamodules.corpus_file import CORPUS_FILE
from rime_pl.datamodules.faults import Fault, listed
from rime_pl.datamodules.index_writer import IndexWriter
from rime_pl.datamodules.replacing import replacing
from rime_pl.datamodules.split_index import FORMAT_VERSION, INDEX_FILES
from rime_pl.errors import DataError
from rime_pl.media import checked_clip, open_picture
from rime_pl.types import Clip, Item, Medium, Page, Pair

_PNG = b"\x89PNG"
BROKEN_FILE = "broken.txt"  # what was left out of a corpus


def write_corpus(
    output: Path,
    name: str,
    licence: str,
    splits: Mapping[str, Iterable[Pair | None]],
    totals: Mapping[str, int],
    seed: int,
    arguments: Mapping[str, Any] | None = None,
    samples_per_shard: int = 512,
    left_out: Callable[[], Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Write a corpus folder and return its ``corpus.json``.

    Args:
        output: Folder to write. A corpus that is there is replaced at the end; if anything fails, it stays.
        name: Name of the corpus.
        licence: Licence and attribution of the content.
        splits: Samples of each split; None is one that is left out. A key must be unique in its split and
            must not contain a dot, because WebDataset splits file names at the first dot.
        totals: Number of samples of each split, for the progress bar.
        seed: Seed of the builder; recorded.
        arguments: Other settings of the builder; recorded.
        samples_per_shard: Number of samples in a tar.
        left_out: Function that is called after the last sample. It returns what was left out, a line each,
            for broken.txt, or raises if nothing may be built.

    Raises:
        RimeError: If ``output`` holds other files, or cannot be written.
    """
    with replacing(Path(output), strangers) as folder:
        with Bar() as progress:
            bar = progress.add_task(f"shards of {name}", total=sum(totals.values()))
            about, data_hash = _write_splits(folder, splits, samples_per_shard, lambda: progress.advance(bar))
        corpus = {
            **{"name": name, "format": FORMAT_VERSION, "licence": licence, "seed": seed},
            **{"arguments": dict(arguments or {}), "data_hash": data_hash, "splits": about},
        }
        write_corpus_file(folder, corpus, left_out() if left_out else ())
    return corpus


def write_corpus_file(folder: Path, corpus: dict[str, Any], left_out: Sequence[str]) -> None:
    """Write ``corpus.json``, without the splits that have no samples, and what was left out."""
    corpus["splits"] = {split: told for split, told in corpus["splits"].items() if told["samples"]}
    if left_out:
        _write_text(folder / BROKEN_FILE, "\n".join(left_out))
    _write_text(folder / CORPUS_FILE, json.dumps(corpus, indent=1, ensure_ascii=False))


def _write_splits(
    folder: Path,
    splits: Mapping[str, Iterable[Pair | None]],
    samples_per_shard: int,
    advance: Callable[[], None],
) -> tuple[dict[str, Any], str]:
    """Write all splits; return what is in each, and a hash of all."""
    digest = hashlib.sha256()
    about: dict[str, Any] = {}
    for split, pairs in splits.items():
        tasks: Counter[str] = Counter()
        stream = _checked(split, pairs, tasks, advance)
        shards = _write_split(folder / split, stream, samples_per_shard, digest)
        about[split] = {
            "shards": shards,
            "samples": tasks.total(),
            "tasks": dict(sorted(tasks.items())),
        }
    return about, digest.hexdigest()


def _write_split(folder: Path, pairs: Iterator[Pair], samples_per_shard: int, digest: Any) -> list[str]:
    """Write the tars of a split, add them to the hash of the corpus, and return their names."""
    encoder = Encoder()
    shards: list[str] = []
    while chunk := list(itertools.islice(pairs, samples_per_shard)):
        path = folder / f"{folder.name}-{len(shards):06d}.tar"
        write_shard(path, chunk, encoder)
        add_to_hash(digest, path)
        shards.append(path.name)
    write_index(folder, shards)
    return shards


def write_index(folder: Path, shards: Sequence[str]) -> None:
    """Write the index of a split over its tars, which are there.

    Raises:
        DataError: If a sample cannot be read again.
    """
    if not shards:
        return
    faults: list[Fault] = []
    index = IndexWriter(folder, faults)
    for name in shards:
        index.add(folder / name)
    index.close()
    if faults:
        raise DataError(f"The builder made samples that cannot be read:\n{listed(faults, 20)}")


def add_to_hash(digest: Any, shard: Path) -> None:
    """Add a tar to the hash of its corpus."""
    digest.update(f"{shard.parent.name}/{shard.name}\n".encode())
    with shard.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")


def strangers(folder: Path) -> list[str]:
    """Return the files in a folder that no builder has written."""
    index = "|".join(map(re.escape, INDEX_FILES))  # and of the format before this one, an index for each tar
    ours = re.compile(rf"{CORPUS_FILE}|{BROKEN_FILE}|([^/]+)/\1-\d{{6}}\.(tar|json)|[^/]+/({index})")
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if not ours.fullmatch(name))


def _checked(
    split: str, pairs: Iterable[Pair | None], tasks: Counter[str], advance: Callable[[], None]
) -> Iterator[Pair]:
    """Yield the pairs, counted in ``tasks``; refuse a key that a tar or WebDataset cannot hold."""
    keys: set[str] = set()
    for pair in pairs:
        advance()
        if pair is None:
            continue
        if not pair.key or "." in pair.key or "/" in pair.key or pair.key in keys:
            raise DataError(
                f"split {split!r}: a sample key must be unique and must not be empty or contain '.' or '/', "
                f"but one is {pair.key!r}. Change the builder that makes this key."
            )
        keys.add(pair.key)
        tasks[pair.dataset] += 1
        yield pair


def write_shard(path: Path, pairs: list[Pair], encoder: Encoder) -> None:
    """Write one tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as tar:
        for pair in pairs:
            tar.write({"__key__": pair.key, **_members(pair, encoder)})


class Encoder:
    """Turns images into bytes. Builders use one picture in many samples, so recent results are kept."""

    def __init__(self) -> None:
        # the image is kept with its bytes, so that no other image can get the same id
        self._known: OrderedDict[tuple[int, str], tuple[Image.Image, bytes]] = OrderedDict()

    def __call__(self, image: Image.Image, name: str, form: str = "PNG") -> bytes:
        """Return the bytes of an image; ``form`` is PNG or JPEG."""
        # An opened file that was not changed keeps its bytes, because a photo as PNG is larger.
        if isinstance(image, ImageFile.ImageFile) and image.format in ("PNG", "JPEG") and image.fp:
            image.fp.seek(0)
            return image.fp.read()
        known = id(image), form
        if known not in self._known:
            buffer = io.BytesIO()
            picture = image if image.mode == "L" else open_picture(image, name)
            picture.save(buffer, form, **({} if form == "PNG" else {"quality": 90, "subsampling": 0}))
            self._known[known] = image, buffer.getvalue()
            if len(self._known) > 4096:
                self._known.popitem(last=False)
        return self._known[known][1]


def _members(pair: Pair, encoder: Encoder) -> dict[str, bytes]:
    """Return the tar members of a sample: its JSON and the files that the JSON names."""
    members: dict[str, bytes] = {}

    def file(image: Image.Image, stem: str, form: str = "PNG") -> str:
        data = encoder(image, f"sample {pair.key!r}", form)
        name = f"{stem}." + ("png" if data.startswith(_PNG) else "jpg")
        members[name] = data
        return name

    def medium(one: Medium, stem: str) -> str | dict[str, Any]:
        if isinstance(one, Clip):
            checked_clip(one, f"sample {pair.key!r}")
            frames = [file(frame, f"{stem}.{number:03d}", "JPEG") for number, frame in enumerate(one.frames)]
            return {"kind": "clip", "frames": frames, "times": list(one.times)}
        return {"kind": "page", "file": file(one.image, stem)} if isinstance(one, Page) else file(one, stem)

    def side(item: Item | None, prefix: str) -> dict[str, Any] | None:
        if item is None:
            return None
        media = [medium(one, f"{prefix}{number}") for number, one in enumerate(item.media)]
        return {**{f.name: getattr(item, f.name) for f in fields(item)}, "media": media}

    sample = {
        "key": pair.key,
        "dataset": pair.dataset,
        "gallery": pair.gallery,
        "query": side(pair.query, "q"),
        "target": side(pair.target, "t"),
        "hard_negatives": [side(item, f"n{number}.") for number, item in enumerate(pair.hard_negatives)],
        "positives": [side(item, f"p{number}.") for number, item in enumerate(pair.positives)],
        **({"source": pair.source} if pair.source else {}),
    }
    return {"json": json.dumps(sample, ensure_ascii=False).encode(), **members}
