"""What the adapter at the end of a run keeps of its training texts, with a real data module."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl.backbone.mllm import Backbone
from rime_pl.callbacks import adapter_checkpoint
from rime_pl.callbacks.adapter_checkpoint import AdapterCheckpoint
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.processing import CONTRACT_FILE
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import WORDS_FILE
from tests.micro import PROMPT


@pytest.fixture
def save(shared_backbone: Backbone, scenes_corpus: Path, micro_base: Path, tmp_path: Path) -> Any:
    """Save the adapter of a run with some settings of its data; give back its folder."""

    def saved(**settings: Any) -> Path:
        data = RimeDataModule(str(scenes_corpus), str(micro_base), PROMPT, batch_size=4, **settings)
        data.setup("fit")
        strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
        trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=data, strategy=strategy)
        module: Any = SimpleNamespace(model=shared_backbone)
        AdapterCheckpoint(str(tmp_path / "run")).write_adapter(trainer, module)
        return RunFolder(tmp_path / "run").adapter

    return saved


def test_instructions_of_the_tasks_that_were_trained(save: Any, micro_base: Path) -> None:
    adapter = save(tasks=["describe", "composed"])
    contract = json.loads((adapter / CONTRACT_FILE).read_text())
    assert contract["tasks"] == {
        "composed": {"query": ["Find the picture."], "target": [""], "from_text": False, "to_picture": True},
        "describe": {"query": ["Find the picture."], "target": [""], "from_text": True, "to_picture": True},
    }
    absolute, relative = contract["base_paths"]
    assert absolute == str(micro_base) and (adapter / relative).resolve() == micro_base


def test_words_of_training_texts_and_captions(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save() / WORDS_FILE
    words = file.read_text().split()
    assert words == sorted(set(words)) and {"find", "picture", "red", "left"} <= set(words)
    file.unlink()
    monkeypatch.setattr(adapter_checkpoint, "MAX_VOCABULARY", 10)
    assert not (save() / WORDS_FILE).exists(), "a base model with a large vocabulary has read other texts"


def test_hidden_rewrites_are_no_training_texts(scenes_corpus: Path, micro_base: Path) -> None:
    data = RimeDataModule(str(scenes_corpus), str(micro_base), PROMPT, batch_size=4, annotated_share=0.5)
    data.setup("fit")
    shown = [bool(pair.query and pair.query.rewrite) for pair in data.training_texts()]
    assert any(shown) and not all(shown)
    assert [bool(pair.target.rewrite) for pair in data.training_texts()] == shown
