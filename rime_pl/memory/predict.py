"""From a checkpoint's config.json to a stage's plan: the bytes of rehearsal.py, put into plan.py's form.

Called by `rime plan` and benchmarks/plan_error.py.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from rime_pl.backbone.config import BackboneConfig
from rime_pl.memory.micro_batches import MicroBatches
from rime_pl.memory.plan import StagePlan, Work
from rime_pl.memory.rehearsal import (
    SideShape,
    Static,
    StepMemory,
    rehearse,
    side_shape,
    static_memory,
)
from rime_pl.memory.skeleton import Skeleton, build_skeleton, read_architecture
from rime_pl.types import Batch

#: Depths at which a what-if is rehearsed; every part grows linearly from layer to layer.
SHALLOW, DEEPER = 3, 6
#: Parts that FSDP2 splits among processes; the scales of 4-bit weights are no parameters and stay whole.
SHARDED = ("4-bit weights", "LoRA matrices", "optimiser states")
_STEP_PARTS = {
    "inputs": "inputs",
    "embeddings": "embeddings of the batch and their gradients",
    "loss": "contrastive loss, in row blocks",
    "vision features": "vision features kept for the second pass",
    "activations": "activations",
    "logits": "logits and their loss",
    "vision tower": "vision tower at work",
    "gradients": "gradients",
    "4-bit unpacking": "a 4-bit weight, unpacked",
    "backward": "backward, recomputed activations included",
}


def stage_plan(
    skeleton: Skeleton,
    stage: str,
    query: SideShape,
    target: SideShape,
    wrong_rows: int = 0,
    cached: MicroBatches | None = None,
) -> StagePlan:
    """The peak of one stage's step by part.

    Args:
        skeleton: From ``build_skeleton``.
        stage: "sft" or "cma".
        query, target: Both sides of this process's batch.
        wrong_rows: Queries that CMA encodes once more.
        cached: Micro-batches of the gradient cache.
    """
    static, step = static_memory(skeleton), rehearse(skeleton, stage, query, target, wrong_rows, cached)
    itemsize = getattr(torch, skeleton.config.dtype).itemsize
    parts = _static_parts(static, itemsize) | _step_parts(step)
    operation = f"{step.largest.operation} {'x'.join(map(str, step.largest.shape))}"
    return StagePlan(stage, parts, step.largest.bytes, operation)


def _static_parts(static: Static, itemsize: int) -> dict[str, int]:
    return {
        "4-bit weights": static.packed,
        "4-bit scales (double-quantised)": static.packed_state,
        "embedding table": static.embedding,
        "vision tower": static.vision,
        "other weights": static.other,
        "LoRA matrices": static.lora,
        "token rows": static.token_rows,
        "optimiser states": 2 * static.trained * itemsize,
    }


def _step_parts(step: StepMemory) -> dict[str, int]:
    # the optimiser's own turn: all gradients, and as much again where it updates all tensors at once (CUDA)
    if 2 * step.gradients > step.peak.bytes:
        return {"gradients": step.gradients, "optimiser's temporaries": step.gradients}
    rare = ("embeddings", "loss", "vision features")  # of the gradient cache alone
    return {
        label: step.peak.parts.get(part, 0)
        for part, label in _STEP_PARTS.items()
        if part not in rare or part in step.peak.parts
    }


def step_plan(
    config: BackboneConfig,
    stage: str,
    batch: Batch,
    num_tokens: int | None = None,
    wrong_rows: int = 0,
    cached: MicroBatches | None = None,
) -> StagePlan:
    """The plan of a step on a batch that is there.

    Args:
        config: Of the backbone; only the config.json of its checkpoint is read.
        stage: "sft" or "cma".
        batch: Its sizes count.
        num_tokens: Length of the tokenizer.
        wrong_rows: Queries that CMA encodes once more.
        cached: Micro-batches of the gradient cache.
    """
    skeleton = build_skeleton(config, read_architecture(config.name_or_path), num_tokens)
    sides = side_shape(batch.query), side_shape(batch.target)
    return stage_plan(skeleton, stage, *sides, wrong_rows, cached)


def quick_peak(
    config: BackboneConfig,
    architecture: Any,
    stage: str,
    sides: tuple[SideShape, SideShape],
    wrong_rows: int,
    cached: MicroBatches | None = None,
) -> int:
    """The peak in bytes from two shallow models, for what-ifs: seconds instead of a minute.

    Args:
        config: Of the backbone.
        architecture: Of the full model; left as it is.
        stage: "sft" or "cma".
        sides: Query and target.
        wrong_rows, cached: As in ``stage_plan``.
    """
    depth = architecture.text_config.num_hidden_layers
    if depth <= DEEPER:
        skeleton = build_skeleton(config, architecture)
        return stage_plan(skeleton, stage, *sides, wrong_rows, cached).peak
    peaks = []
    for layers in (SHALLOW, DEEPER):
        shallow = copy.deepcopy(architecture)
        shallow.text_config.num_hidden_layers = layers
        kinds = getattr(shallow.text_config, "layer_types", None)
        if kinds:
            shallow.text_config.layer_types = kinds[:layers]
        peaks.append(stage_plan(build_skeleton(config, shallow), stage, *sides, wrong_rows, cached).peak)
    each = (peaks[1] - peaks[0]) / (DEEPER - SHALLOW)
    return round(peaks[0] + each * (depth - SHALLOW))


def step_work(
    skeleton: Skeleton,
    query: SideShape,
    target: SideShape,
    wrong_rows: int = 0,
    cached: MicroBatches | None = None,
) -> Work:
    """What `step_flops` needs, of one process's step."""
    model = skeleton.language_model
    text = skeleton.architecture.text_config
    sides = [query, target, *([query.share(wrong_rows)] if wrong_rows else [])]
    lengths = [side.prompt_tokens + side.completion_tokens for side in sides]
    layers = model.model.language_model.layers
    return Work(
        decoder=sum(_elements(p) for n, p in layers.named_parameters() if "lora_" not in n),
        vision=sum(p.numel() for p in model.model.visual.parameters()),
        vocabulary=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        tokens=sum(side.rows * length for side, length in zip(sides, lengths, strict=True)),
        row=max(lengths),
        patches=sum(side.patches for side in sides),
        labels=query.labels + target.labels,
        recompute=skeleton.config.gradient_checkpointing,
        cached=cached is not None,
        reuse_vision=cached is not None and cached.reuse_vision,
        # transformers' enable_input_require_grads hooks the towers that name their patch embedding as input
        tower_backward=bool(model.model.visual.patch_embed._forward_hooks),
    )


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
