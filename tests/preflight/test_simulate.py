"""The plan of a step against the bytes and FLOPs of the real step, on the micro model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES, Qwen2VLForConditionalGeneration, model_config
from rime_pl.miniature.tiny import train_tokenizer
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan import predict
from rime_pl.preflight.plan.arithmetic import StagePlan
from rime_pl.preflight.plan.batches import assumed_rows, without_pixels
from rime_pl.preflight.plan.predict import predict_stage
from rime_pl.preflight.plan.simulate import static_numbers
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.preflight.plan.weightless import (
    NoValues,
    WeightlessBackbone,
    read_architecture,
    read_processor,
    state_tensors,
)
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import micro_config, refine_rl_module

STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}
STATIC = ("4-bit weights", "other frozen weights", "trained weights", "optimiser states")
QWEN2_VL_2B = "Qwen/Qwen2-VL-2B-Instruct"


def of_the_step(plan: StagePlan) -> int:
    """Bytes that a step adds to weights and optimiser states."""
    return sum(size for part, size in plan.parts.items() if part not in STATIC)


def weights_of(backbone: Backbone) -> list[Tensor]:
    layers = linear_4bit_modules(backbone).values()
    states = [tensor for layer in layers for tensor in state_tensors(layer.weight.quant_state)]
    return [*backbone.parameters(), *backbone.buffers(), *states]


def count(backbone: Backbone, batch: Batch, step: Callable[[Batch], object]) -> LiveBytes:
    """Run a real step under the ruler of the plan."""
    with LiveBytes(weights_of(backbone)) as live:
        step(batch.to("cpu", copy=True))
    return live


def real_step(stage: str, backbone: Backbone, batch: Batch, **settings: bool | int) -> LiveBytes:
    module = STAGES[stage](backbone.config, **settings)  # type: ignore[arg-type]
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[assignment]
    return count(backbone, batch, lambda inputs: module.backward(module.training_step(inputs, 0)))  # type: ignore[arg-type]


@pytest.fixture
def architecture(micro_base: Path) -> PretrainedConfig:
    return read_architecture(str(micro_base))


def test_counts_and_bytes_are_those_of_the_real_model(
    micro_base: Path, architecture: PretrainedConfig, make_backbone: MakeBackbone
) -> None:
    real, config = make_backbone(), micro_config(micro_base)
    numbers = static_numbers(WeightlessBackbone(config, architecture, read_processor(config, architecture)))
    layers = linear_4bit_modules(real).values()
    assert numbers["weights", "4-bit weights"] == sum(layer.weight.nbytes for layer in layers)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert numbers["weights", "trained weights"] == sum(p.nbytes for p in trained)
    assert numbers["trained",] == sum(p.numel() for p in trained)
    total = sum(size for key, size in numbers.items() if key[0] == "weights")
    assert total == sum(tensor.nbytes for tensor in weights_of(real))
    unpacked = sum(layer.weight.quant_state.shape.numel() - layer.weight.numel() for layer in layers)
    assert numbers["parameters",] == unpacked + sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_peak_and_flops_are_those_of_a_real_step(
    stage: str,
    checkpointing: bool,
    architecture: PretrainedConfig,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    real = real_step(stage, backbone, batch)
    plan = predict_stage(STAGES[stage](backbone.config), architecture, batch)
    assert plan.stage == stage and plan.largest == real.largest.bytes
    assert of_the_step(plan) == pytest.approx(real.peak.bytes, rel=0.005)
    assert plan.flops == real.flops > 0


@pytest.mark.parametrize("reuse_vision", [False, True])
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_peak_with_the_gradient_cache_is_that_of_a_real_step(
    stage: str,
    reuse_vision: bool,
    architecture: PretrainedConfig,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    backbone, settings = make_backbone(), {"micro_batch_size": 1, "reuse_vision": reuse_vision}
    real = real_step(stage, backbone, batch, **settings)
    plan = predict_stage(STAGES[stage](backbone.config, **settings), architecture, batch)
    assert of_the_step(plan) == pytest.approx(real.peak.bytes, rel=0.005)
    assert plan.flops == real.flops
    plain = predict_stage(STAGES[stage](backbone.config), architecture, batch)
    assert of_the_step(plan) < 0.7 * of_the_step(plain)


@pytest.mark.parametrize("items_per_pass", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_refine_rl_is_that_of_a_real_step(
    checkpointing: bool,
    items_per_pass: int | None,
    architecture: PretrainedConfig,
    make_backbone: MakeBackbone,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    settings = {
        "num_generations": 4, "max_new_tokens": 12, "items_per_pass": items_per_pass, "num_anchors": 0
    }  # fmt: skip
    module = refine_rl_module(backbone, **settings)
    # every rewrite takes its whole budget, as in the plan
    monkeypatch.setattr("rime_pl.generation.rollouts.draw", lambda logprobs, numbers: numbers.long() + 300)
    monkeypatch.setattr(module, "step", lambda *_: None)  # the optimiser's states are counted elsewhere
    real = count(backbone, batch, lambda inputs: module.training_step(inputs, 0))
    plan = predict_stage(RefineRLModule(backbone.config, **settings), architecture, batch)
    reference = sum(tensor.nbytes for tensor in module.reference.values())
    assert plan.parts["reference adapter"] == reference
    assert of_the_step(plan) == pytest.approx(real.peak.bytes + reference, rel=0.02)
    assert 0.8 * real.flops < plan.flops < real.flops, "the tokens between are not in it"


class TwoTerms(SFTModule):
    """SFT with a term of its own."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        again = self.encode(batch.query)  # a third forward
        return super().training_step(batch, batch_idx) + again.gen.square().sum()


