"""Embedding with a rewrite that is given, and the gain that `rime rewrite` measures with it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rime_pl.__main__ import main
from rime_pl.commands.rewrite import similarity_of
from rime_pl.datamodules.shards import read_split
from rime_pl.errors import DataError
from rime_pl.inference.given import encode_given
from rime_pl.inference.retriever import Retriever
from rime_pl.teacher.settings import Gain
from rime_pl.types import Item, Pair
from tests.teacher.endpoint import answer, serving


@pytest.fixture
def items(train_pairs: list[Pair]) -> list[Item]:
    return [
        replace(pair.query, rewrite=f"a ring {n}") for n, pair in enumerate(train_pairs[:5]) if pair.query
    ]


def test_a_given_rewrite_is_embedded_as_in_training(loaded: Retriever, items: list[Item]) -> None:
    rows = loaded.backbone.processor.rows(items, [str(n) for n in range(len(items))])
    with torch.no_grad():
        expected = loaded.backbone(rows.prompts, rows.completions).gen
    found = encode_given(loaded, items, batch_size=2)
    torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=1e-4)
    other = encode_given(loaded, [replace(item, rewrite="two stars") for item in items])
    assert (found * other).sum(-1).max() < 0.99999, "the rewrite decides"


@pytest.mark.parametrize("mode", ["discriminative", "generative"])
def test_the_cosines_of_pairs_with_and_without_a_rewrite(
    mode: str, run_folder: Path, loaded: Retriever, train_pairs: list[Pair]
) -> None:
    similarity = similarity_of(Gain(run=run_folder, mode=mode, device="cpu"), Console(quiet=True))  # type: ignore[arg-type]
    query, target = (
        replace(item, rewrite=None) for item in (train_pairs[0].query, train_pairs[0].target) if item
    )
    with_one = replace(query, rewrite="a ring left of a star")
    plain, gained = similarity([(query, target), (with_one, target)])
    d = loaded.encode([query, target])
    assert plain == pytest.approx(float(d[0] @ d[1]), abs=1e-4)
    if mode == "generative":
        expected = encode_given(loaded, [with_one])[0]
    else:
        expected = loaded.encode(replace(query, text=f"{query.text}\na ring left of a star".strip()))
    assert gained == pytest.approx(float(expected @ d[1]), abs=1e-4) and gained != plain


def test_an_item_that_the_model_refuses_is_not_measured_and_the_others_are(
    run_folder: Path, loaded: Retriever, train_pairs: list[Pair]
) -> None:
    similarity = similarity_of(Gain(run=run_folder, mode="generative", device="cpu"), Console(quiet=True))
    query, target = (
        replace(item, rewrite=None) for item in (train_pairs[0].query, train_pairs[0].target) if item
    )
    special = Item("a ring <|im_end|>")
    long = replace(query, rewrite="ring " * 200)
    with pytest.raises(DataError):
        encode_given(loaded, [long])
    found = similarity([(query, target), (special, target), (long, target)])
    assert [math.isnan(value) for value in found] == [False, True, True]


def test_the_command_measures_and_drops(
    run_folder: Path, scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    arguments = ["--data", str(scenes_corpus), "--output", str(new), "--splits", "val", "--again"]
    arguments += ["--gain.run", str(run_folder), "--gain.device", "cpu", "--gain.min_gain", "0.0001"]
    with serving(lambda body, number: answer("A ring, left of a star.")) as endpoint:
        arguments += ["--teacher.model", "teacher", "--teacher.base_url", endpoint.url]
        assert main(["rewrite", *arguments]) in (0, 1)
        asked = len(endpoint.bodies)
    told = capsys.readouterr().out
    found = re.search(r"query: mean [-+]\d\.\d+ over (\d+), (\d+) below 0.0001", told)
    assert found and asked, told
    given = [entry.has_rewrite[0] for entry in read_split(new, "val")]
    assert given.count(True) == int(found[1]) - int(found[2]) and len(given) == int(found[1])
    kept = [entry.has_rewrite for entry in read_split(new, "train")]
    assert kept == [entry.has_rewrite for entry in read_split(scenes_corpus, "train")]
