"""Your own pairs: a CSV or JSONL table and a folder of pictures -> shards. Called by ``rime shards folder``.

The columns are documented in docs/how-to/your-own-data.md.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.errors import DataError, RimeError
from rime_pl.types import Item, Pair

SPLITS = ("train", "val", "test", "distractors")
_SIDE_COLUMNS = ("text", "image", "instruction", "rewrite", "cot", "content_id")
COLUMNS = (
    *(f"query_{name}" for name in _SIDE_COLUMNS),
    *(f"target_{name}" for name in _SIDE_COLUMNS),
    "task",
    "gallery",
    "split",
)


def build(
    output: Path,
    seed: int = 0,
    *,
    table: Path,
    media: Path | None = None,
    name: str = "folder",
    licence: str = "not stated",
    val_share: float = 0.1,
    test_share: float = 0.1,
) -> None:
    """Turn a table of pairs into shards.

    Args:
        output: Corpus folder to make.
        seed: Of the split by hash, for rows without a value in column 'split'.
        table: CSV file with a header line, or JSONL file with an object per line.
        media: Folder that the picture columns are relative to; the table's own folder if not given.
        name: Name of the corpus.
        licence: Licence of your data, recorded in corpus.json.
        val_share: Share of the contents that goes to val, for rows without a split.
        test_share: Share of the contents that goes to test, for rows without a split.

    Raises:
        DataError: If the table is missing, empty or has a faulty line; names line and field.
        RimeError: If a share is no share, or train, val or test gets no rows.
    """
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise RimeError(f"--val-share {val_share}, --test-share {test_share}: must add up to less than 1.")
    media = table.parent if media is None else media
    rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    for line, values in _lines(table):
        row = _row(f"{table.name} line {line}", line, values, media)
        rows[values.get("split") or _split_of(row, seed, val_share, test_share)].append(row)
    for split in SPLITS[:3]:
        if not rows[split]:
            counts = {name: len(found) for name, found in rows.items()}
            raise RimeError(f"{table}: no rows for split {split!r} ({counts}). Add rows or a column 'split'.")
    write_corpus(
        output,
        name=name,
        licence=licence,
        splits={split: (row.pair() for row in found) for split, found in rows.items() if found},
        totals={split: len(found) for split, found in rows.items()},
        seed=seed,
        arguments={"table": table.name, "val_share": val_share, "test_share": test_share},
    )


@dataclass(frozen=True)
class _Side:
    text: str
    images: tuple[Path, ...]
    content_id: str
    instruction: str
    rewrite: str | None
    cot: str | None


@dataclass(frozen=True)
class _Row:
    """One checked line; pictures are opened when it is written."""

    where: str  # "pairs.csv line 7"
    key: str
    task: str
    gallery: str
    query: _Side | None
    target: _Side

    def pair(self) -> Pair:
        query = None if self.query is None else self._item("query", self.query)
        return Pair(self.key, self.task, self.gallery, query, self._item("target", self.target))

    def _item(self, name: str, side: _Side) -> Item:
        images = tuple(_open(path, f"{self.where}: field '{name}_image'") for path in side.images)
        return Item(side.text, images, side.content_id, side.instruction, side.rewrite, side.cot)


def _lines(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values of every row; empty values are left out."""
    if not table.is_file():
        raise DataError(f"--table {table}: no such file. Give a CSV or JSONL file.")
    if table.suffix not in (".csv", ".jsonl"):
        raise DataError(f"--table {table}: ends in {table.suffix!r}; only .csv and .jsonl are read.")
    found = 0
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = _csv_rows(file) if table.suffix == ".csv" else _json_rows(file, table)
        for line, values in rows:
            unknown = sorted(str(column) for column in values if column not in COLUMNS)
            if unknown:
                raise DataError(
                    f"{table.name} line {line}: unknown columns {unknown}; known are {list(COLUMNS)}."
                )
            found += 1
            yield line, {column: value for column, value in values.items() if value not in (None, "", [])}
    if not found:
        raise DataError(f"--table {table}: has no rows.")


def _csv_rows(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, restkey="<more values than columns>")
    for values in reader:
        yield reader.line_num, values


def _json_rows(file: Any, table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{table.name} line {line}: malformed JSON ({error}).") from error
        if not isinstance(values, dict):
            raise DataError(f"{table.name} line {line}: holds {type(values).__name__}, an object is needed.")
        yield line, values


def _row(where: str, line: int, values: dict[str, Any], media: Path) -> _Row:
    target = _side(where, "target", values, media, content_id=None)
    if target is None:
        raise DataError(
            f"{where}: fields 'target_text' and 'target_image' are both empty or missing; give one."
        )
    split = values.get("split")
    query = _side(where, "query", values, media, content_id=target.content_id)
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: field 'split' is {split!r}; allowed are {list(SPLITS)}.")
    if query is None and split != "distractors":
        raise DataError(
            f"{where}: fields 'query_text' and 'query_image' are both empty or missing; give one, "
            "or 'distractors' as the split for a gallery item without a query."
        )
    if split == "distractors":
        query = None
    gallery = values.get("gallery") or ("pictures" if target.images else "texts")
    return _Row(where, f"row-{line:08d}", values.get("task") or "pairs", gallery, query, target)


def _side(where: str, name: str, values: dict[str, Any], media: Path, content_id: str | None) -> _Side | None:
    """One side of a row, or None if it has neither text nor picture."""
    given = {column: values.get(f"{name}_{column}") for column in _SIDE_COLUMNS}
    names = given.pop("image")
    for column, value in given.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: field '{name}_{column}' is {value!r}, a string is needed.")
    if isinstance(names, str):
        names = [part.strip() for part in names.split(";")]
    paths = []
    for image in names or []:
        path = media / str(image)
        if not path.is_file():
            raise DataError(f"{where}: field '{name}_image': {path} does not exist.")
        paths.append(path)
    text = given["text"] or ""
    if not text and not paths:
        return None
    content = given["content_id"] or content_id or _content(text, paths)
    return _Side(text, tuple(paths), content, given["instruction"] or "", given["rewrite"], given["cot"])


def _content(text: str, paths: list[Path]) -> str:
    """Without a semantic id, the same text and the same files are the same content."""
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _split_of(row: _Row, seed: int, val_share: float, test_share: float) -> str:
    """By hash of the target's content, so that a content never stands in two splits."""
    digest = hashlib.sha256(f"{seed} {row.target.content_id}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def _open(path: Path, where: str) -> Image.Image:
    """The picture, checked. PNG and JPEG files are copied as they are, so they stay undecoded."""
    try:
        with Image.open(path) as probe:
            probe.verify()
        image = Image.open(path)
        if image.format in ("PNG", "JPEG"):
            image.close()
            return image
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: {path} is no readable picture ({error}).") from error
