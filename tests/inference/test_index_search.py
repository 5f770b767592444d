"""Searches on an index of a real but untrained micro model, so rankings have no meaning."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rime_pl.errors import RimeError
from rime_pl.inference import search
from rime_pl.inference.adaptive import FILE
from rime_pl.inference.collection import scan_texts
from rime_pl.inference.index import update_index
from rime_pl.inference.index_folder import Facts
from rime_pl.inference.indexed_media import Files
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.search import Index, open_index
from rime_pl.types import Item, Mode

WORDS = ("red", "blue", "green", "small", "large", "left", "right")
TEXTS = [f"a {one} {other} ring" for one in WORDS for other in WORDS]


def build(path: Path, model: Retriever, modes: list[Mode], dtype: str = "float32") -> Path:
    lines = path.with_suffix(".txt")
    lines.write_text("\n".join(TEXTS))
    facts = Facts(model.name, model.dimension, modes, "", dtype)
    update_index(path, scan_texts(lines), Files(lines.parent), model, facts, part_size=10)
    return path


@pytest.fixture(scope="module")
def index(loaded: Retriever, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return open_index(build(tmp_path_factory.mktemp("index") / "texts", loaded, list(MODES)), loaded)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target_mode", MODES)
def test_every_mode_pair_finds_what_the_search_in_memory_finds(
    index: Index, loaded: Retriever, mode: Mode, target_mode: Mode
) -> None:
    loaded.index(TEXTS, instruction="")
    for query in ("a red ring", Image.new("RGB", (40, 40), "red"), Item("a", (Image.new("RGB", (40, 40)),))):
        found = index.search(query, mode, target_mode, top_k=5, instruction="Find.")
        wanted = loaded.search(query, mode, 5, target_mode, instruction="Find.")
        assert [hit.place for hit in found.hits] == [hit.place for hit in wanted.hits]
        assert [hit.score for hit in found.hits] == pytest.approx(
            [hit.score for hit in wanted.hits], abs=1e-5
        )
        assert found.rewrite == wanted.rewrite and (found.rewrite is None) == (mode == "discriminative")
        assert found.encode_ms > 0 and found.search_ms > 0
        hit = found.hits[0]
        assert hit.name == f"line {hit.place + 1}" and hit.item.text == TEXTS[hit.place]


def test_many_queries_are_answered_like_each_alone(index: Index) -> None:
    queries = TEXTS[:5]
    for strategy in ("one-pass", "two-step", "adaptive"):
        given: dict[str, Any] = {"top_k": 3, "strategy": strategy, "instruction": ""}
        given |= {"threshold": 0.01} if strategy == "adaptive" else {}
        together = index.search_many(queries, **given)
        for query, found in zip(queries, together, strict=True):
            alone = index.search(query, **given)
            assert [hit.id for hit in found.hits] == [hit.id for hit in alone.hits]
            assert found.rewrite == alone.rewrite


def test_two_steps_rank_the_candidates_again(index: Index) -> None:
    given: dict[str, Any] = {"instruction": "Find.", "top_k": 4}
    first = [hit.place for hit in index.search("a red ring", **given | {"top_k": 6}).hits]
    for mode in MODES:
        whole = index.search("a red ring", mode, "generative", **given | {"top_k": len(TEXTS)})
        wanted = [hit.place for hit in whole.hits if hit.place in first][:4]
        found = index.search("a red ring", mode, "generative", strategy="two-step", candidates=6, **given)
        assert [hit.place for hit in found.hits] == wanted
        assert (found.rewrite is None) == (mode == "discriminative")
    everything = index.search("a red ring", strategy="two-step", candidates=len(TEXTS), **given)
    assert everything.hits == index.search("a red ring", "generative", **given).hits


def test_adaptive_writes_a_rewrite_only_below_the_threshold(index: Index) -> None:
    given: dict[str, Any] = {"instruction": "", "top_k": 3, "strategy": "adaptive"}
    never = index.search_many(TEXTS, threshold=0.0, **given)
    margins = sorted(one.margin for one in never if one.margin is not None)
    assert len(margins) == len(TEXTS) and all(one.rewrite is None for one in never)
    middle = margins[len(margins) // 2]
    some = index.search_many(TEXTS, threshold=middle, **given)
    always = index.search_many(TEXTS, "generative", instruction="", top_k=3)
    for one, without, with_rewrite in zip(some, never, always, strict=True):
        assert one.margin is not None
        wanted = with_rewrite if one.margin < middle else without
        assert [hit.id for hit in one.hits] == [hit.id for hit in wanted.hits]
        assert one.rewrite == wanted.rewrite


@pytest.mark.parametrize("strategy", ["one-pass", "two-step", "adaptive"])
def test_the_time_of_the_query_and_that_of_the_comparison_are_told_apart(
    strategy: Any, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Retriever.encode_modes

    def slow(self: Retriever, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Retriever, "encode_modes", slow)
    threshold = 9.0 if strategy == "adaptive" else None
    found = index.search("a ring", "generative", strategy=strategy, threshold=threshold, instruction="")
    assert found.encode_ms >= 500 > found.search_ms > 0


def test_adaptive_reads_each_query_once(index: Index, loaded: Retriever) -> None:
    given: dict[str, Any] = {"instruction": "", "top_k": 3, "strategy": "adaptive"}
    margins = sorted(one.margin or 0.0 for one in index.search_many(TEXTS, threshold=0.0, **given))
    items, tokens = loaded.meter.items, loaded.meter.rewrite_tokens
    middle = margins[len(margins) // 2]
    some = index.search_many(TEXTS, threshold=middle, **given)
    assert loaded.meter.items - items == len(TEXTS)
    some_tokens = loaded.meter.rewrite_tokens - tokens
    always = index.search_many(TEXTS, threshold=math.inf, **given)
    assert 0 < some_tokens < loaded.meter.rewrite_tokens - tokens - some_tokens
    assert sum(one.rewrite is not None for one in some) == sum(margin < middle for margin in margins) > 0
    assert all(one.rewrite is not None for one in always)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"threshold": 0.1}, "threshold is of an adaptive search"),
        ({"strategy": "adaptive", "threshold": math.nan}, "must be 0 or more, but is nan"),
        ({"strategy": "adaptive", "threshold": -1.0}, "must be 0 or more"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(index: Index, given: dict[str, Any], error: str) -> None:
    with pytest.raises(RimeError, match=error):
        index.search("a ring", instruction="", **given)


def test_an_index_that_was_changed_is_not_searched_further(loaded: Retriever, tmp_path: Path) -> None:
    opened = open_index(build(tmp_path / "texts", loaded, list(MODES)), loaded)
    opened.search("a ring", instruction="")
    facts = Facts(loaded.name, loaded.dimension, list(MODES), "", "float32")
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(TEXTS[3:]))
    update_index(tmp_path / "texts", scan_texts(lines), Files(tmp_path), loaded, facts, part_size=10)
    with pytest.raises(RimeError, match="was changed since it was opened"):
        opened.search("a ring", instruction="")


def test_the_threshold_comes_from_the_run_folder(index: Index, loaded: Retriever) -> None:
    assert loaded.run is not None
    file = loaded.run.path / FILE
    with pytest.raises(RimeError, match=r"rime search --calibrate true"):
        index.search("a ring", strategy="adaptive", instruction="")
    try:
        for values, error in (
            ({"model": loaded.name, "margin": "x", "target_mode": "generative"}, "is damaged"),
            ({"model": loaded.name, "margin": math.nan, "target_mode": "generative"}, "is damaged"),
            ({"model": "other", "margin": 1.0, "target_mode": "generative"}, "must be of this adapter"),
        ):
            file.write_text(json.dumps(values))
            with pytest.raises(RimeError, match=error):
                index.search("a ring", strategy="adaptive", instruction="")
        file.write_text(json.dumps({"model": loaded.name, "margin": None, "target_mode": "discriminative"}))
        with pytest.raises(RimeError, match="target_mode must be 'discriminative'"):
            index.search("a ring", target_mode="generative", strategy="adaptive", instruction="")
        found = index.search("a ring", strategy="adaptive", instruction="")
        assert found.rewrite is not None and found.margin is not None and found.margin < math.inf
        assert found.hits == index.search("a ring", "generative", "discriminative", instruction="").hits
    finally:
        file.unlink()


def test_a_large_index_is_read_part_by_part(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = open_index(index.folder.path, index.retriever)
    for strategy in ("one-pass", "two-step"):
        given: dict[str, Any] = {
            "mode": "generative",
            "instruction": "",
            "strategy": strategy,
            "candidates": 12,
        }
        kept = index.search_many(TEXTS[:3], **given)
        with monkeypatch.context() as patch:
            patch.setattr(search, "KEPT_BYTES", 0)
            for one, other in zip(kept, streamed.search_many(TEXTS[:3], **given), strict=True):
                assert [hit.id for hit in one.hits] == [hit.id for hit in other.hits]
                scores = [hit.score for hit in one.hits]
                assert [hit.score for hit in other.hits] == pytest.approx(scores, abs=1e-6)
            assert not streamed._kept and max(map(len, streamed.blocks("generative"))) == 10


def test_faiss_finds_the_same_as_exact_search_on_a_small_index(index: Index) -> None:
    pytest.importorskip("faiss")
    for number in range(2):  # made, then read from the folder
        other = open_index(index.folder.path, index.retriever, approximate=True)
        for mode in MODES:
            given: dict[str, Any] = {"mode": mode, "instruction": ""}
            exact, found = (one.search(TEXTS[3], **given).hits for one in (index, other))
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in exact], abs=1e-5)
        assert len(list(index.folder.path.glob("*.faiss"))) == 2, number


def test_half_precision_takes_half_the_space_and_scores_alike(index: Index, tmp_path: Path) -> None:
    half = open_index(
        build(tmp_path / "half", index.retriever, ["discriminative"], "float16"), index.retriever
    )
    scores = [
        torch.tensor([hit.score for hit in one.search("a ring", instruction="").hits])
        for one in (index, half)
    ]
    assert torch.allclose(*scores, atol=1e-3)
    with pytest.raises(RimeError, match="must hold vectors of mode 'generative', but holds discriminative"):
        half.search("a ring", target_mode="generative", instruction="")


def test_what_cannot_be_searched_is_refused(index: Index, tmp_path: Path) -> None:
    for changes, error in (
        ({"strategy": "three-step"}, "strategy must be one-pass, two-step, adaptive, but is 'three-step'"),
        ({"mode": "x"}, "mode must be 'discriminative' or 'generative', but is 'x'"),
        ({"target_mode": "x"}, "mode must be 'discriminative' or 'generative', but is 'x'"),
        ({"top_k": 0}, "top_k must be 1 or more, but is 0"),
        ({"strategy": "two-step", "candidates": 0}, "candidates must be 1 or more, but is 0"),
        ({"strategy": "adaptive", "mode": "discriminative"}, "its mode must be 'generative'"),
    ):
        with pytest.raises(RimeError, match=error):
            index.search("a ring", **{"instruction": "", **changes})
    with pytest.raises(RimeError, match="query must be one text"):
        index.search(["a ring"], instruction="")  # type: ignore[arg-type]
    with pytest.raises(RimeError, match="must have a text or a medium"):
        index.search(" ", instruction="")
    with pytest.raises(RimeError, match="--media must be a folder"):
        open_index(index.folder.path, index.retriever, media=tmp_path / "nope")
