"""`rime mine` through the real command line, with a real but untrained micro model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.inference.parts import PARTS
from rime_pl.inference.retriever import Retriever
from rime_pl.types import Pair
from tests.inference.conftest import run_folder  # noqa: F401
from tests.micro import read_pairs
from tests.stages.runs import stage_arguments


@pytest.fixture(scope="module")
def run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return Path(shutil.copytree(run_folder / "cma", tmp_path_factory.mktemp("mine") / "cma"))


def words(run: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    places = ["--run", str(run), "--corpus", str(corpus), "--output", str(output)]
    return ["mine", *places, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def mined(run: Path, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("mined") / "scenes"
    assert main(words(run, scenes_corpus, output, "--relative_margin", "null")) == 0
    return output


def test_what_the_output_holds(mined: Path, run: Path, scenes_corpus: Path) -> None:
    before, after = read_pairs(scenes_corpus, "train"), read_pairs(mined, "train")
    assert [pair.key for pair in before] == [pair.key for pair in after]
    for old, new in zip(before, after, strict=True):
        assert new.query and old.query and new.query.text == old.query.text
        assert len(new.hard_negatives) == 4
