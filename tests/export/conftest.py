"""Runs of micro models with random adapters, one of each family, and their exports; to be read only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.config import LANGUAGE_LINEARS
from rime_pl.export.exporting import Order, export
from rime_pl.run_folder import RunFolder
from tests.families import save_family
from tests.micro import build_backbone, micro_config, randomise_adapter

TASKS = {
    "names": {"query": ["Find the cat."], "target": [""], "from_text": True, "to_picture": True},
    "words": {"query": ["Say it."], "target": ["A word."], "from_text": False, "to_picture": False},
}


def make_run(folder: Path, base: Path, seed: int = 1, **settings: Any) -> Path:
    """Write the adapter of a run, with random LoRA matrices and rows."""
    backbone = build_backbone(micro_config(base, lora_targets=LANGUAGE_LINEARS, **settings)).eval()
    randomise_adapter(backbone.peft, seed, scale=0.2)
    adapter = RunFolder(folder).adapter
    save_adapter(
        adapter,
        *(backbone.peft, adapter_state(backbone.peft), backbone.processor, backbone.config),
        *(backbone.base_hash, TASKS),
    )
    return folder


@pytest.fixture(scope="session")
def family_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its base model."""
    found: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in found:
            found[family] = save_family(family, tmp_path_factory.mktemp(family) / "base")
        return found[family]

    return base


@pytest.fixture(scope="session")
def family_run(
    family_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Family -> folder of a run with a 4-bit base model."""
    found: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in found:
            found[family] = make_run(tmp_path_factory.mktemp("runs") / family, family_base(family))
        return found[family]

    return run


@pytest.fixture(scope="session")
def exported(
    family_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(family, kind, settings of the order) -> folder of an export."""
    found: dict[tuple[Any, ...], Path] = {}

    def folder(family: str, to: Any = "sentence-transformers", **settings: Any) -> Path:
        key = (family, to, *sorted(settings.items()))
        if key not in found:
            order = Order(to, family_run(family), tmp_path_factory.mktemp("exports") / "mine")
            export(replace(order, **settings), lambda line: None)
            found[key] = order.output
        return found[key]

    return folder
