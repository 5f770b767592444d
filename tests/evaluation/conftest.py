"""A run folder with a real but untrained micro model, so that scores have no meaning."""

from pathlib import Path

import pytest

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.mllm import Backbone
from rime_pl.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(shared_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a real but untrained adapter."""
    stage = RunFolder(tmp_path_factory.mktemp("runs") / "demo" / "cma")
    backbone = shared_backbone
    save_adapter(
        stage.adapter,
        *(backbone.peft, adapter_state(backbone.peft), backbone.processor, backbone.config),
        *(backbone.base_hash, {}),
    )
    (stage.path / "manifest.json").write_text("{}")
    stage.marker.write_text("{}")
    return stage.path
