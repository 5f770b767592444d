"""Public data sets in a few rows, in exactly the schema of their pages, for the tests of the builders."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pypdfium2
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


def karpathy(folder: Path, name: str = "coco") -> dict[str, Any]:
    """18 pictures with five captions each, and one with six; all four splits of COCO."""
    splits = ["train", "restval", "val", "test"] if name == "coco" else ["train", "val", "test"]
    images = []
    for number in range(18):
        place = {"filepath": "val2014", "cocoid": 391_000 + number} if name == "coco" else {}
        filename = f"COCO_val2014_{number:012d}.jpg"
        save(folder / "pictures" / place.get("filepath", "") / filename, number)
        sentences = [
            {
                "tokens": ["a", "dog", str(n)],
                "raw": f"A dog {n} at {number}.",
                "imgid": number,
                "sentid": 10 * number + n,
            }
            for n in range(6 if number == 3 else 5)
        ]
        images.append(
            {
                **place,
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": filename,
                "imgid": number,
                "split": splits[number % len(splits)],
                "sentences": sentences,
            }
        )
    source = write_json(folder / f"dataset_{name}.json", {"images": images, "dataset": name})
    return {"source": source, "media": folder / "pictures", "val_share": None, "test_share": None}


def page(number: int, mode: str = "RGB") -> bytes:
    return encoded(picture(number, (40, 56)).convert(mode))


def colpali(folder: Path, **options: Any) -> dict[str, Any]:
    """Two files of training rows and one of test; the fields besides the picture may be null."""

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {
                "image": {"bytes": page(number // 2), "path": None},
                "image_filename": f"images/{number // 2:08x}.jpg",
                "query": f"What is the total of {number}?",
                "answer": f"['{number} tons']",
                "source": "docvqa",
                "options": None,
                "page": "3",
                "model": "gpt-4V",
                "prompt": "",
                "answer_type": None,
            }
            for number in range(first, first + count)
        ]

    write_parquet(folder / "data" / "train-00000-of-00082.parquet", rows(0, 20))
    write_parquet(folder / "data" / "train-00001-of-00082.parquet", rows(20, 12))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows(100, 6))
    return {"source": folder, **options}


def visrag(folder: Path) -> dict[str, Any]:
    """Rows in blocks of one source; some pages are RGBA or palette, and two questions share each page."""
    table = [
        {
            "query": f"Which bar is {number}?",
            "image": {"bytes": page(number // 2, ("RGB", "RGBA", "P")[number // 2 % 3]), "path": "1.png"},
            "source": ("ArxivQA", "PlotQA")[number // 16],
        }
        for number in range(32)
    ]
    write_parquet(folder / "data" / "train-00000-of-00029.parquet", table)
    return {"source": folder}


def _sft_side(text: str, response: str, **media: Any) -> dict[str, Any]:
    said = {"from": "human", "value": f"{text}\n<disc_emb>\n<request>"}
    return {**media, "conversations": [said, {"from": "gpt", "value": response}]}


def _frames(folder: Path, clip: str, count: int) -> list[str]:
    names = [f"llavahound/{clip}/c01_{n:04d}.jpeg" for n in range(1, count + 1)]
    for number, name in enumerate(names):
        save(folder / name, number)
    return names


def ume_sft(folder: Path) -> dict[str, Any]:
    """One list of records of three data sets: questions, clips and pages; texts have blank.jpg."""
    media = folder / "MMEB-train"
    save(media / "images" / "blank.jpg", 0)
    records = []
    for number in range(30):
        save(media / f"images/A-OKVQA/Train/a_{number}.jpg", number)
        blank = {"image": "images/blank.jpg"}
        answer = f"<think>One sees {number}.</think><answer>It is {number}.<gen_emb>"
        if number % 3 == 0:
            ask = "<image>\nRepresent the given image with the following question: What is it?"
            query = _sft_side(ask, answer, image=f"images/A-OKVQA/Train/a_{number}.jpg")
            target = _sft_side(f"<image>\nthing {number}", answer, **blank)
            name = "A-OKVQA"
        elif number % 3 == 1:
            query = _sft_side(f"<image>\nFind the clip {number}.", answer, **blank)
            target = _sft_side("<video>\nUnderstand.", answer, video=_frames(media, f"v_{number}", 5))
            name = "video_caption_300k-v2t"
        else:
            save(media / f"visrag/images/{number}.jpg", number)
            query = _sft_side(f"<image>\nWhich page has {number}?", answer, image=["images/blank.jpg"])
            target = _sft_side("<image>", answer, image=[f"visrag/images/{number}.jpg"])
            name = "visrag"
        records.append({"dataset_name": name, "qry": query, "pos": target})
    return {"source": write_json(folder / "UME-sft-train.json", records), "media": media}


def rime_sft(folder: Path) -> dict[str, Any]:
    """A file for each data set; the response has one of three forms, and the name is the file's."""
    media = folder / "MMEB-train"
    records = []
    for number in range(24):
        save(media / f"images/CIRR/Train/q_{number}.jpg", number)
        save(media / f"images/CIRR/Train/t_{number}.jpg", 100 + number)
        rewrite = f"A car by night {number}."
        form = ("{}", "<rewrite>{}</rewrite>", "<think>It gets dark.</think><answer>{}</answer><gen_emb>")[
            number % 3
        ]
        query = _sft_side(
            f"<image>\nMake it {number}.", form.format(rewrite), image=f"images/CIRR/Train/q_{number}.jpg"
        )
        target = _sft_side("<image>", form.format(rewrite), image=f"images/CIRR/Train/t_{number}.jpg")
        records.append({"qry": query, "pos": target})
    write_json(folder / "RIME-SFT" / "CIRR.json", records[:12])
    write_lines(folder / "RIME-SFT" / "CIRR2.jsonl", records[12:])
    return {"source": folder / "RIME-SFT", "media": media}


