"""Tiny local copies of MMEB-V2, MRMR and UVRB in the official layout, and what a reader must make of them.

Written from the pages of the benchmarks (official_facts.md); nothing here imports the readers. Image tasks
and what all have in common are here, the others in the files beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

Name = str | int
MARK = "<|image_1|>"


@dataclass
class Shown:
    """An item: its official words, its words in parts, and what it shows."""

    official: str
    instruction: str = ""
    text: str = ""
    media: tuple[str, ...] = ()  # files, "clip: " and files, "page: " and a file or colour


@dataclass
class Expected:
    """What a task must be read as."""

    name: str
    group: str
    modality: str
    metric: str
    queries: list[Shown] = field(default_factory=list)
    candidates: dict[Name, Shown] = field(default_factory=dict)  # in any order
    pools: list[list[Name]] | None = None
    labels: list[dict[Name, float]] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)

    def add(self, name: Name, shown: Shown) -> Name:
        """Add a candidate; the first of a name wins."""
        self.candidates.setdefault(name, shown)
        return name


@cache
def facts(section: str) -> list[dict[str, str]]:
    """The rows of a table of official_facts.md."""
    text = (Path(__file__).parent / "official_facts.md").read_text()
    lines = text.split(f"## {section}\n")[1].split("\n## ")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    spaced = [[cell[:-1] + " " if cell.endswith("_") else cell for cell in row] for row in rows]
    return [dict(zip(spaced[0], row, strict=True)) for row in spaced[2:]]


def fact(section: str, task: str) -> dict[str, str]:
    """The row of a task."""
    return next(row for row in facts(section) if row["task"] == task)


def colour(number: int) -> tuple[int, int, int]:
    return (number * 37 % 256, number * 91 % 256, 50 + number % 200)


@cache
def picture(number: int, size: tuple[int, int] = (12, 8)) -> bytes:
    """A PNG of one colour."""
    buffer = BytesIO()
    Image.new("RGB", size, colour(number)).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, number: int = 1) -> str:
    """Write a picture; its name from the root of the copy is the caller's matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return path.name


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# -- the image tasks of MMEB-V2 ---------------------------------------------------------------------------


def write_image_task(root: Path, name: str, rows: int = 3) -> Expected:
    """Write an image task: rows in ``image-tasks/<task>/test-*.parquet``, pictures below ``image-tasks``."""
    about = fact("image", name)
    expected = Expected(name, f"I-{about['group']}", "image", "hit@1", pools=[])
    make = {"t2i": _text_to_picture, "i2i_vg": _picture_to_picture}.get(about["parser"], _picture_to_text)
    table = [make(root / "image-tasks", about, row, expected) for row in range(rows)]
    write_parquet(root / "image-tasks" / name / "test-00000-of-00001.parquet", table)
    return expected


def _query(folder: Path, about: dict[str, str], row: int, expected: Expected, text: str) -> dict[str, Any]:
    """Fields of a query that shows a picture; some stored instructions end in a space."""
    path = f"{about['task']}/query_{row}.png"
    save(folder / path, row)
    said = about["query"] + (f" {text}" if text else "")
    expected.queries.append(
        Shown("\n" + said.replace(" \n", "\n") + "\n", about["query"], text.strip(), (f"image-tasks/{path}",))
    )
    space = " " if about["parser"] in ("qa", "i2i_vg") else ""
    instruction = f"{MARK}\n{about['query']}{space}"
    return {"qry_inst": instruction, "qry_text": text, "qry_img_path": path}


def _picture_to_text(folder: Path, about: dict[str, str], row: int, expected: Expected) -> dict[str, Any]:
    text = "" if about["parser"] != "qa" else f"What is it \nin picture {row}?"
    if about["task"] == "N24News":
        text = f"caption {row}"
    fields = _query(folder, about, row, expected, text)
    names = ["Yes", "No", f"word {row}", "naïve"] if about["task"] != "HatefulMemes" else ["Yes", "No"]
    if about["task"] == "OK-VQA" and row == 1:
        names.append("")
    names = names[row % 2 :] + names[: row % 2]
    for one in names:
        expected.add(one, Shown(one, "", one))
    assert expected.pools is not None
    expected.pools.append(list(names))
    expected.labels.append({names[0]: 1.0})
    return {**fields, "tgt_text": names}


def _text_to_picture(folder: Path, about: dict[str, str], row: int, expected: Expected) -> dict[str, Any]:
    """A text finds a picture. Of two captions for one path only the first counts."""
    task, text = about["task"], f"words {row}"
    captioned = task in ("WebQA", "EDIS")
    more = "\n" if task == "VisDial" else ""
    expected.queries.append(Shown(f"{about['query']} {text}\n{more}", about["query"], text))
    space = " " if task == "WebQA" else ""
    paths = [f"{task}/{(row + n) % 4}.png" for n in range(3)]
    captions = [f"caption {row} of {n}" if captioned else "" for n in range(3)]
    for path, caption in zip(paths, captions, strict=True):
        save(folder / path, 7)
        said = f"\n{about['target']}{space} {caption}\n" if captioned else f"\n{about['target']}{space}\n"
        media = (f"image-tasks/{path}",)
        expected.add(path, Shown(said, about["target"], caption, media))
    assert expected.pools is not None
    expected.pools.append(list(paths))
    expected.labels.append({paths[0]: 1.0})
    stored = f"{MARK}\n{about['query']}" if captioned else about["query"]
    return {
        **{"qry_inst": stored, "qry_text": text, "tgt_inst": f"{MARK}\n{about['target']}{space}"},
        **{"tgt_text": captions, "tgt_img_path": paths},
    }


def _picture_to_picture(folder: Path, about: dict[str, str], row: int, expected: Expected) -> dict[str, Any]:
    """A picture with a text finds a picture; RefCOCO-Matching repeats a candidate in its second row."""
    task = about["task"]
    fields = _query(
        folder, about, row, expected, f'"a dog {row}"' if about["group"] == "GD" else f"dog {row}"
    )
    captioned = task in ("OVEN", "RefCOCO-Matching")
    paths = [f"{task}/{n}.png" for n in (row, 3, 4)]
    captions = [f'"caption {n}"' if captioned else "" for n in (row, 3, 4)]
    if task == "RefCOCO-Matching" and row == 1:
        paths, captions = [*paths, paths[1]], [*captions, captions[1]]
    names: list[Name] = []
    for path, caption in zip(paths, captions, strict=True):
        save(folder / path, 9)
        said = f"\n{about['target']} {caption}\n" if captioned else f"\n{about['target']}"
        shown = Shown(said, about["target"], caption, (f"image-tasks/{path}",))
        names.append(expected.add(f"{path}:{caption[1:-1]}", shown))
    assert expected.pools is not None
    expected.pools.append(names)
    expected.labels.append({names[0]: 1.0})
    inst = f"{MARK}\n{about['target']}"
    return {**fields, "tgt_inst": inst, "tgt_text": captions, "tgt_img_path": paths}
