"""Check whether a run with these settings can start, and whether the adapter of a run fits its base model.

Called by `rime doctor --config FILE --adapter FOLDER`. For the settings, the model is built without weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rime_pl.backbone.adapters import load_adapter_weights, read_contract
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.precision import check_precision
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor.installation import Check
from rime_pl.preflight.plan.weightless import WeightlessBackbone, read_architecture, read_processor
from rime_pl.processing import RimeProcessor
from rime_pl.run_folder import RunFolder

AGAIN = "Copy the folder again, or train the stage again."


def check_backbone(config: BackboneConfig, sharded: bool) -> list[Check]:
    """Check the checkpoint, the LoRA targets, the storage types and the vision tower."""
    try:
        architecture = read_architecture(config.name_or_path)
    except RimeError as error:
        return [Check("checkpoint", "problem", str(error), "Correct --model.backbone.name_or_path.")]
    found = [Check("checkpoint", "ok", f"{config.name_or_path}: {architecture.model_type}")]
    try:
        backbone = WeightlessBackbone(config, architecture, read_processor(config, architecture))
    except RimeError as error:
        remedy = "Leave model.backbone.lora_targets out. The default is every linear layer of the decoder."
        return [*found, Check("LoRA targets", "problem", str(error), remedy)]
    layers = sum(1 for name, _ in backbone.peft.named_modules() if name.endswith("lora_A.default"))
    found.append(Check("LoRA targets", "ok", f"{layers} linear layers of the language model"))
    return [*found, storage_types(backbone, sharded), vision_tower(backbone)]


def storage_types(backbone: WeightlessBackbone, sharded: bool) -> Check:
    """All frozen tensors need one type, because a cast loses packed bits; trained ones must be float32."""
    name, wanted = "storage types", str(getattr(torch, backbone.config.dtype))
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for parameter in backbone.peft.parameters():
        if parameter.dtype.is_floating_point or sharded:
            found[parameter.requires_grad].add(str(parameter.dtype))
    trained, frozen = (", ".join(sorted(found[trains])) for trains in (True, False))
    if trained != str(torch.float32):
        seen = f"trained tensors are {trained}, so small updates are rounded away"
        return Check(name, "problem", seen, "Attach the adapters in float32 (backbone/adapters.py).")
    if frozen != wanted:
        seen = f"frozen tensors are {frozen}, but model.backbone.dtype is {wanted}"
        remedy = f"Set bnb_4bit_quant_storage and every other type to {wanted} (backbone/quantization.py)."
        return Check(name, "problem" if sharded else "warning", seen, remedy)
    packed = len(linear_4bit_modules(backbone.peft))
    return Check(name, "ok", f"frozen tensors are {wanted}, {packed} packed layers too; trained are float32")


def vision_tower(backbone: WeightlessBackbone) -> Check:
    """A frozen tower needs no backward pass, but gradient checkpointing in transformers can ask for one."""
    tower: Any = backbone.language_model.model.visual
    if not tower.patch_embed._forward_hooks:
        return Check("vision tower", "ok", "frozen, without a backward pass")
    seen = "gradient checkpointing makes the frozen vision tower keep activations and run backward"
    remedy = "Results are right, but it costs time and memory. `rime plan` counts both."
    return Check("vision tower", "warning", seen, remedy)


def precision(trainer_precision: str | int | None, sharded: bool, load_in_4bit: bool) -> Check:
    """Report what the stage's own check of `trainer.precision` says."""
    name, remedy = "trainer.precision", "Set --trainer.precision 32-true."
    try:
        doubt = check_precision(trainer_precision, sharded, load_in_4bit)
    except RimeError as error:
        return Check(name, "problem", str(error), remedy)
    return Check(name, "warning", doubt, remedy) if doubt else Check(name, "ok", "Lightning casts nothing")


def batch(batch_size: int, processes: int) -> Check:
    """Every process needs the same number of pairs, and every query at least one negative."""
    if batch_size < 2 or batch_size % processes:
        seen = f"data.batch_size is {batch_size}, on {processes} process(es)"
        remedy = f"Set --data.batch_size to 2 or more, and to a multiple of {processes}."
        return Check("batch", "problem", seen, remedy)
    each = f"{batch_size // processes} pairs on each of {processes} process(es)"
    return Check("batch", "ok", f"{each}, {batch_size - 1} negatives per query")


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
    prompt = processor.prompt
    tokens = f"{prompt.disc_token} {processor.disc_id}, {prompt.gen_token} {processor.gen_id}"
    return Check("adapter", "ok", f"unchanged since it was saved; fits {config.name_or_path}; ids: {tokens}")
