"""Fixtures that all tests share: a micro corpus, base model, processor and backbone, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch and huggingface_hub are imported: one thread, because threads that wait for a busy core make
# micro models fifty times slower, and no test may reach for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair
from tests.micro import PROMPT, build_backbone, build_base, build_corpus, micro_config, mixed, read_pairs


@pytest.fixture(scope="session")
def scenes_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the micro corpus; to be read only."""
    return build_corpus(tmp_path_factory.mktemp("micro") / "scenes")


@pytest.fixture(scope="session")
def micro_base(scenes_corpus: Path) -> Path:
    """Folder of the micro base model; to be read only."""
    return build_base(scenes_corpus.parent / "base", scenes_corpus)


@pytest.fixture(scope="session")
def processor(micro_base: Path) -> RimeProcessor:
    return RimeProcessor.from_pretrained(str(micro_base), PROMPT)


@pytest.fixture(scope="session")
def train_pairs(scenes_corpus: Path) -> list[Pair]:
    """16 pairs: by turns a text alone as the query and a picture."""
    return mixed(read_pairs(scenes_corpus, "train"), 16)


@pytest.fixture(scope="session")
def batch(processor: RimeProcessor, train_pairs: list[Pair]) -> Batch:
    """6 pairs whose queries differ in length and in whether they have a picture."""
    return processor.training_batch(train_pairs[:6])


MakeBackbone = Callable[..., Backbone]


@pytest.fixture(scope="session")
def make_backbone(micro_base: Path) -> MakeBackbone:
    """A new micro backbone, 4-bit and float32; settings of BackboneConfig that differ are given."""
    return lambda **changes: build_backbone(micro_config(micro_base, **changes))


@pytest.fixture(scope="session")
def backbone_config(micro_base: Path) -> BackboneConfig:
    return micro_config(micro_base)


@pytest.fixture(scope="session")
def shared_backbone(make_backbone: MakeBackbone) -> Backbone:
    """One for all tests that only read it; whoever changes weights makes their own."""
    return make_backbone().eval()
