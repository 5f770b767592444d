"""Check that the adapter of a run is whole and fits its base model. Called by `rime doctor --adapter`."""

from __future__ import annotations

import json
from pathlib import Path

from rime_pl.backbone.adapters import load_adapter_weights, read_contract
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor.result import Check
from rime_pl.processing import RimeProcessor
from rime_pl.run_folder import RunFolder

AGAIN = "Copy the folder again, or train the stage again."


def check_adapter(folder: Path, base: str | None = None) -> Check:
    """Load the adapter onto its base model, without 4 bits, by the code that a run uses.

    Args:
        folder: A run, or a folder above it: then its newest finished run.
        base: The base model, if it lies elsewhere now; None takes the one that the adapter names.
    """
    try:
        run = RunFolder(folder)
        adapter = run.adapter if run.adapter.is_dir() else RunFolder.newest(folder).adapter
        contract = read_contract(adapter)
    except (RimeError, json.JSONDecodeError) as error:
        return Check("adapter", "problem", str(error), "Give --adapter the folder of a finished run.")
    try:
        processor = RimeProcessor.from_adapter(adapter)
        config = BackboneConfig(**contract["backbone"] | {"load_in_4bit": False, "prompt": processor.prompt})
        config.name_or_path = base or config.name_or_path
    except (RimeError, KeyError, TypeError) as error:
        return Check("adapter", "problem", f"{adapter}: the processor cannot be read: {error}", AGAIN)
    try:
        backbone = Backbone(config, processor)
    except RimeError as error:
        remedy = "Name the folder of the base model with --config and --model.backbone.name_or_path."
        return Check("adapter", "warning", f"not compared with its base model. {error}", remedy)
    try:
        load_adapter_weights(backbone.peft, adapter, processor, backbone.base_hash)
    except RimeError as error:
        return Check("adapter", "problem", str(error), AGAIN)
    tokens = (
        f"{processor.prompt.disc_token} {processor.disc_id}, {processor.prompt.gen_token} {processor.gen_id}"
    )
    return Check("adapter", "ok", f"unchanged since it was saved; fits {config.name_or_path}; ids: {tokens}")