def test_a_new_loss_term_is_planned_without_an_edit(
    micro_base: Path, architecture: PretrainedConfig, batch: Batch
) -> None:
    config = micro_config(micro_base)
    plain, more = (predict_stage(stage(config), architecture, batch) for stage in (SFTModule, TwoTerms))
    assert 1.3 * plain.flops < more.flops < 1.7 * plain.flops
    assert 1.3 * of_the_step(plain) < of_the_step(more) < 1.7 * of_the_step(plain)


def test_a_second_plan_is_equal_and_leaves_the_module_alone(
    micro_base: Path, architecture: PretrainedConfig, batch: Batch
) -> None:
    module = CMAModule(micro_config(micro_base))
    assert predict_stage(module, architecture, batch) == predict_stage(module, architecture, batch)
    assert module.backbone is None and "log" not in vars(module)


def test_parts_are_what_the_peak_is_made_of(
    micro_base: Path, architecture: PretrainedConfig, batch: Batch
) -> None:
    plan = predict_stage(SFTModule(micro_config(micro_base)), architecture, batch)
    assert plan.peak == sum(plan.parts.values()) and min(plan.parts.values()) >= 0
    assert plan.parts["optimiser states"] == 2 * 4 * plan.trained
    assert plan.parts["logits"] > 0 < plan.parts["activations"]
    inputs = [tensor for side in (batch.query, batch.target) for tensor in vars(side.prompts).values()]
    assert plan.parts["inputs"] > sum(tensor.nbytes for tensor in inputs)  # completions and contents, too
    assert plan.largest <= plan.peak and "aten" in plan.largest_operation


def words_only(config: BackboneConfig, architecture: PretrainedConfig, rows: int) -> Batch:
    """Rows of equal length without pictures."""
    side = assumed_rows(read_processor(config, architecture), architecture, rows, 0, 10)
    return Batch(side, side, torch.arange(rows), torch.arange(rows), "words")


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(
    micro_base: Path, architecture: PretrainedConfig
) -> None:
    def activations(rows: int, checkpointing: bool = False) -> int:
        config = micro_config(micro_base, gradient_checkpointing=checkpointing)
        words = words_only(config, architecture, rows)
        return predict_stage(SFTModule(config), architecture, words).parts["activations"]

    # from 8 rows on the peak is always at the same place of the step
    eight, sixteen, more = activations(8), activations(16), activations(32)
    # twice the batch, twice the activations, above what does not depend on it (the copied embedding table)
    assert more - sixteen == pytest.approx(2 * (sixteen - eight), rel=0.02)
    assert activations(8, checkpointing=True) < 0.6 * eight


