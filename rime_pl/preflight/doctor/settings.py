"""Can a run with these settings start? LoRA's targets, storage types, sharding.

Called by `rime doctor --config FILE`. The model is built without weights.
"""

from __future__ import annotations

from typing import Any

import torch

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.precision import check_precision
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor.result import Check, ok, problem, warning
from rime_pl.preflight.plan.weightless import WeightlessBackbone, read_architecture, read_processor


def check_backbone(config: BackboneConfig, sharded: bool) -> list[Check]:
    """LoRA's targets, then types and 4-bit layers of what was built.

    Args:
        config: Of the run.
        sharded: Whether FSDP2 is asked for.
    """
    try:
        architecture = read_architecture(config.name_or_path)
    except RimeError as error:
        return [problem("checkpoint", str(error), "Correct --model.backbone.name_or_path.")]
    found = [ok("checkpoint", f"{config.name_or_path}: {architecture.model_type}")]
    try:
        backbone = WeightlessBackbone(config, architecture, read_processor(config, architecture))
    except RimeError as error:
        remedy = "Leave model.backbone.lora_targets out: the default takes the decoder's linear layers."
        return [*found, problem("LoRA targets", str(error), remedy)]
    layers = sum(1 for name, _ in backbone.peft.named_modules() if name.endswith("lora_A.default"))
    found.append(ok("LoRA targets", f"{layers} linear layers of the language model"))
    return [*found, storage_types(backbone, sharded), image_tower(backbone)]


def storage_types(backbone: WeightlessBackbone, sharded: bool) -> Check:
    """What is frozen has one type, since a cast of packed bytes loses bits; what trains is float32."""
    name = "storage types"
    frozen, trained = (
        {
            str(p.dtype)
            for p in backbone.peft.parameters()
            if p.requires_grad == trains and (p.dtype.is_floating_point or sharded)
        }
        for trains in (False, True)
    )
    packed = linear_4bit_modules(backbone.peft)
    wanted = str(getattr(torch, backbone.config.dtype))
    if trained != {str(torch.float32)}:
        seen = f"what trains is {', '.join(sorted(trained))}: small steps are rounded away"
        return problem(name, seen, "Attach the adapters in float32 (backbone/adapters.py).")
    if frozen != {wanted}:
        level = problem if sharded else warning
        remedy = f"Set bnb_4bit_quant_storage and every other type to {wanted} (backbone/quantization.py)."
        return level(
            name, f"what is frozen is {', '.join(sorted(frozen))}, model.backbone.dtype is {wanted}", remedy
        )
    seen = f"{wanted} in all that is frozen, the {len(packed)} packed layers included; float32 in what trains"
    return ok(name, seen)


def image_tower(backbone: WeightlessBackbone) -> Check:
    """A frozen tower needs no backward; transformers' hook for checkpointing can ask for one."""
    tower: Any = backbone.language_model.model.visual
    if tower.patch_embed._forward_hooks:
        seen = "gradient checkpointing makes the frozen vision tower keep activations and run backward"
        return warning(
            "vision tower", seen, "It costs time and memory (`rime plan` counts both); results are right."
        )
    return ok("vision tower", "frozen, no backward")


def precision(trainer_precision: str | int | None, sharded: bool, load_in_4bit: bool) -> Check:
    """The stage's own check of ``trainer.precision``, as a line of the report."""
    name = "trainer.precision"
    try:
        doubt = check_precision(trainer_precision, sharded, load_in_4bit)
    except RimeError as error:
        return problem(name, str(error), "")
    return warning(name, doubt, "") if doubt else ok(name, "Lightning casts nothing")


def batch(batch_size: int, processes: int) -> Check:
    """Every process gets the same number of pairs, and there is a negative."""
    if batch_size < 2 or batch_size % processes:
        seen = f"data.batch_size={batch_size} for {processes} process(es)"
        return problem("batch", seen, f"Give --data.batch_size a multiple of {processes}, 2 or more.")
    return ok(
        "batch",
        f"{batch_size // processes} pairs on each of {processes}, {batch_size - 1} negatives per query",
    )
