"""Builds a corpus from your own pairs: a CSV or JSONL table and a folder of pictures.

An error names line and field, and leaves no finished corpus. Called by ``rime shards folder``.
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
    """Turn your own table of pairs into shards.

    Args:
        output: Corpus folder to write.
        seed: Seed of the split, for rows without a value in column 'split'.
        table: CSV file with a header line, or JSONL file with one object per line.
        media: Folder of the files that the picture columns name; the folder of the table if not given.
        name: Name of the corpus.
        licence: Licence of your data, recorded in corpus.json.
        val_share: Share of the contents in the validation split, for rows without a split.
        test_share: Share of the contents in the test split, for rows without a split.

    Raises:
        DataError: If the table is missing, empty or has a faulty line; it names line and field.
        RimeError: If the shares do not fit, or if train, val or test gets no rows.
    """
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise RimeError(
            f"val_share and test_share must be at least 0 and add up to less than 1, but are {val_share} and "
            f"{test_share}."
        )
    media = table.parent if media is None else media
    rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    for line, values in _lines(table):
        row = _row(f"{table.name} line {line}", line, values, media)
        rows[values.get("split") or _split_of(row, seed, val_share, test_share)].append(row)
    for split in SPLITS[:3]:
        if not rows[split]:
            counts = {name: len(found) for name, found in rows.items()}
            raise RimeError(f"{table}: split {split!r} must have rows, but has none: {counts}. Add some.")
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
    """One checked line of the table; its pictures are opened only when it is written."""

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
    """Yield line number and values of every row, without empty values."""
    if not table.is_file():
        raise DataError(f"--table must be a CSV or JSONL file, but {table} does not exist.")
    if table.suffix not in (".csv", ".jsonl"):
        raise DataError(f"--table must end in .csv or .jsonl, but {table} ends in {table.suffix!r}.")
    found = 0
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = _csv_rows(file) if table.suffix == ".csv" else _json_rows(file, table)
        for line, values in rows:
            unknown = sorted(str(column) for column in values if column not in COLUMNS)
            if unknown:
                raise DataError(
                    f"{table.name} line {line}: columns {unknown} are unknown. Known are {list(COLUMNS)}."
                )
            found += 1
            yield line, {column: value for column, value in values.items() if value not in (None, "", [])}
    if not found:
        raise DataError(f"--table must have rows, but {table} has none.")


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
            raise DataError(f"{table.name} line {line}: must be a JSON object, but is {text.strip()!r:.90}.")
        yield line, values


def _row(where: str, line: int, values: dict[str, Any], media: Path) -> _Row:
    target = _side(where, "target", values, media, content_id=None)
    if target is None:
        raise DataError(
            f"{where}: field 'target_text' or 'target_image' must have a value, but both are empty. Add one."
        )
    split = values.get("split")
    query = _side(where, "query", values, media, content_id=target.content_id)
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: field 'split' must be one of {list(SPLITS)}, but is {split!r}.")
    if query is None and split != "distractors":
        raise DataError(
            f"{where}: field 'query_text' or 'query_image' must have a value, but both are empty. Add one, "
            "or set 'split' to 'distractors' if this is a gallery item without a query."
        )
    if split == "distractors":
        query = None
    gallery = values.get("gallery") or ("pictures" if target.images else "texts")
    return _Row(where, f"row-{line:08d}", values.get("task") or "pairs", gallery, query, target)


def _side(where: str, name: str, values: dict[str, Any], media: Path, content_id: str | None) -> _Side | None:
    """Return one side of a row, or None if it has neither text nor picture."""
    given = {column: values.get(f"{name}_{column}") for column in _SIDE_COLUMNS}
    names = given.pop("image")
    for column, value in given.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: field '{name}_{column}' must be a string, but is {value!r:.90}.")
    if isinstance(names, str):
        names = [part.strip() for part in names.split(";")]
    paths = []
    for image in names or []:
        path = media / str(image)
        if not path.is_file():
            raise DataError(f"{where}: field '{name}_image': file {path} does not exist. Check --media.")
        paths.append(path)
    text = given["text"] or ""
    if not text and not paths:
        return None
    content = given["content_id"] or content_id or _content(text, paths)
    return _Side(text, tuple(paths), content, given["instruction"] or "", given["rewrite"], given["cot"])


def _content(text: str, paths: list[Path]) -> str:
    """Return a content id by hash: equal for the same text and the same files."""
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _split_of(row: _Row, seed: int, val_share: float, test_share: float) -> str:
    """Return the split of a row by hash of its target's content, so that no content is in two splits."""
    digest = hashlib.sha256(f"{seed} {row.target.content_id}".encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    if place < test_share:
        return "test"
    return "val" if place < test_share + val_share else "train"


def _open(path: Path, where: str) -> Image.Image:
    """Return the checked picture. PNG and JPEG files stay undecoded, because they are copied as they are."""
    try:
        with Image.open(path) as probe:
            probe.verify()
        image = Image.open(path)
        if image.format in ("PNG", "JPEG"):
            image.close()
            return image
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: file {path} must be a picture, but cannot be read ({error}).") from error