def rl(folder: Path, name: str = "UME-rl-train.json") -> dict[str, Any]:
    """Texts and media without responses; no clip is [""], and document rows lack the keys of clips."""
    media = folder / "MMEB-train"
    records: list[dict[str, Any]] = []
    for number in range(24):
        record = {"dataset": "A-OKVQA", "solution": "<embedding>", "qry_text": f"<image>\nWhat is {number}?"}
        save(media / f"images/A-OKVQA/Train/a_{number}.jpg", number)
        record |= {
            "qry_image": f"images/A-OKVQA/Train/a_{number}.jpg",
            "pos_text": f"thing {number}",
            "pos_image": "",
        }
        if number % 3 != 2:
            record |= {"qry_video": [""], "pos_video": [""]}
        if number % 3 == 1:
            clip = _frames(media, f"v_{number}", 10)
            record |= {
                "dataset": "llavahound",
                "qry_image": "",
                "qry_text": "<video>\nWhat?",
                "qry_video": clip,
            }
        records.append(record)
    return {"source": write_json(folder / name, records), "media": media}


def llava_hound(folder: Path, clips: int = 16, **options: Any) -> dict[str, Any]:
    """Folders of 3 to 12 frames, 2 a second; two captions and a question of each clip."""
    for clip in range(clips):
        for number in range(1, 4 + (9 if clip % 2 else 0)):
            save(folder / "train_300k" / f"v_{clip}" / f"c01_{number}.jpeg", 20 * clip + number)

    def line(clip: int, number: int, asked: str, told: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
        return {"id": f"v_{clip}__{number}", "video": f"v_{clip}", "conversations": turns}

    captions = [
        line(clip, number, "What happens?\n<video>", f"A man {clip} walks {number}.")
        for clip in range(clips)
        for number in range(2)
    ]
    questions = [line(clip, 0, f"<video>\nWho is {clip}?", f"man {clip % 5}") for clip in range(clips)]
    write_lines(folder / "sft" / "video_caption_300k.jsonl", captions)
    write_lines(folder / "sft" / "video_240k_caption_15k.jsonl", questions)
    return {"source": folder / "sft", "media": folder / "train_300k", **options}


def write_video(path: Path, frames: int = 12) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_pdf(path: Path, *sizes: tuple[float, float]) -> None:
    document = pypdfium2.PdfDocument.new()
    for width, height in sizes:
        document.new_page(width, height)
    document.save(str(path))


def captions(folder: Path) -> dict[str, Any]:
    """A table of pictures and captions."""
    rows = [{"image": f"{number}.png", "caption": f"thing {number}"} for number in range(16)]
    for number in range(16):
        save(folder / "media" / f"{number}.png", number)
    return {"table": write_lines(folder / "mine.jsonl", rows), "media": folder / "media"}


def videos_and_pages(folder: Path) -> dict[str, Any]:
    """A table of two videos and eight pages of a PDF with their captions."""
    (folder / "media").mkdir(parents=True)
    write_pdf(folder / "media" / "manual.pdf", *((200 + 10 * number, 300) for number in range(8)))
    rows = [{"page": f"manual.pdf#{number}", "caption": f"page {number}"} for number in range(1, 9)]
    for number in range(2):
        write_video(folder / "media" / f"{number}.mp4", 8 + number)
        rows.append({"video": f"{number}.mp4", "caption": f"walk {number}"})
    for number, row in enumerate(rows):
        row["split"] = "train" if number > 3 else ("val", "test")[number % 2]
    return {"table": write_lines(folder / "mine.jsonl", rows), "media": folder / "media", "page_side": 64}
