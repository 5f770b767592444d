"""A run folder with a real but untrained micro model, so rankings have no meaning."""

import json
import shutil
from pathlib import Path

import pytest

import rime_pl
from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.mllm import Backbone
from rime_pl.commands import search
from rime_pl.datamodules.shards import read_split
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.inference.retriever import CACHE, Retriever
from rime_pl.processing import CONTRACT_FILE
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import TrainingTexts, tasks_to_json, write_words
from rime_pl.types import Item


@pytest.fixture(scope="module")
def run_folder(
    shared_backbone: Backbone, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files that `rime cma fit` leaves: <run>/cma with adapter, manifest and done.json."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    stage, backbone = RunFolder(folder / "cma"), shared_backbone
    texts = TrainingTexts()
    for pair in read_texts(TextReader(read_split(scenes_corpus, "train"))):
        texts.add(pair)
    save_adapter(
        stage.adapter,
        *(backbone.peft, adapter_state(backbone.peft), backbone.processor, backbone.config),
        *(backbone.base_hash, tasks_to_json(texts.tasks())),
    )
    write_words(stage.adapter, texts.words)
    (stage.path / "manifest.json").write_text(json.dumps({"data": str(scenes_corpus)}))
    stage.marker.write_text("{}")
    return folder


@pytest.fixture
def old_run(run_folder: Path, tmp_path: Path) -> Path:
    """The same, as an earlier version left it: without instructions, words and places of the base model."""
    run = Path(shutil.copytree(run_folder / "cma", tmp_path / "old", ignore=lambda *_: {CACHE, "words.txt"}))
    contract = json.loads((run / "adapter" / CONTRACT_FILE).read_text())
    kept = {name: value for name, value in contract.items() if name not in ("tasks", "base_paths")}
    (run / "adapter" / CONTRACT_FILE).write_text(json.dumps(kept))
    return run


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> Retriever:
    return rime_pl.load(run_folder)


@pytest.fixture(scope="module")
def pictures(run_folder: Path) -> list[Item]:
    gallery = search.corpus_pictures(RunFolder(run_folder / "cma"))
    return [gallery[number] for number in range(6)]