def test_a_large_batch_costs_what_its_rows_keep(
    micro_base: Path, architecture: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = micro_config(micro_base)
    module = SFTModule(config, micro_batch_size=2)
    small, large = (
        predict_stage(module, architecture, words_only(config, architecture, n)) for n in (16, 128)
    )
    assert large.parts["inputs"] == pytest.approx(8 * small.parts["inputs"], rel=0.01)
    rest = [of_the_step(plan) - plan.parts["inputs"] for plan in (small, large)]
    assert rest[1] < 1.5 * rest[0], "embeddings and their gradients alone grow"
    assert large.flops == pytest.approx(8 * small.flops, rel=0.01)
    monkeypatch.setattr(predict, "MORE", 8)  # all 8 passes, nothing extrapolated
    exact = predict_stage(module, architecture, words_only(config, architecture, 16))
    assert small.peak == pytest.approx(exact.peak, rel=0.01)
    assert small.flops == pytest.approx(exact.flops, rel=0.01)


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shallow_models_tell_the_plan_of_a_deep_one(
    stage: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["a"], 300)
    architecture = model_config(SHAPES["micro"], tokenizer)
    architecture.text_config.num_hidden_layers, architecture.vision_config.depth = 8, 7
    architecture.text_config.layer_types = ["full_attention"] * 8
    config = BackboneConfig(QWEN2_VL_2B, dtype="float32", lora_r=4, gradient_checkpointing=checkpointing)
    side = assumed_rows(read_processor(config, architecture), architecture, 3, 16, 10)
    batch = Batch(side, side, torch.arange(3), torch.arange(3), "assumed")
    module = (
        RefineRLModule(config, num_generations=2, max_new_tokens=8)
        if stage == "refine_rl"
        else STAGES[stage](config)
    )
    shallow = predict_stage(module, architecture, batch)
    monkeypatch.setattr(predict, "DEEPER", 8)
    deep = predict_stage(module, architecture, batch)
    assert shallow.peak == pytest.approx(deep.peak, rel=0.03)
    assert shallow.flops == pytest.approx(deep.flops, rel=1e-6)
    assert (shallow.trained, shallow.parameters) == (deep.trained, deep.parameters)
    assert all(shallow.parts[part] == deep.parts[part] for part in STATIC)


def test_the_2b_shape_known_by_heart_is_that_of_gpu_check() -> None:
    config, architecture = BackboneConfig(QWEN2_VL_2B), read_architecture(QWEN2_VL_2B)
    numbers = static_numbers(WeightlessBackbone(config, architecture, read_processor(config, architecture)))
    with torch.device("meta"):
        other = Qwen2VLForConditionalGeneration(model_config(SHAPES["2b"], train_tokenizer(["a"], 300)))
    assert numbers["parameters",] - numbers["trained",] == sum(p.numel() for p in other.parameters())


def test_a_checkpoint_that_is_not_here_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"name_or_path: no config.json for .* Give a folder"):
        read_architecture(str(tmp_path / "nothing"))


def test_a_tensor_without_values_counts_as_zeros() -> None:
    with NoValues():
        empty = torch.empty(4, 3)
    mask = torch.tensor([True, False, True, True])
    assert empty[mask].shape == (3, 3) and empty.masked_select(mask.unsqueeze(1)).shape == (9,)
    assert empty.sum().item() == 0.0 and bool(torch.isfinite(empty).all()) and not torch.isnan(empty).any()
    assert empty.argmax(dim=1).tolist() == [0, 0, 0, 0]
    assert torch.searchsorted(empty, torch.zeros(4, 1)).tolist() == [[0]] * 4
    real: Any = torch.ones(4, 3)
    assert (empty + real).shape == (4, 3) and real.sum() == 12


def test_pixels_of_a_batch_are_shapes(batch: Batch) -> None:
    dropped = without_pixels(batch)
    assert batch.query.prompts.pixel_values is not None and dropped.query.prompts.pixel_values is not None
    assert dropped.query.prompts.pixel_values.is_meta
    assert dropped.query.prompts.pixel_values.shape == batch.query.prompts.pixel_values.shape
