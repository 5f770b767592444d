"""What searches for the page: an index and a gallery in memory find the same, and show pictures by row."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rime_pl.demo.searcher import (
    FRAME_MS,
    FRAMES,
    LOOPS,
    SHORT,
    SIDE,
    GallerySearcher,
    IndexSearcher,
    Pictures,
    worth,
)
from rime_pl.demo.uploads import to_query
from rime_pl.errors import RimeError
from rime_pl.inference.corpus_targets import scan_corpus
from rime_pl.inference.index import update_index
from rime_pl.inference.index_folder import Facts
from rime_pl.inference.indexed_media import CorpusTargets
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.search import open_index
from rime_pl.types import MODE_PAIRS, Clip, Item
from tests.demo.conftest import SCRIPT


@pytest.mark.parametrize("with_picture", [False, True])
def test_a_gallery_in_memory_finds_what_an_index_finds(
    with_picture: bool, index_searcher: IndexSearcher, loaded: Retriever, pictures: list[Item]
) -> None:
    query = Item("a red ring", pictures[2].media if with_picture else ())
    items = [Item(f"a red ring {SCRIPT}"), *(Item("", item.media) for item in pictures)]
    loaded.index(items, instruction="Find the picture.")
    gallery = GallerySearcher(loaded, "memory")
    assert gallery.about == "7 items of memory" and index_searcher.about == "7 items of photos"
    ours, theirs = gallery.search(query, 4), index_searcher.search(query, 4)
    assert ours.rewrite == theirs.rewrite and ours.adaptive == theirs.adaptive
    for mine, other in zip(ours.columns, theirs.columns, strict=True):
        assert mine.pair == other.pair and len(mine.results) == 4
        for one, same in zip(mine.results, other.results, strict=True):
            assert one.score == pytest.approx(same.score, abs=1e-5)
            assert (one.text, one.rewrite, one.pictured) == (same.text, same.rewrite, same.pictured)
            assert one.pictured == (one.text == "")


def test_each_column_is_a_search_in_its_modes(index_searcher: IndexSearcher) -> None:
    answer = index_searcher.search(Item("a red ring"), 7)
    assert [column.pair for column in answer.columns] == list(MODE_PAIRS)
    for column in answer.columns:
        asked, target = (SHORT[name] for name in column.pair.split("-"))
        found = index_searcher.index.search("a red ring", asked, target, 7)
        assert [one.id for one in column.results] == [hit.place for hit in found.hits]


def test_words_that_training_did_not_have_are_told(
    index_searcher: IndexSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_searcher.index.retriever, "unknown_words", lambda text: text.split()[1:])
    assert index_searcher.search(Item("a quokka"), 2).adaptive.endswith(
        "In no training text: quokka. The model may not know what this means."
    )


def test_an_index_that_was_built_again_is_not_searched(
    index_searcher: IndexSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_searcher.index, "_state", [])
    with pytest.raises(RimeError, match="was changed since it was opened"):
        index_searcher.search(Item("a red ring"), 2)
    assert all(index_searcher.picture(row) is None for row in range(7)), "rows are of other items by now"


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_small_picture_of_each_row_and_that_of_a_clip_moves(count: int) -> None:
    grey = np.linspace(0, 255, count).astype(int).tolist()
    frames = tuple(Image.new("RGB", (600, 400), (level, 0, 0)) for level in grey)
    clip = Clip(frames, tuple(map(float, range(count))))
    shown = Pictures([Item("", (frames[-1],)), Item("", (clip,)), Item("words"), Path("/none.png")])
    num_frames = min(count, FRAMES)
    wanted = [grey[number] for number in np.linspace(0, count - 1, num_frames).round().astype(int)]
    for row, levels in ((0, grey[-1:]), (1, wanted)):
        data = shown.picture(row)
        assert data is not None and data is shown.picture(row)  # opened once
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "WEBP" and picture.size == (SIDE, SIDE * 2 // 3)
        assert getattr(picture, "n_frames", 1) == len(levels)
        for number, level in enumerate(levels):
            picture.seek(number)
            red, _, _ = pixel = picture.convert("RGB").getpixel((SIDE // 2, SIDE // 3))
            assert abs(red - level) < 6 and max(pixel[1:]) < 6
        if len(levels) > 1:
            picture.load()
            assert picture.info["loop"] == LOOPS and picture.info["duration"] == FRAME_MS
            assert len(levels) * LOOPS * FRAME_MS < 5000, "what moves for longer needs a button to stop it"
    assert [shown.picture(row) for row in (2, 3, 4, -1)] == [None] * 4


def test_several_media_of_an_item_are_shown_side_by_side() -> None:
    """Two pictures and a clip: the clip by its first frame."""
    media = [Image.new("RGB", (300, 300), colour) for colour in ("red", "lime", "blue", "white")]
    clip = Clip((media[2], media[3]), (0.0, 1.0))
    data = Pictures([Item("", (media[0], media[1], clip))]).picture(0)
    assert data is not None
    picture = Image.open(io.BytesIO(data))
    row = picture.convert("RGB")
    assert getattr(picture, "n_frames", 1) == 1 and row.size == (SIDE, SIDE // 3 - 4)
    seen = [row.getpixel((SIDE // 6 + SIDE // 3 * number, SIDE // 6)) for number in range(3)]
    assert [pixel.index(max(pixel)) for pixel in seen] == [0, 1, 2]


STRIP, SQUARE, ICON = (800, 4), (300, 300), (9, 9)


@pytest.mark.parametrize(
    ("sizes", "height", "more"),
    [([STRIP, SQUARE], SIDE // 2 - 4, 0), ([STRIP] * 2, 1, 0), ([STRIP] * 4, 1, 0), ([ICON] * 6, 9, 2)],
)
def test_strips_icons_and_many_media_are_shown(sizes: list[tuple[int, int]], height: int, more: int) -> None:
    """A strip must not vanish, an icon must not grow, and what there is no room for is counted."""
    data = Pictures([Item("", tuple(Image.new("RGB", size, "black") for size in sizes))]).picture(0)
    assert data is not None
    row = Image.open(io.BytesIO(data)).convert("L")
    assert row.width == SIDE and (row.height > height) == bool(more)
    shown = len(sizes) - more
    parts = [(n * SIDE // shown, 0, (n + 1) * SIDE // shown, height) for n in range(shown)]
    if more:
        parts.append((0, height, SIDE, row.height))
    assert all(row.crop(part).getextrema()[0] < 60 for part in parts)


@pytest.mark.parametrize("kind", ["index", "gallery"])
def test_the_time_of_the_query_and_that_of_the_comparison_are_told_apart(
    kind: str,
    index_searcher: IndexSearcher,
    loaded: Retriever,
    pictures: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searcher: IndexSearcher | GallerySearcher = index_searcher
    if kind == "gallery":
        loaded.index(pictures, instruction="")
        searcher = GallerySearcher(loaded, "memory")
    encode = Retriever.encode_full

    def hour(self: Retriever, *args: Any, **kwargs: Any) -> Any:
        return replace(encode(self, *args, **kwargs), seconds=3600.0)

    monkeypatch.setattr(Retriever, "encode_full", hour)
    for column in searcher.search(Item("a red ring"), 2).columns:
        assert column.encode_ms == 3_600_000 and 0 < column.search_ms < 60_000


def test_one_item_alone_needs_no_rewrite(index_searcher: IndexSearcher) -> None:
    assert "one item only" in worth(index_searcher.index.retriever, [0.5])


def test_a_clip_of_huge_frames_is_refused_after_the_first(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "upload"), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 4096, 2304, "yuvj420p"
        frame = av.VideoFrame(4096, 2304, "yuvj420p")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(RimeError, match=r"big\.mkv must have frames of at most 9,000,000 pixels"):
        to_query("", tmp_path / "upload", "big.mkv")


def test_what_is_no_query_is_refused() -> None:
    with pytest.raises(RimeError, match="Type some words"):
        to_query(" ")


def test_items_of_a_corpus_are_named_by_what_they_show(
    loaded: Retriever, scenes_corpus: Path, tmp_path: Path
) -> None:
    scan = scan_corpus(scenes_corpus, ["test"])
    update_index(
        tmp_path / "index",
        scan,
        CorpusTargets(scenes_corpus),
        loaded,
        Facts(loaded.name, loaded.dimension, ["discriminative"], "Find the picture."),
    )
    searcher = IndexSearcher(open_index(tmp_path / "index", loaded), "scenes")
    results = searcher.search(Item("a red ring"), 5).columns[0].results
    for one in results:
        item = searcher.index[one.id]
        assert one.name == item.content_id and one.pictured == bool(item.media) and one.text == item.text
        assert ".tar" not in one.name
    assert len(results) == 5 and any(one.pictured for one in results)
    names = [hit.name for hit in searcher.index.search("a red ring", instruction="", top_k=5).hits]
    assert not any(".tar" in name for name in names)
