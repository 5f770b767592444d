"""Clips and pages in a corpus: what is written comes back, and what is malformed is named."""

from __future__ import annotations

import json
import math
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colour_corpus import make_splits, write
from PIL import Image

from rime_pl.datamodules.shard_writer import write_index
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Clip, Item, Page, Pair, frames_of


def smooth(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """A picture that JPEG hardly changes."""
    corners = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


CLIP = Clip(tuple(smooth(number) for number in range(6)), (0.0, 0.5, 1.0, 1.5, 2.0, 3.25))
PAGE = Page(smooth(9).convert("L"))
MEDIA = (smooth(7), CLIP, PAGE, replace(CLIP, frames=CLIP.frames[::-1]))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    splits: dict[str, list[Pair | None]] = dict(make_splits())
    first = splits["train"][0]
    assert first is not None
    rich = replace(first, query=Item("What moves?", MEDIA, "q"), target=replace(first.target, media=(CLIP,)))
    splits["train"][0] = rich
    return write(tmp_path / "corpus", splits)


def test_they_come_back_in_their_order(corpus: Path) -> None:
    pair = ShardReader(read_split(corpus, "train")).read(0)
    assert pair.query is not None
    assert [type(one) for one in pair.query.media] == [Image.Image, Clip, Page, Clip]
    for mine, theirs in zip((*pair.query.media, *pair.target.media), (*MEDIA, CLIP), strict=True):
        for frame, written in zip(frames_of(mine), frames_of(theirs), strict=True):
            assert frame.mode == "RGB" and frame.size == written.size
            assert np.abs(np.asarray(frame, int) - np.asarray(written.convert("RGB"), int)).max() <= 12
        if isinstance(mine, Clip):
            assert mine.times == CLIP.times


def test_frames_are_jpeg_and_pages_grey_png(corpus: Path) -> None:
    (shard, *_) = sorted((corpus / "train").glob("*.tar"))
    kinds = {}
    with tarfile.open(shard) as tar:
        for info in tar.getmembers()[:18]:
            file = tar.extractfile(info)
            if file is not None and not info.name.endswith("json"):
                opened = Image.open(BytesIO(file.read()))
                kinds[info.name.partition(".")[2]] = opened.format, opened.mode
    assert kinds["q0.png"] == ("PNG", "RGB") and kinds["q2.png"] == ("PNG", "L")
    assert {kinds[f"q1.{number:03d}.jpg"] for number in range(6)} == {("JPEG", "RGB")}


def test_of_many_frames_some_are_decoded(corpus: Path) -> None:
    reader = ShardReader(read_split(corpus, "train"), max_frames=3)
    opened: list[str] = []
    image = reader._image
    reader._image = lambda entry, field, name: opened.append(name) or image(entry, field, name)  # type: ignore[func-returns-value,method-assign]
    pair = reader.read(0, "target")
    (clip,) = pair.target.media
    assert isinstance(clip, Clip) and clip.times == (0.0, 1.0, 3.25)
    assert opened == ["t0.000.jpg", "t0.002.jpg", "t0.005.jpg"]


def test_a_processor_reads_them(corpus: Path, processor: RimeProcessor) -> None:
    pair = ShardReader(read_split(corpus, "train"), max_frames=processor.prompt.frame_limit).read(0)
    checked, cut = processor.check(pair)
    batch = processor.training_batch([checked])
    assert batch.query.prompts.num_media.tolist() == [4] and not cut
    assert batch.query.prompts.seconds is not None
    assert batch.query.prompts.seconds.tolist() == pytest.approx([0, 1.3, 0, 1.3])


def changed(corpus: Path, change: Callable[[dict[str, Any]], None]) -> ShardReader:
    """The corpus with another JSON of its first sample, of the same length."""
    entries = read_split(corpus, "train")
    start, size = entries[0].members["json"]
    data = bytearray(entries[0].shard.read_bytes())
    sample = json.loads(data[start : start + size])
    change(sample["query"])
    text = json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= size
    data[start : start + size] = text.ljust(size)
    entries[0].shard.write_bytes(data)
    return ShardReader(entries)


@pytest.mark.parametrize(
    ("medium", "says"),
    [
        ({"kind": "film"}, "must hold names of pictures, and objects of the kind 'page' or 'clip'"),
        ({"kind": "page"}, "member None is not in the tar"),
        ({"kind": "page", "file": "../x.png"}, r"member '../x.png' is not in the tar"),
        ({"kind": "clip", "frames": [], "times": []}, "a clip must have 'frames' and the 'times' of each"),
        ({"kind": "clip", "frames": ["q0.png"]}, "a clip must have 'frames' and the 'times' of each"),
        ({"kind": "clip", "frames": ["q0.png"], "times": ["0"]}, "a clip must have 'frames' and the 'times'"),
        (
            {"kind": "clip", "frames": ["q0.png"], "times": [0, 1]},
            "a clip must have 'frames' and the 'times'",
        ),
        ({"kind": "clip", "frames": ["q9.jpg"], "times": [0]}, "member 'q9.jpg' is not in the tar"),
        ({"kind": "clip", "frames": ["q0.png", "q0.png"], "times": [1, 1]}, "rising from 0 or later"),
        ({"kind": "clip", "frames": ["q0.png"], "times": [10**309]}, "a clip must have 'frames' and the"),
        ({"kind": "clip", "frames": ["q0.png"], "times": [-1]}, "rising from 0 or later"),
        (None, "member None is not in the tar"),
    ],
)
def test_a_malformed_medium_is_named(corpus: Path, medium: Any, says: str) -> None:
    reader = changed(corpus, lambda side: side.update(media=[medium]))
    with pytest.raises(DataError, match=rf"train-000000.tar/.*field 'query.media'.*{says}"):
        reader.read(0)


def test_a_broken_frame_is_named(corpus: Path) -> None:
    entries = read_split(corpus, "train")
    start, size = entries[0].members["q1.003.jpg"]
    data = bytearray(entries[0].shard.read_bytes())
    data[start : start + size] = random.Random(0).randbytes(size)
    entries[0].shard.write_bytes(data)
    with pytest.raises(DataError, match=r"field 'query.media': 'q1.003.jpg' must be a picture"):
        ShardReader(entries).read(0)


def test_pictures_of_format_1_are_media(corpus: Path) -> None:
    """Shards of other programs call them ``images``; the index can be made anew, and they are read."""
    changed(corpus, lambda side: side.update(images=["q0.png"]) or side.pop("media"))
    write_index(corpus / "train", sorted(tar.name for tar in (corpus / "train").glob("*.tar")))
    pair = ShardReader(read_split(corpus, "train")).read(0)
    assert pair.query is not None and [type(one) for one in pair.query.media] == [Image.Image]


def test_a_side_without_its_media_is_told_by_the_index(corpus: Path) -> None:
    changed(corpus, lambda side: side.pop("media"))
    with pytest.raises(DataError, match=r"field 'query.media' must be a list of pictures, pages and clips"):
        write_index(corpus / "train", sorted(tar.name for tar in (corpus / "train").glob("*.tar")))


@pytest.mark.parametrize("time", [math.nan, math.inf])
def test_a_time_that_is_no_number_of_json_is_named(corpus: Path, time: float) -> None:
    clip = {"kind": "clip", "frames": ["q0.png"], "times": [time]}
    reader = changed(corpus, lambda side: side.update(media=[clip]))
    with pytest.raises(DataError, match=r"train-000000.tar/.*malformed JSON \((NaN|Infinity) is no number"):
        reader.read(0)
