"""Makes the index of a split from its tars, whoever wrote them.

shard_writer.py indexes the tars of a builder with it, plain_tars.py those of another program. Each sample is
read from the tar itself, so the index describes what is there. The columns are those of split_index.py.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rime_pl.datamodules.corpus_file import strict_json
from rime_pl.datamodules.faults import Fault
from rime_pl.datamodules.split_index import (
    COLUMNS,
    COLUMNS_FILE,
    FACTS,
    FORMAT_VERSION,
    HAS_QUERY,
    INDEX_FILES,
    NAMES,
    QUERY_REWRITE,
    TARGET_REWRITE,
)
from rime_pl.datamodules.tar_samples import TarSample, scan, with_todays_names
from rime_pl.errors import DataError
from rime_pl.types import content_hash

#: Bits of the column "modality" for one side; those of the target are shifted by 4.
TEXT = 1
MEDIA = {"picture": 2, "clip": 4, "page": 8}
_CELL = 28  # pixels a side of a visual token of Qwen2-VL
_BYTES_PER_TOKEN = 4  # of text, by rule of thumb
_TYPECODES = {"u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q", "<i8": "q"}
_MOST_NAMES = np.iinfo(np.uint16).max


class IndexWriter:
    """Collects the index of a split, tar by tar, and writes it at the end. It holds 66 bytes for each pair.

    Args:
        folder: Folder of the split; the names are written there from the start.
        faults: Where samples that cannot be used are added; they are left out.
    """

    def __init__(self, folder: Path, faults: list[Fault]) -> None:
        self.folder, self.faults = folder, faults
        self.tasks: Counter[str] = Counter()
        self._tasks: dict[str, int] = {}
        self._galleries: dict[str, int] = {}
        self._columns = {name: array(_TYPECODES[kind.str.lstrip("|")]) for name, kind in COLUMNS.items()}
        self._keys = array("q")  # hashes, to find a key that is there twice
        self._shards: list[tuple[str, int, str, int]] = []
        self._names_size = 0
        folder.mkdir(exist_ok=True)
        for name in INDEX_FILES:
            (folder / name).unlink(missing_ok=True)

    def add(self, tar: Path) -> int:
        """Add all samples of a tar of the folder that can be used, and return how many.

        Raises:
            DataError: If the tar is truncated or is no tar.
        """
        before = len(self._keys)
        with (self.folder / NAMES).open("ab") as names, tar.open("rb") as file:
            for sample in scan(tar):
                try:
                    if sample.fault:
                        raise _Unusable(*sample.fault)
                    crc32 = zlib.crc32(os.pread(file.fileno(), sample.end - sample.start, sample.start))
                    names.write(self._add(tar.name, sample, read_sample(sample), crc32))
                except _Unusable as fault:
                    self.faults.append(Fault(fault.kind, f"{tar.name}/{sample.key}", str(fault)))
        with tar.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append((tar.name, tar.stat().st_size, sha256, len(self._keys) - before))
        return len(self._keys) - before

    def _add(self, tar: str, sample: TarSample, content: dict[str, Any], crc32: int) -> bytes:
        query, target = content["query"], content["target"]
        sides = [side for side in (query, target) if side]
        if (size := sample.end - sample.start) > np.iinfo(np.uint32).max:
            raise _Unusable("too large", f"a sample must be smaller than 4 GiB, but has {size} bytes.")
        flags = (
            HAS_QUERY * bool(query) | QUERY_REWRITE * _rewritten(query) | TARGET_REWRITE * _rewritten(target)
        )
        row = {
            "offset": sample.start,
            "size": size,
            "name": self._names_size,
            "task": _code(self._tasks, content["dataset"], "tasks"),
            "gallery": _code(self._galleries, content["gallery"], "galleries"),
            "query_content": content_hash(query["content_id"]) if query else 0,
            "target_content": content_hash(target["content_id"]),
            "draw": content_hash(f"annotated {tar}/{sample.key}"),
            "modality": (_modality(query) if query else 0) | _modality(target) << 4,
            "flags": flags,
            "visual_tokens": sum(_visual_tokens(sample, side) for side in sides),
            "text_tokens": sum(_text_tokens(side) for side in sides),
        }
        contents = [query["content_id"] if query else None, target["content_id"]]
        names = json.dumps([sample.key, *contents, crc32], ensure_ascii=False)
        line = f"{names}\n".encode()
        for name, value in row.items():
            self._columns[name].append(value)
        self._names_size += len(line)
        self._keys.append(content_hash(sample.key))
        self.tasks[content["dataset"]] += 1
        return line

    @property
    def samples(self) -> int:
        return len(self._keys)

    @property
    def shards(self) -> list[str]:
        return [name for name, *_ in self._shards]

    def close(self) -> None:
        """Write the index; of samples with one key only the first stays."""
        kept = self._first_of_each_key()
        digest = hashlib.sha256()
        with (self.folder / COLUMNS_FILE).open("wb") as file:
            for name, kind in COLUMNS.items():
                column = np.asarray(self._columns[name]).astype(kind, copy=False)[kept].tobytes()
                file.write(column)
                digest.update(column)
        with (self.folder / NAMES).open("ab+") as names:
            names.seek(0)
            sha256 = {
                COLUMNS_FILE: digest.hexdigest(),
                NAMES: hashlib.file_digest(names, "sha256").hexdigest(),
            }
        counts = np.diff(np.searchsorted(kept, np.cumsum([0, *(count for *_, count in self._shards)])))
        facts = {
            "format": FORMAT_VERSION,
            "samples": len(kept),
            "tasks": list(self._tasks),
            "galleries": list(self._galleries),
            "sha256": sha256,
            "shards": [[*shard[:3], int(n)] for shard, n in zip(self._shards, counts, strict=True)],
        }
        (self.folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")

    def _first_of_each_key(self) -> NDArray[np.int64]:
        """Return the rows that stay, in order; the others are faults."""
        keys = np.asarray(self._keys)
        first = np.sort(np.unique(keys, return_index=True)[1])
        if len(first) < len(keys):
            starts = np.cumsum([0, *(count for *_, count in self._shards)])
            offsets = self._columns["name"]
            names = (self.folder / NAMES).read_bytes()
            for row in np.setdiff1d(np.arange(len(keys)), first).tolist():
                key = json.loads(names[offsets[row] :].split(b"\n", 1)[0])[0]
                tar = self._shards[int(np.searchsorted(starts, row, "right")) - 1][0]
                says = "its key must be unique in the split, but an earlier sample has it."
                self.faults.append(Fault("duplicate key", f"{tar}/{key}", says))
                self.tasks[list(self._tasks)[self._columns["task"][row]]] -= 1
        return first


class _Unusable(Exception):
    """A sample that the index leaves out."""

    def __init__(self, kind: str, says: str) -> None:
        super().__init__(says)
        self.kind = kind


def read_sample(sample: TarSample) -> dict[str, Any]:
    """Return the JSON of a sample with what the index needs of it.

    Raises:
        _Unusable: If a field or a picture is missing or malformed.
    """
    if "json" not in sample.members:
        raise _Unusable("no JSON", f"a sample must have a member '{sample.key}.json', but has none.")
    try:
        content = strict_json(sample.members["json"])
    except UnicodeDecodeError as error:
        raise _Unusable("no UTF-8", f"the JSON must be UTF-8, but byte {error.start} is not.") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("malformed JSON", f"malformed JSON ({error}).") from error
    if not isinstance(content, dict):
        raise _Unusable("malformed JSON", f"must hold a JSON object, but holds {content!r:.90}.")
    _need_texts(content, "", "dataset", "gallery")
    content["query"] = content.get("query")
    for name in ("query", "target"):
        side = content.get(name)
        if side is None and name == "query":
            continue
        if not isinstance(side, dict):
            raise _Unusable("malformed field", f"field {name!r} must be an object, but is {side!r:.90}.")
        content[name] = side = with_todays_names(side)
        _need_texts(side, f"{name}.", "text", "content_id")
        for file in itertools.chain.from_iterable(map(_files, _media(side, name))):
            if file not in sample.members:
                says = f"field '{name}.media' names {file!r}, but the tar has no such member."
                raise _Unusable("missing media", says)
    return content


def _need_texts(values: dict[str, Any], where: str, *fields: str) -> None:
    for field in fields:
        value = values.get(field)
        try:
            if not isinstance(value, str):
                raise TypeError
            value.encode()
        except (TypeError, UnicodeEncodeError):
            says = f"field '{where}{field}' must be a text, but is {value!r:.90}."
            raise _Unusable("malformed field", says) from None


def _media(side: dict[str, Any], name: str) -> list[Any]:
    media = side.get("media")
    if not isinstance(media, list) or not all(_files(medium) for medium in media):
        raise _Unusable(
            "malformed field",
            f"field '{name}.media' must be a list of pictures, pages and clips, but is {media!r:.90}.",
        )
    return media


def _files(medium: Any) -> list[str]:
    """Return the members that a picture, a page or a clip consists of; none if it is malformed."""
    files: Any = [medium]
    if isinstance(medium, dict):
        of_kind: dict[Any, Any] = {"page": [medium.get("file")], "clip": medium.get("frames")}
        files = of_kind.get(medium.get("kind"))
    whole = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return files if whole else []


def _rewritten(side: dict[str, Any] | None) -> bool:
    rewrite = side.get("rewrite") if side else None
    return isinstance(rewrite, str) and bool(rewrite.strip())


def _modality(side: dict[str, Any]) -> int:
    kinds = {medium["kind"] if isinstance(medium, dict) else "picture" for medium in side.get("media", [])}
    return TEXT * bool(side["text"].strip()) | sum(MEDIA[kind] for kind in kinds)


def _text_tokens(side: dict[str, Any]) -> int:
    texts = (side.get(field) for field in ("instruction", "text", "rewrite"))
    size = sum(len(text.encode(errors="replace")) for text in texts if isinstance(text, str))
    return -(-size // _BYTES_PER_TOKEN)


def _visual_tokens(sample: TarSample, side: dict[str, Any]) -> int:
    """Return the cells of 28 x 28 pixels of the media; 0 for one that cannot be opened."""
    tokens = 0
    for files in map(_files, side.get("media", [])):
        try:
            with Image.open(io.BytesIO(sample.members[files[0]])) as picture:
                width, height = picture.size
        except Exception:  # whatever Pillow raises on damaged bytes
            continue
        together = -(-len(files) // 2)  # two frames of a clip are seen as one
        tokens += together * max(1, round(width / _CELL)) * max(1, round(height / _CELL))
    return min(tokens, np.iinfo(np.uint32).max)


def _code(known: dict[str, int], name: str, what: str) -> int:
    if len(known) > _MOST_NAMES and name not in known:
        raise DataError(f"A split must have at most {_MOST_NAMES + 1} {what}, but {name!r:.90} is one more.")
    return known.setdefault(name, len(known))
