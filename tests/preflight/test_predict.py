"""The plan's simulation against real layers and real steps of the micro model, with the same ruler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan import predict
from rime_pl.preflight.plan.planning import shard
from rime_pl.preflight.plan.predict import (
    DEEPER,
    FEW,
    MORE,
    StagePlan,
    predict_stage,
    simulate,
    static_numbers,
    with_further,
)
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.preflight.plan.weightless import (
    WeightlessBackbone,
    read_architecture,
    read_processor,
    state_tensors,
)
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Item, Pair
from tests.conftest import MakeBackbone
from tests.micro import PROMPT, micro_config, refine_rl_module, rl_settings
from tests.preflight.steps import stage_module

CACHED = MicroBatchSettings(size=1)
KEPT_NOT = MicroBatchSettings(size=1, reuse_vision=False)


def weights(backbone: Backbone) -> list[Tensor]:
    found: list[Tensor] = [*backbone.parameters(), *backbone.buffers()]
    for layer in linear_4bit_modules(backbone).values():
        found += state_tensors(layer.weight.quant_state)
    return found


def of_a_step(plan: StagePlan) -> int:
    """Bytes of a step above weights and optimiser."""
    resting = ("4-bit weights", "other frozen weights", "trained weights", "optimiser states")
    return plan.peak - sum(plan.parts[part] for part in resting)


def planned(module: RimeModule, base: Path, batch: Batch, further: int = 0) -> StagePlan:
    return predict_stage(module, read_architecture(str(base)), batch, further)


def compare_with_a_real_step(module: RimeModule, base: Path, batch: Batch, further: int = 0) -> None:
    """The plan of a step must be right within 10 %."""
    backbone, module.backbone = module.backbone, None
    assert backbone is not None
    plan = planned(module, base, batch, further)
    module.backbone = backbone
    batch = with_further(batch, further)
    with LiveBytes(weights(backbone)) as live:
        moved = batch.to("cpu", copy=True)
        module.backward(module.training_step(moved, 0))  # type: ignore[arg-type]
    assert of_a_step(plan) == pytest.approx(live.peak.total(), rel=0.1)
    assert plan.flops == pytest.approx(live.flops, rel=0.1)


def test_counts_and_bytes_are_those_of_the_real_model(micro_base: Path, make_backbone: MakeBackbone) -> None:
    real, config, architecture = make_backbone(), micro_config(micro_base), read_architecture(str(micro_base))
    numbers = static_numbers(WeightlessBackbone(config, architecture, read_processor(config, architecture)))
    layers = linear_4bit_modules(real).values()
    packed = {id(layer.weight): layer.weight for layer in layers}
    trained = [p for p in real.parameters() if p.requires_grad]
    assert numbers["weights", "4-bit weights"] == sum(weight.nbytes for weight in packed.values())
    assert numbers["trained",] == sum(p.numel() for p in trained)
    assert numbers["weights", "trained weights"] == sum(p.nbytes for p in trained)
    sizes = sum(
        numbers["weights", part] for part in ("4-bit weights", "other frozen weights", "trained weights")
    )
    assert sizes == sum(tensor.nbytes for tensor in {id(t): t for t in weights(real)}.values())
    unpacked = sum(weight.quant_state.shape.numel() for weight in packed.values())
    others = sum(p.numel() for p in real.parameters()) - sum(weight.numel() for weight in packed.values())
    assert numbers["parameters",] == unpacked + others


LONG = pytest.mark.long
#: Stage, gradient checkpointing, micro-batches: each stage with and without either, once. The long tests have
#: all but the first.
WHOLE = MicroBatchSettings()
CASES = [
    ("sft", False, WHOLE),
    pytest.param("sft", True, CACHED, marks=LONG),
    pytest.param("cma", True, WHOLE, marks=LONG),
    pytest.param("cma", False, KEPT_NOT, marks=LONG),
]


@pytest.mark.parametrize(("stage", "checkpointing", "micro"), CASES)
def test_the_peak_is_that_of_a_real_step(
    stage: str,
    checkpointing: bool,
    micro: MicroBatchSettings,
    micro_base: Path,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    compare_with_a_real_step(stage_module(stage, backbone, micro), micro_base, batch)


@pytest.mark.parametrize(
    ("checkpointing", "micro", "tower"),
    [(False, WHOLE, "all"), pytest.param(True, CACHED, "merger", marks=LONG)],
)
def test_the_peak_with_a_trained_tower_is_that_of_a_real_step(
    checkpointing: bool,
    micro: MicroBatchSettings,
    tower: str,
    micro_base: Path,
    make_backbone: MakeBackbone,
    batch: Batch,
) -> None:
    backbone = make_backbone(gradient_checkpointing=checkpointing, lora_tower=tower)
    compare_with_a_real_step(stage_module("sft", backbone, micro), micro_base, batch)
    frozen, trains = (
        planned(SFTModule(replace(backbone.config, lora_tower=part)), micro_base, batch)
        for part in ("none", tower)
    )
    assert frozen.flops < trains.flops and frozen.trained < trains.trained


def test_weights_of_a_tower_that_may_be_divided_are_counted_apart(micro_base: Path, batch: Batch) -> None:
    whole, divided = (
        planned(SFTModule(micro_config(micro_base, shard_tower=asked)), micro_base, batch)
        for asked in (False, True)
    )
    tower = divided.parts.pop("vision tower weights")
    assert whole.parts.pop("other frozen weights") == tower + divided.parts.pop("other frozen weights")
    assert whole.parts == divided.parts
    split = shard({"vision tower weights": tower}, 2, 2)
    assert split["vision tower weights"] == -(-tower // 2) > 0


@pytest.mark.parametrize(("stage", "micro"), [("sft", WHOLE), pytest.param("cma", CACHED, marks=LONG)])
def test_hard_negatives_count_in_the_plan(
    stage: str, micro: MicroBatchSettings, micro_base: Path, make_backbone: MakeBackbone, batch: Batch
) -> None:
    module = stage_module(stage, make_backbone(), micro)
    compare_with_a_real_step(module, micro_base, batch, further=2)
    module.backbone = None
    plain, more = (planned(module, micro_base, batch, further) for further in (0, 2))
    assert more.flops > 1.5 * plain.flops


@LONG
def test_a_batch_of_ragged_pictures_is_extrapolated(
    micro_base: Path, make_backbone: MakeBackbone, train_pairs: list[Pair]
) -> None:
    """One to four pictures an item, from 576 to 55,296 pixels: the lengths differ by a factor of 4."""
    sizes = ((24, 24), (240, 48), (48, 144), (144, 144), (288, 192), (24, 120))

    def pictures(item: Item | None, number: int) -> Item:
        assert item is not None
        shown = [Image.new("RGB", sizes[(number + n) % len(sizes)]) for n in range(1 + number % 4)]
        return replace(item, media=tuple(shown), text=" ".join([item.text or "red"] * (1 + number % 3)))

    pairs = [
        replace(pair, query=pictures(pair.query, n), target=pictures(pair.target, n // 4))
        for n, pair in enumerate(train_pairs[:10])
    ]
    prompt = replace(PROMPT, max_pixels=288 * 192)
    batch = RimeProcessor.from_pretrained(str(micro_base), prompt).training_batch(pairs)
    tokens = (batch.query.lengths() + batch.target.lengths()).sum(1)
    assert len(batch) > FEW + MORE and tokens.max() > 4 * tokens.min()
    compare_with_a_real_step(stage_module("sft", make_backbone(), CACHED), micro_base, batch)


@pytest.mark.parametrize(
    ("checkpointing", "items_per_pass"),
    [(False, None), pytest.param(True, 1, marks=LONG)],
)
def test_the_peak_of_refine_rl_is_that_of_a_real_step(
    checkpointing: bool,
    items_per_pass: int | None,
    micro_base: Path,
    make_backbone: MakeBackbone,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollouts = {"max_new_tokens": 12, "items_per_pass": items_per_pass}
    groups: dict[str, Any] = {"rollouts": rollouts, "reward": {"num_anchors": 0}}
    backbone = make_backbone(gradient_checkpointing=checkpointing)
    plan = planned(RefineRLModule(backbone.config, **rl_settings(**groups)), micro_base, batch)
    module = refine_rl_module(backbone, **groups)
    # every rewrite takes its whole budget, as in the simulation
    monkeypatch.setattr(
        "rime_pl.generation.rollouts.sample_tokens", lambda logprobs, numbers: numbers.long() + 300
    )
    monkeypatch.setattr(module, "step", lambda *_: None)  # the optimiser's states are counted elsewhere
    with LiveBytes([*weights(backbone), *module.reference.values()]) as live:
        moved = batch.to("cpu", copy=True)
        module.training_step(moved, 0)
    reference = plan.parts["reference adapter"]
    assert of_a_step(plan) - reference == pytest.approx(live.peak.total(), rel=0.1)
    assert plan.flops == pytest.approx(live.flops, rel=0.1)


@LONG
def test_what_a_setting_of_refine_rl_costs(micro_base: Path, batch: Batch) -> None:
    def plan(**groups: dict[str, Any]) -> StagePlan:
        groups["rollouts"] = {"max_new_tokens": 12, **groups.get("rollouts", {})}
        return planned(RefineRLModule(micro_config(micro_base), **rl_settings(**groups)), micro_base, batch)

    plain, twice = plan(), plan(policy={"num_updates": 2})
    assert plain.flops < twice.flops
    cheap = plan(rollouts={"items_per_pass": 1, "sides": "query"})
    assert cheap.peak < plain.peak and cheap.flops < plain.flops


@LONG
def test_shallow_models_tell_the_peak_and_flops_of_a_deep_one(
    micro_base: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = read_architecture(str(micro_base))
    deep = architecture.text_config.num_hidden_layers = 3 * DEEPER
    if getattr(architecture.text_config, "layer_types", None):
        architecture.text_config.layer_types = architecture.text_config.layer_types[:1] * deep
    for kind, checkpointing in ((SFTModule, False), (CMAModule, True)):
        module = kind(micro_config(micro_base, gradient_checkpointing=checkpointing))
        quick = predict_stage(module, architecture, batch)
        monkeypatch.setattr(predict, "DEEPER", deep)
        whole = predict_stage(module, architecture, batch)
        monkeypatch.undo()
        assert quick.peak == pytest.approx(whole.peak, rel=0.03)
        assert quick.flops == pytest.approx(whole.flops, rel=0.01)
        assert quick.parameters == whole.parameters and quick.trained == whole.trained


def test_a_new_loss_term_is_planned_without_the_planner_knowing(micro_base: Path, batch: Batch) -> None:
    class Spread(SFTModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            again = self.encode(batch.query)  # a term that needs one more forward
            return loss + again.disc.square().mean()

    config = micro_config(micro_base)
    plain, spread = (planned(kind(config), micro_base, batch) for kind in (SFTModule, Spread))
    assert spread.flops > 1.2 * plain.flops and spread.peak > 1.1 * plain.peak


def test_a_second_simulation_gives_the_same_numbers(
    micro_base: Path, processor: RimeProcessor, batch: Batch
) -> None:
    """PEFT keeps a copy of the embedding table between forwards: each simulation starts without it."""
    module, architecture = CMAModule(micro_config(micro_base)), read_architecture(str(micro_base))
    first, second = (simulate(module, architecture, processor, batch) for _ in range(2))
    assert first == second


@LONG
def test_a_larger_batch_with_the_cache_costs_its_inputs_and_embeddings(
    micro_base: Path, batch: Batch
) -> None:
    rows = torch.arange(24) % len(batch)
    large = Batch(batch.query.select(rows), batch.target.select(rows), rows, rows, batch.dataset)
    module = SFTModule(micro_config(micro_base), micro_batches=CACHED)
    small, more = (planned(module, micro_base, one) for one in (batch, large))
    at_once = SFTModule(micro_config(micro_base))
    grown = [planned(at_once, micro_base, one).peak for one in (batch, large)]
    # the whole batch at once keeps its activations: 4 times the pairs cost several times as much more
    assert 0 < more.peak - small.peak < 0.5 * (grown[1] - grown[0])
    assert more.parts["inputs"] > 3 * small.parts["inputs"]


def test_the_2b_shape_needs_no_download() -> None:
    name = "Qwen/Qwen2-VL-2B-Instruct"
    config, architecture = BackboneConfig(name), read_architecture(name)
    backbone = WeightlessBackbone(config, architecture, read_processor(config, architecture))
    numbers = static_numbers(backbone)
    assert 2.1e9 < numbers["parameters",] - numbers["trained",] < 2.3e9  # the model card says 2.21 billion


@pytest.mark.parametrize(
    "targets", [".*no_such_layer", r".*visual\.blocks\.\d+\.mlp\.linear_fc1"], ids=["nothing", "the tower"]
)
def test_wrong_targets_are_refused(targets: str, micro_base: Path) -> None:
    config, architecture = micro_config(micro_base, lora_targets=targets), read_architecture(str(micro_base))
    with pytest.raises(RimeError, match="lora_targets"):
        WeightlessBackbone(config, architecture, read_processor(config, architecture))
