"""Gradients of the cached step equal those of one graph, with the same micro-batches or the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.modules.settings import MicroBatchSettings, OptimizerSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair
from tests.families import FAMILIES, apart_pairs, save_family
from tests.micro import build_backbone, micro_config, randomise_adapter, read_pairs
from tests.preflight.steps import (
    Content,
    loss_and_gradients,
    make_batch,
    set_dropout,
    stage_module,
    worst_error,
)

TOLERANCE = 1e-5
MakeTrained = Callable[[bool, bool], Backbone]


@pytest.fixture(scope="module")
def trained(micro_base: Path) -> MakeTrained:
    """Make each kind of backbone once, with dropout and random adapter values."""

    @cache
    def make(load_in_4bit: bool, gradient_checkpointing: bool) -> Backbone:
        settings = {"load_in_4bit": load_in_4bit, "gradient_checkpointing": gradient_checkpointing}
        backbone = build_backbone(micro_config(micro_base, lora_dropout=0.1, **settings))
        randomise_adapter(backbone.peft, scale=0.05)
        return backbone

    return make


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    """A backbone of each family with dropout, whose tower trains."""
    found = {}
    for family in FAMILIES:
        config = micro_config(
            save_family(family, tmp_path_factory.mktemp(family)),
            **{"lora_tower": "all", "load_in_4bit": False, "lora_dropout": 0.1},
        )
        found[family] = build_backbone(config)
        randomise_adapter(found[family].peft, scale=0.05)
    return found


@pytest.fixture(scope="module")
def batches(processor: RimeProcessor, scenes_corpus: Path) -> dict[Content, Batch]:
    pairs = read_pairs(scenes_corpus, "train")
    return {content: make_batch(processor, pairs, content) for content in ("image", "text", "mixed")}


@pytest.mark.parametrize("content", ["image", "text", "mixed"])
@pytest.mark.parametrize("stage", ["sft", "cma"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_cached_gradients_are_exact(
    four_bit: bool,
    checkpointing: bool,
    stage: str,
    content: Content,
    trained: MakeTrained,
    batches: dict[Content, Batch],
) -> None:
    backbone, batch = trained(four_bit, checkpointing), batches[content]
    cached = stage_module(stage, backbone, MicroBatchSettings(size=3))
    retained = stage_module(
        stage, backbone, MicroBatchSettings(size=3, gradient_cache=False)
    )  # plain autograd

    set_dropout(backbone, 0.1)
    loss, gradients = loss_and_gradients(cached, batch)
    expected_loss, expected = loss_and_gradients(retained, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    assert worst_error(gradients, expected) < TOLERANCE
    if content == "mixed":
        other_masks = loss_and_gradients(cached, batch, seed=1)[1]
        assert worst_error(other_masks, expected) > 1e-3, (
            "dropout must be on, otherwise this test could not fail"
        )

    set_dropout(backbone, 0.0)
    loss, gradients = loss_and_gradients(cached, batch)
    expected_loss, expected = loss_and_gradients(stage_module(stage, backbone), batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    assert worst_error(gradients, expected) < TOLERANCE


@pytest.mark.parametrize("settings", [{"tokens": 150}, {"size": 1}, {"size": 99}])
def test_micro_batches_of_any_kind(
    settings: dict[str, int], trained: MakeTrained, batches: dict[Content, Batch]
) -> None:
    backbone = trained(True, False)
    set_dropout(backbone, 0.0)
    gradients = loss_and_gradients(
        stage_module("cma", backbone, MicroBatchSettings(**settings)), batches["mixed"]
    )[1]
    expected = loss_and_gradients(stage_module("cma", backbone), batches["mixed"])[1]
    assert worst_error(gradients, expected) < TOLERANCE


def test_micro_batches_with_a_share_of_wrong_rewrites(
    trained: MakeTrained, batches: dict[Content, Batch]
) -> None:
    backbone = trained(True, False)
    set_dropout(backbone, 0.0)
    cached = stage_module("cma", backbone, MicroBatchSettings(size=3), wrong_share=0.5)
    whole = stage_module("cma", backbone, wrong_share=0.5)
    pair = [loss_and_gradients(module, batches["mixed"])[1] for module in (cached, whole)]
    assert worst_error(*pair) < TOLERANCE


def test_without_the_cache_there_is_one_graph(trained: MakeTrained, batches: dict[Content, Batch]) -> None:
    backbone = trained(False, False)
    module = stage_module("sft", backbone, MicroBatchSettings(size=3, gradient_cache=False))
    module.training_step(batches["mixed"], 0).backward()  # type: ignore[operator]
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    module.zero_grad(set_to_none=True)
    assert gradients and all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("reuse", [False, True])
def test_the_vision_tower_runs_once_when_its_features_are_kept(
    reuse: bool, trained: MakeTrained, batches: dict[Content, Batch]
) -> None:
    backbone = trained(True, False)
    calls: list[bool] = []
    tower = backbone.language_model.model.visual
    handle = tower.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    set_dropout(backbone, 0.0)
    module = stage_module("sft", backbone, MicroBatchSettings(size=4, reuse_vision=reuse))
    gradients = loss_and_gradients(module, batches["image"])[1]
    handle.remove()
    assert len(calls) == (4 if reuse else 8)  # 2 sides of 2 micro-batches
    expected = loss_and_gradients(stage_module("sft", backbone), batches["image"])[1]
    assert worst_error(gradients, expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["sft", "cma"])
def test_a_trained_tower_runs_in_both_passes(stage: str, family: str, families: dict[str, Backbone]) -> None:
    """Also with dropout in the tower: the second pass has the masks of the first."""
    backbone = families[family]
    batch = backbone.processor.training_batch(apart_pairs())
    cached = stage_module(stage, backbone, MicroBatchSettings(size=2))
    set_dropout(backbone, 0.0)
    grads: list[bool] = []
    handle = backbone.language_model.model.visual.register_forward_hook(
        lambda *_: grads.append(torch.is_grad_enabled())
    )
    gradients = loss_and_gradients(cached, batch)[1]
    handle.remove()
    assert grads == 6 * [False] + 6 * [True], "2 sides of 3 micro-batches, with or without media"
    expected = loss_and_gradients(stage_module(stage, backbone), batch)[1]
    assert len([name for name in expected if ".visual." in name]) >= 16
    assert worst_error(gradients, expected) < TOLERANCE
    set_dropout(backbone, 0.1)
    plain = stage_module(stage, backbone, MicroBatchSettings(size=2, gradient_cache=False))
    pair = [loss_and_gradients(module, batch)[1] for module in (cached, plain)]
    assert worst_error(*pair) < TOLERANCE < worst_error(pair[0], expected)


def test_the_random_state_continues_as_if_there_was_one_pass(
    trained: MakeTrained, batches: dict[Content, Batch]
) -> None:
    backbone = trained(True, False)
    set_dropout(backbone, 0.1)
    following = []
    for module in (
        stage_module("sft", backbone, MicroBatchSettings(size=3)),
        stage_module("sft", backbone, MicroBatchSettings(size=3, gradient_cache=False)),
    ):
        loss_and_gradients(module, batches["mixed"])
        following.append(torch.rand(3))
    assert following[0].equal(following[1])


def test_autocast_holds_in_the_second_pass(trained: MakeTrained, batches: dict[Content, Batch]) -> None:
    """`trainer.precision=bf16-mixed`: Lightning runs the step inside autocast, and backward outside."""
    backbone = trained(False, False)
    set_dropout(backbone, 0.0)
    seen = []
    for module in (
        stage_module("sft", backbone, MicroBatchSettings(size=3)),
        stage_module("sft", backbone, MicroBatchSettings(size=3, gradient_cache=False)),
    ):
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module.training_step(batches["mixed"], 0)
        module.backward(loss)
        seen.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        module.zero_grad(set_to_none=True)
    in_full = loss_and_gradients(stage_module("sft", backbone), batches["mixed"])[1]
    assert worst_error(seen[0], seen[1]) < 1e-2 < worst_error(in_full, seen[1])


def test_a_loss_that_does_not_go_back_through_the_module_is_an_error(
    trained: MakeTrained, batches: dict[Content, Batch]
) -> None:
    module = stage_module("sft", trained(True, False), MicroBatchSettings(size=4))
    module.training_step(batches["text"], 0).backward()
    with pytest.raises(RimeError, match=r"Call module.backward\(loss\)"):
        module.training_step(batches["text"], 1)


def test_settings_of_micro_batches_that_make_no_sense_are_named() -> None:
    for settings, message in [
        ({"size": 2, "tokens": 9}, r"size=2 and model.micro_batches.tokens=9 cannot both be set"),
        ({"size": 0}, r"model.micro_batches.size must be 1 or more, but is 0"),
        ({"tokens": -1}, r"model.micro_batches.tokens must be 1 or more, but is -1"),
    ]:
        with pytest.raises(RimeError, match=message):
            MicroBatchSettings(**settings)


def test_clipping_accumulation_and_schedule_go_on_working(
    micro_base: Path, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """Two optimiser steps of two batches each under Lightning's trainer, with and without micro-batches."""
    weights, norms = [], []
    batches = [processor.training_batch(train_pairs[n : n + 4]) for n in (0, 4, 8, 12)]
    for size in (None, 3):
        backbone = build_backbone(micro_config(micro_base))
        randomise_adapter(backbone.peft, scale=0.05)
        module = SFTModule(
            backbone.config,
            optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=0),
            micro_batches=MicroBatchSettings(size=size),
        )
        module.backbone = backbone
        norms.append(ClippedNorms())
        trainer = L.Trainer(
            **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            max_epochs=1,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            callbacks=[norms[-1]],
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        weights.append({n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
    assert norms[0].seen == pytest.approx([0.5, 0.5], rel=1e-4)
    assert norms[1].seen == pytest.approx([0.5, 0.5], rel=1e-4)
    # Adam divides small gradients by small gradients
    assert worst_error(weights[1], weights[0]) < 1e-3


class ClippedNorms(L.Callback):
    """Collects the norm of all gradients that the optimiser gets."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # this hook runs before Lightning clips, so clip here too; clipping twice changes nothing
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.5)
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(torch.cat(gradients).norm()))
