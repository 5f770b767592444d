"""From a checkpoint's config.json to a stage's plan: the bytes of rehearsal.py, put into plan.py's form.

Called by `rime plan` and benchmarks/plan_error.py.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

from rime_pl.backbone.config import BackboneConfig
from rime_pl.modules.base import RimeModule
from rime_pl.preflight.plan.arithmetic import TRAINED_BYTES, StagePlan, Work
from rime_pl.preflight.plan.rehearsal import Static, StepMemory, rehearse, static_memory
from rime_pl.preflight.plan.shapes import RolloutShape, StepShape, side_shape
from rime_pl.preflight.plan.skeleton import Skeleton, build_skeleton
from rime_pl.scaling.micro_batches import MicroBatches
from rime_pl.types import Batch

#: Depths at which a what-if is rehearsed; every part grows linearly from layer to layer.
SHALLOW, DEEPER = 3, 6
#: Parts that FSDP2 splits among processes; the scales of 4-bit weights are no parameters and stay whole.
SHARDED = ("4-bit weights", "LoRA matrices", "optimiser states")
_STEP_PARTS = {
    "inputs": "inputs",
    "keys and values": "keys and values of the rewrites being drawn",
    "rollouts": "drawn rewrites and their log-probabilities",
    "embeddings": "embeddings of the batch and their gradients",
    "loss": "contrastive loss, in row blocks",
    "vision features": "vision features kept for the next passes",
    "activations": "activations",
    "logits": "logits and their loss",
    "vision tower": "vision tower at work",
    "gradients": "gradients",
    "4-bit unpacking": "a 4-bit weight, unpacked",
    "backward": "backward, recomputed activations included",
}


def predict_stage(module: RimeModule, architecture: PretrainedConfig, batch: Batch) -> StagePlan:
    """Predict the memory of one training step of ``module`` on ``batch``, on one process.

    Args:
        module: A stage with its settings, without a backbone. It is not trained and can be used afterwards.
        architecture: The checkpoint's config, from ``read_architecture``.
        batch: What the data module would hand over. Only the shape of the pixel values is read.

    Returns:
        Bytes at the peak, by part, and the largest tensor.
    """
    step: Any = module
    sides = side_shape(batch.query), side_shape(batch.target)
    wrong = round(step.wrong_share * len(batch)) if type(module).__name__ == "CMAModule" else 0
    drawn = None
    if module.may_diverge:
        budget = step.max_new_tokens or module.config.prompt.max_rewrite_tokens
        drawn = RolloutShape(step.num_generations, budget, step.items_per_pass, len(step.sides) == 2)
    micro = None
    if step.gradient_cache and (step.micro_batch_size or step.micro_batch_tokens):
        micro = MicroBatches(step.micro_batch_size, step.micro_batch_tokens, step.reuse_vision)
    stage = "refine_rl" if drawn else "cma" if wrong else "sft"
    shape = StepShape(stage, *sides, wrong, None if drawn else micro, drawn)
    return stage_plan(build_skeleton(module.config, architecture), shape)


def stage_plan(skeleton: Skeleton, shape: StepShape) -> StagePlan:
    """The peak of one stage's step by part.

    Args:
        skeleton: From ``build_skeleton``.
        shape: Of this process's step.
    """
    static, step = static_memory(skeleton), rehearse(skeleton, shape)
    parts = _static_parts(static) | _step_parts(step)
    if shape.stage == "refine_rl":
        parts["the reference's adapter"] = static.trained * TRAINED_BYTES
    operation = f"{step.largest.operation} {'x'.join(map(str, step.largest.shape))}"
    return StagePlan(shape.stage, parts, step.largest.bytes, operation)


def _static_parts(static: Static) -> dict[str, int]:
    return {
        "4-bit weights": static.packed,
        "4-bit scales (double-quantised)": static.packed_state,
        "embedding table": static.embedding,
        "vision tower": static.vision,
        "other weights": static.other,
        "LoRA matrices": static.lora,
        "token rows": static.token_rows,
        "optimiser states": 2 * static.trained * TRAINED_BYTES,
    }


def _step_parts(step: StepMemory) -> dict[str, int]:
    # the optimiser's own turn: all gradients, and as much again where it updates all tensors at once (CUDA)
    if 2 * step.gradients > step.peak.bytes:
        return {"gradients": step.gradients, "optimiser's temporaries": step.gradients}
    rare = ("embeddings", "loss", "vision features", "rollouts", "keys and values")  # not of every step
    return {
        label: step.peak.parts.get(part, 0)
        for part, label in _STEP_PARTS.items()
        if part not in rare or part in step.peak.parts
    }


def quick_peak(config: BackboneConfig, architecture: Any, shape: StepShape) -> int:
    """The peak in bytes from two shallow models, for what-ifs: seconds instead of a minute.

    Args:
        config: Of the backbone.
        architecture: Of the full model; left as it is.
        shape: Of the step.
    """
    depth = architecture.text_config.num_hidden_layers
    if depth <= DEEPER:
        return stage_plan(build_skeleton(config, architecture), shape).peak
    peaks = []
    for layers in (SHALLOW, DEEPER):
        shallow = copy.deepcopy(architecture)
        shallow.text_config.num_hidden_layers = layers
        kinds = getattr(shallow.text_config, "layer_types", None)
        if kinds:
            shallow.text_config.layer_types = kinds[:layers]
        peaks.append(stage_plan(build_skeleton(config, shallow), shape).peak)
    each = (peaks[1] - peaks[0]) / (DEEPER - SHALLOW)
    return round(peaks[0] + each * (depth - SHALLOW))


def step_work(skeleton: Skeleton, shape: StepShape) -> Work:
    """What `step_flops` needs, of one process's step. Of Refine-RL: the passes over what was drawn."""
    model = skeleton.language_model
    text = skeleton.architecture.text_config
    cached, drawn = shape.cached, shape.rollouts
    sides = shape.encoded
    lengths = [side.prompt_tokens + side.completion_tokens for side in sides]
    labels = shape.query.labels + shape.target.labels
    if drawn is not None:
        sides = sides if drawn.both_sides else sides[:1]
        lengths = [side.prompt_tokens + drawn.num_generations * (drawn.max_new_tokens + 2) for side in sides]
        labels = sum(side.rows for side in sides) * drawn.num_generations * (drawn.max_new_tokens + 1)
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
        labels=labels,
        recompute=skeleton.config.gradient_checkpointing,
        # the reference reads what the policy reads, as the cache reads everything once more
        cached=cached is not None or drawn is not None,
        reuse_vision=drawn is not None or (cached is not None and cached.reuse_vision),
        # transformers' enable_input_require_grads hooks the towers that name their patch embedding as input
        tower_backward=bool(model.model.visual.patch_embed._forward_hooks),
    )


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
