"""Fixtures: the colour corpus, data modules over it, and corpora of tiny public sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_sources as tiny
from built_corpora import Splits, pairs_of, run
from colour_corpus import PlainProcessor, make_splits, write

from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return write(tmp_path_factory.mktemp("corpus"), make_splits())


MakeData = Callable[..., RimeDataModule]


@pytest.fixture
def make_data(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> MakeData:
    """A data module over the corpus, or over another ``path``; only settings that differ are given."""
    monkeypatch.setattr(RimeProcessor, "from_pretrained", classmethod(lambda *_: PlainProcessor()))

    def make(path: Path = corpus, batch_size: int = 4, **settings: object) -> RimeDataModule:
        return RimeDataModule(str(path), "no-model", PromptConfig(), batch_size, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Splits]:
    """Builds a corpus and returns its pairs: split -> source of a pair and its task -> pair."""

    def build(name: str, options: dict[str, Any], **more: Any) -> Splits:
        run(name, {**tiny.SHARES, "workers": 1, **options, **more}, tmp_path / "corpus")
        return pairs_of(tmp_path / "corpus")

    return build
