"""The rehearsal without data against real layers and real steps of the micro model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.predict import SHALLOW, _static_parts, quick_peak, stage_plan, step_work
from rime_pl.preflight.plan.rehearsal import rehearse, static_memory
from rime_pl.preflight.plan.shapes import RolloutShape, SideShape, StepShape, side_shape
from rime_pl.preflight.plan.skeleton import Skeleton, build_skeleton, read_architecture, state_tensors
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.processing import RimeProcessor
from rime_pl.scaling.micro_batches import MicroBatches
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import micro_config, refine_rl_module

STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}


def skeleton_of(base: Path, processor: RimeProcessor, **changes: object) -> Skeleton:
    config = micro_config(base, **changes)
    return build_skeleton(config, read_architecture(str(base)), len(processor.tokenizer))


def test_counts_and_bytes_are_those_of_the_real_model(
    micro_base: Path, processor: RimeProcessor, make_backbone: MakeBackbone
) -> None:
    real = make_backbone()
    layers = linear_4bit_modules(real).values()
    static = static_memory(skeleton_of(micro_base, processor))
    assert static.packed == sum(layer.weight.nbytes for layer in layers)
    scales = [tensor for layer in layers for tensor in state_tensors(layer.weight.quant_state)]
    assert static.packed_state == sum(tensor.nbytes for tensor in scales)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert static.trained == sum(p.numel() for p in trained)
    assert static.lora + static.token_rows >= sum(p.nbytes for p in trained)
    parts = (static.packed, static.vision, static.embedding, static.other, static.lora, static.token_rows)
    buffers = sum(buffer.nbytes for buffer in real.peft.buffers())
    assert sum(parts) == sum(p.nbytes for p in real.parameters()) + buffers
    unpacked = sum(layer.weight.quant_state.shape.numel() for layer in layers)
    others = sum(p.numel() for p in real.parameters()) - sum(layer.weight.numel() for layer in layers)
    assert static.parameters == unpacked + others


def real_peak(
    stage: str, make_backbone: MakeBackbone, batch: Batch, checkpointing: bool, **settings: bool | int
) -> int:
    """The same ruler on a real step; the batch's patches count from where the step first touches them."""
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    module = STAGES[stage](backbone.config, **settings)  # type: ignore[arg-type]
    module.backbone = backbone
    module.log_losses = lambda *args, **kwargs: None  # type: ignore[method-assign]
    known = [*backbone.parameters(), *backbone.buffers()]
    for layer in linear_4bit_modules(backbone).values():
        known += state_tensors(layer.weight.quant_state)
    with LiveBytes(known) as live:
        module.backward(module.training_step(batch, 0))  # type: ignore[arg-type]
    return live.peak.bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_peak_is_that_of_a_real_step(
    stage: str,
    checkpointing: bool,
    micro_base: Path,
    processor: RimeProcessor,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    skeleton = skeleton_of(micro_base, processor, gradient_checkpointing=checkpointing)
    wrong = len(batch) if stage == "cma" else 0
    step = rehearse(skeleton, StepShape(stage, side_shape(batch.query), side_shape(batch.target), wrong))
    expected = real_peak(stage, make_backbone, batch, checkpointing)
    assert step.peak.bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("reuse_vision", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_peak_with_the_gradient_cache_is_that_of_a_real_step(
    stage: str,
    reuse_vision: bool,
    micro_base: Path,
    processor: RimeProcessor,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    skeleton = skeleton_of(micro_base, processor)
    sides = side_shape(batch.query), side_shape(batch.target)
    wrong = len(batch) if stage == "cma" else 0
    step = rehearse(skeleton, StepShape(stage, *sides, wrong, MicroBatches(1, None, reuse_vision)))
    settings = {"micro_batch_size": 1, "reuse_vision": reuse_vision}
    expected = real_peak(stage, make_backbone, batch, False, **settings)
    assert step.peak.bytes == pytest.approx(expected, rel=0.1)  # rows differ; the rehearsal has one length
    assert step.peak.bytes < 0.7 * rehearse(skeleton, StepShape(stage, *sides, wrong)).peak.bytes


@pytest.mark.parametrize("items_per_pass", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_refine_rl_is_that_of_a_real_step(
    checkpointing: bool,
    items_per_pass: int | None,
    micro_base: Path,
    processor: RimeProcessor,
    make_backbone: MakeBackbone,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = 12
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    module = refine_rl_module(
        backbone, num_generations=4, max_new_tokens=budget, items_per_pass=items_per_pass, num_anchors=0
    )
    # every rewrite takes its whole budget, as in the rehearsal
    monkeypatch.setattr(
        "rime_pl.generation.rollouts.sample_tokens", lambda logprobs, numbers: numbers.long() + 300
    )
    monkeypatch.setattr(module, "step", lambda *_: None)  # the optimiser's states are counted elsewhere
    known = [*backbone.parameters(), *backbone.buffers(), *module.reference.values()]
    for layer in linear_4bit_modules(backbone).values():
        known += state_tensors(layer.weight.quant_state)
    with LiveBytes(known) as live:
        module.training_step(batch, 0)
    drawn = RolloutShape(4, budget, items_per_pass)
    shape = StepShape("refine_rl", side_shape(batch.query), side_shape(batch.target), rollouts=drawn)
    step = rehearse(skeleton_of(micro_base, processor, gradient_checkpointing=checkpointing), shape)
    assert step.peak.bytes == pytest.approx(live.peak.bytes, rel=0.1)


def test_a_batch_8_times_as_large_costs_its_inputs_and_embeddings(
    micro_base: Path, processor: RimeProcessor
) -> None:
    skeleton = skeleton_of(micro_base, processor)

    def parts(rows: int) -> dict[str, int]:
        side = SideShape(rows, 60, 12, 10 * rows)
        step = StepShape("sft", side, side, cached=MicroBatches(None, 16 * 72))
        return rehearse(skeleton, step).peak.parts

    small, large = parts(32), parts(256)
    for part in ("inputs", "embeddings"):
        # of a micro-batch the rows are there twice
        assert 4 * small[part] < large.pop(part) <= 8 * small.pop(part)
    assert sum(large.values()) == pytest.approx(sum(small.values()), rel=0.01)


def test_parts_are_what_the_peak_is_made_of(micro_base: Path, processor: RimeProcessor) -> None:
    skeleton = skeleton_of(micro_base, processor)
    side = SideShape(4, 60, 12, 40, 4, 4 * 16)
    shapes = [StepShape(stage, side, side, 4 * (stage == "cma")) for stage in ("sft", "cma")]
    sft, cma = (stage_plan(skeleton, shape) for shape in shapes)
    assert all(size >= 0 for plan in (sft, cma) for size in plan.parts.values())
    static = set(_static_parts(static_memory(skeleton)))
    steps = [sum(size for part, size in plan.parts.items() if part not in static) for plan in (sft, cma)]
    assert steps[1] > 1.3 * steps[0], "wrong rewrites are a third forward"
    assert sft.parts["optimiser states"] == 2 * 4 * static_memory(skeleton).trained
    assert sft.largest <= sft.peak and "aten" in sft.largest_operation


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(
    micro_base: Path, processor: RimeProcessor
) -> None:
    def activations(rows: int, checkpointing: bool = False) -> int:
        skeleton = skeleton_of(micro_base, processor, gradient_checkpointing=checkpointing)
        side = SideShape(rows, 60, 12, 10 * rows)
        return rehearse(skeleton, StepShape("sft", side, side)).peak.parts["activations"]

    # from 8 rows on the peak is always at the same place of the step
    eight, sixteen, more = activations(8), activations(16), activations(32)
    # twice the batch, twice the activations, above what does not depend on it (the copied embedding table)
    assert more - sixteen == pytest.approx(2 * (sixteen - eight), rel=0.02)
    assert activations(8, checkpointing=True) < 0.6 * eight


def test_two_shallow_models_tell_the_peak_of_a_deep_one(micro_base: Path, processor: RimeProcessor) -> None:
    architecture = read_architecture(str(micro_base))
    architecture.text_config.num_hidden_layers = 4 * SHALLOW
    if architecture.text_config.__dict__.get("layer_types"):
        architecture.text_config.layer_types = architecture.text_config.layer_types[:1] * 4 * SHALLOW
    side = SideShape(4, 60, 12, 40, 4, 4 * 16)
    step = StepShape("sft", side, side)
    for checkpointing in (False, True):
        config = micro_config(micro_base, gradient_checkpointing=checkpointing)
        full = stage_plan(build_skeleton(config, architecture), step).peak
        assert quick_peak(config, architecture, step) == pytest.approx(full, rel=0.03)


def test_the_2b_shape_known_by_heart_is_that_of_gpu_check() -> None:
    from rime_pl.backbone.config import BackboneConfig
    from rime_pl.miniature.random_checkpoint import SHAPES, Qwen2VLForConditionalGeneration, model_config
    from rime_pl.miniature.tiny import train_tokenizer

    name = "Qwen/Qwen2-VL-2B-Instruct"
    skeleton = build_skeleton(BackboneConfig(name), read_architecture(name))
    with torch.device("meta"):
        tokenizer = train_tokenizer(["a"], 300)
        other = Qwen2VLForConditionalGeneration(model_config(SHAPES["2b"], tokenizer))
    static = static_memory(skeleton)
    assert static.parameters - static.trained == sum(p.numel() for p in other.parameters())
    work = step_work(skeleton, StepShape("sft", SideShape(1, 10, 5, 5), SideShape(1, 10, 5, 5)))
    assert work.decoder == sum(p.numel() for p in other.model.language_model.layers.parameters())
    assert work.tokens == 30 and not work.tower_backward


def test_a_checkpoint_that_is_not_here_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"name_or_path: no config.json for .* Give a folder"):
        read_architecture(str(tmp_path / "nothing"))
