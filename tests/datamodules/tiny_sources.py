"""Public data sets in a few rows, in exactly the schema of their pages, for the tests of the builders."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(number: int, size: tuple[int, int] = (32, 24)) -> Image.Image:
    """A smooth picture; other numbers give other pixels."""
    corners = np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=group
    )
    return path


def mmeb_train(folder: Path, rows: int = 24) -> dict[str, Any]:
    """Six subsets with the shapes of rows that the data set has; WebQA without the picture of its query."""
    inst = "<|image_1|>\nRepresent the given image with the following question: "
    change = "Given an image, find a similar everyday image with the described changes"
    shapes: dict[str, tuple[str, bool, str, bool]] = {
        "A-OKVQA": (inst + "What is number {}?\n", True, "answer {}", False),
        "SUN397": ("<|image_1|>\nIdentify the scene shown in the image\n", True, "field {}", False),
        "MSCOCO_t2i": (
            "Find me an everyday image that matches the given caption: A dog {}.\n",
            False,
            "<|image_1|>\nRepresent the given image.\n",
            True,
        ),
        "CIRR": (
            f"<|image_1|>\n{change}: Make {{}}.\n",
            True,
            "<|image_1|>\nRepresent the given image.\n",
            True,
        ),
        "MSCOCO": (
            '<|image_1|>\nCrop the image to isolate the object labeled as "cycle {}"\n',
            True,
            "<|image_1|>\nRepresent the given cropped image of the object.",
            True,
        ),
        "WebQA": (
            "<|image_1|>\nFind a Wikipedia image that answers this question: Which is {}?\n",
            False,
            "<|image_1|>\nRepresent the given Wikipedia image with related text information: Bird {}\n",
            True,
        ),
    }
    for subset, (query, query_shown, target, target_shown) in shapes.items():
        table = []
        for number in range(rows):
            paths = {}
            for side, shown in (("qry", query_shown), ("pos", target_shown)):
                paths[side] = f"images/{subset}/Train/{side}_{number}.jpg" if shown else ""
                if shown:
                    save(folder / paths[side], number + (100 if side == "pos" else 0))
            table.append(
                {
                    "qry": query.format(number),
                    "qry_image_path": paths["qry"],
                    "pos_text": target.format(number),
                    "pos_image_path": paths["pos"],
                    "neg_text": "",
                    "neg_image_path": "",
                }
            )
        write_parquet(folder / subset / "original-00000-of-00001.parquet", table)
        write_parquet(folder / subset / "train-00000-of-00001.parquet", table)  # the same rows again
    return {"source": folder}


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_bomb(path: Path) -> None:
    """A PNG of some kilobytes whose header claims 40,000 x 40,000 pixels."""
    data = bytearray(encoded(picture(0)))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


#: Shares with which a few rows suffice for three splits.
SHARES = {"val_share": 0.25, "test_share": 0.25}
