"""Writes a corpus folder: WebDataset tars, an index for each tar, and ``corpus.json`` for all of them.

The builders call ``write_corpus``. Equal samples give equal bytes, so a hash identifies a corpus.
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
from dataclasses import fields
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image, ImageFile
from rich.progress import MofNCompleteColumn, Progress

from rime_pl.datamodules.shards import CORPUS_FILE, FORMAT_VERSION
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair

_PNG = b"\x89PNG"


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
    """Write a corpus folder and return its ``corpus.json``. That file comes last and marks a finished corpus.

    Args:
        output: Folder to write. A corpus that is already there is replaced.
        name: Name of the corpus.
        licence: Licence and attribution of the content.
        splits: Samples of each split. A key must be unique in its split and must not contain a dot, because
            WebDataset splits file names at the first dot.
        totals: Number of samples of each split, for the progress bar.
        seed: Seed of the builder; recorded.
        arguments: Other settings of the builder; recorded.
        samples_per_shard: Number of samples in a tar.
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
    """Make the corpus folder; remove the shards of an earlier build and nothing else."""
    output.mkdir(parents=True, exist_ok=True)
    (output / CORPUS_FILE).unlink(missing_ok=True)
    for shard in output.glob("*/*.tar"):
        if shard.stem.startswith(f"{shard.parent.name}-"):
            shard.unlink()
            shard.with_suffix(".json").unlink(missing_ok=True)


def _checked(
    split: str, pairs: Iterable[Pair], tasks: Counter[str], advance: Callable[[], None]
) -> Iterator[Pair]:
    """Yield the pairs, counted in ``tasks``; refuse a key that a tar or WebDataset cannot hold."""
    keys: set[str] = set()
    for pair in pairs:
        if not pair.key or "." in pair.key or "/" in pair.key or pair.key in keys:
            raise DataError(
                f"split {split!r}: a sample key must be unique and must not be empty or contain '.' or '/', "
                f"but one is {pair.key!r}. Change the builder that makes this key."
            )
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
    """Turns images into bytes. Builders use one picture in many samples, so recent results are kept."""

    def __init__(self) -> None:
        # the image is kept with its bytes, so that no other image can get the same id
        self._known: OrderedDict[int, tuple[Image.Image, bytes]] = OrderedDict()

    def __call__(self, image: Image.Image) -> bytes:
        # An unchanged picture from a file keeps the bytes of the file: a photo is not smaller as PNG.
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
    """Return the tar members of a sample: its JSON and the images that the JSON names."""
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
    """Return the index of a tar: what each sample is, and where its members lie."""
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
            "has_rewrite": [
                bool(item and (item.rewrite or "").strip()) for item in (pair.query, pair.target)
            ],
            "members": members[pair.key],
        }
        for pair in pairs
    ]
    return {"shard": path.name, "size": path.stat().st_size, "samples": samples}
