"""Derangements, empty rewrites, evaluation and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.base import seeded
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.modules.wrong_rewrites import empty_completions
from rime_pl.processing import RimeProcessor
from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION, Pair


def test_empty_completions_hold_the_two_tokens_and_padding(processor: RimeProcessor) -> None:
    empty = empty_completions(3, 5, processor, torch.device("cpu"))
    row = [processor.gen_id, processor.turn_end_id] + [processor.pad_id] * 3
    assert empty.ids.tolist() == [row] * 3 and empty.mask.tolist() == [[1, 1, 0, 0, 0]] * 3
    assert empty_completions(2, 2, processor, torch.device("cpu")).ids.equal(
        processor.completions([None, ""]).ids
    )


def evaluated(backbone: Backbone) -> SFTModule:
    module = SFTModule(backbone.config)
    module.backbone = backbone
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return module


@torch.no_grad()
def test_evaluation_of_queries(
    shared_backbone: Backbone, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """Own, reference, given and empty rewrites; each from forwards that this test makes by itself."""
    module = evaluated(shared_backbone)
    batch = processor.eval_batch("query", _four(train_pairs))
    out = module.validation_step(batch, 0)
    own, wrote = write_rewrites(shared_backbone, batch.prompts), out.written
    assert wrote is not None
    assert wrote.rewrites == processor.decode(own.completions) and wrote.lengths.equal(own.lengths)
    rewrites = {
        "reference": processor.completions([pair.query.rewrite for pair in _four(train_pairs) if pair.query]),
        "empty": processor.completions([None] * 4),
    }
    assert set(rewrites) == set(REWRITE_ABLATION) - {"own", "shuffled"} == set(wrote.ablation)
    torch.testing.assert_close(out.disc, shared_backbone(batch.prompts).disc, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        wrote.gen, shared_backbone(batch.prompts, own.completions).gen, atol=1e-5, rtol=0
    )
    for name, completions in rewrites.items():
        expected = shared_backbone(batch.prompts, completions).gen
        torch.testing.assert_close(wrote.ablation[name], expected, atol=1e-5, rtol=0, msg=name)
    words = ["A red ring.", None, "Two blue stars, left of it.", None]
    given = processor.completions(words)
    tokens = [row[mask.bool()].tolist() for row, mask in zip(given.ids, given.mask, strict=True)]
    torch.testing.assert_close(
        module.embed_rewritten(batch, [tokens[0], None, tokens[2], None]),
        shared_backbone(batch.prompts, given).gen,
        atol=1e-5,
        rtol=0,
    )
    assert set(out.seconds) == {"discriminative", "generative"} and min(out.seconds.values()) > 0


def _four(pairs: list[Pair]) -> list[Pair]:
    return [pairs[n] for n in (0, 1, 3, 0)]


@torch.no_grad()
def test_targets_have_no_trace(
    shared_backbone: Backbone, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    out = evaluated(shared_backbone).test_step(processor.eval_batch("target", train_pairs[:2]), 0)
    assert out.written is not None and out.written.ablation == {} and out.written.gen.shape == (2, 64)
    assert len(MODE_PAIRS) == 4


@torch.no_grad()
def test_without_the_generative_mode_nothing_is_written(
    shared_backbone: Backbone,
    processor: RimeProcessor,
    train_pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, batch = evaluated(shared_backbone), processor.eval_batch("query", train_pairs[:2])
    both = module.validation_step(batch, 0)
    for name in ("write_rewrites", "embed_completions", "prefill"):
        monkeypatch.setattr(f"rime_pl.modules.base.{name}", None)
    only = module.validation_step(replace(batch, generative=False), 0)
    torch.testing.assert_close(only.disc, both.disc, atol=1e-5, rtol=0)
    assert only.written is None and set(only.seconds) == {"discriminative"}


def test_a_checkpoint_holds_what_trains(shared_backbone: Backbone) -> None:
    module = evaluated(shared_backbone)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["state_dict"]
    assert set(kept) == {name for name, p in module.named_parameters() if p.requires_grad} and kept
    assert sum(t.numel() * t.element_size() for t in kept.values()) < 100_000
    module.load_state_dict(kept, strict=module.strict_loading)  # the frozen base is not asked for


def test_settings_that_make_no_sense_are_named(shared_backbone: Backbone) -> None:
    with pytest.raises(RimeError, match=r"model.temperature must be greater than 0, but is 0.0"):
        SFTModule(shared_backbone.config, temperature=0.0)
    for share in (0.0, 1.5):
        with pytest.raises(
            RimeError, match=rf"model.wrong_share must be greater than 0 and at most 1, but is {share}"
        ):
            CMAModule(shared_backbone.config, wrong_share=share)
    with pytest.raises(RimeError, match=r"configure_model\(\) builds it"):
        _ = SFTModule(shared_backbone.config).model


def started(config: BackboneConfig, seed: int) -> dict[str, torch.Tensor]:
    """What a run with this seed starts from, whatever random numbers were drawn before."""
    module = SFTModule(config)
    trainer: Any = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = SimpleNamespace(seed=seed)
    module.trainer = trainer
    before = torch.get_rng_state()
    module.configure_model()
    assert torch.get_rng_state().equal(before), "the run goes on as if nothing had been drawn"
    return trained_values(module.model)


def test_a_tower_that_nobody_divides_is_refused(backbone_config: BackboneConfig) -> None:
    with pytest.raises(RimeError, match=r"model.backbone.shard_tower=true needs FSDP2"):
        started(replace(backbone_config, shard_tower=True), 1)


def test_loras_start_follows_the_seed_of_the_run(
    backbone_config: BackboneConfig, make_backbone: Callable[[], Backbone]
) -> None:
    torch.manual_seed(5)
    first, second = started(backbone_config, 1), started(backbone_config, 2)
    torch.manual_seed(6)
    again, zero = started(backbone_config, 1), started(backbone_config, 0)
    matrices = [name for name in first if "lora_A" in name]
    assert matrices and not any(first[name].equal(second[name]) for name in matrices)
    assert all(first[name].equal(again[name]) for name in first)
    fixed = trained_values(make_backbone())  # drawn from seed 0, as every run was before
    assert all(zero[name].equal(fixed[name]) for name in zero)


def test_the_devices_random_numbers_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[Any] = []

    @contextmanager
    def fork_rng(devices: Any) -> Iterator[None]:
        forked.append(devices)
        yield

    monkeypatch.setattr("torch.random.fork_rng", fork_rng)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        with seeded(3, device):
            pass
    assert forked == [[], [torch.device("cuda", 1)]]


def test_a_checkpoint_of_another_start_or_shape_is_refused(shared_backbone: Backbone) -> None:
    module = evaluated(shared_backbone)
    module.trainer.state.fn = TrainerFn.FITTING
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    name = next(iter(checkpoint["state_dict"]))
    changes = (
        ({"start_hash": "other"}, "is another adapter than the one"),
        ({"base_hash": "other"}, "is another base model than the one"),
        ({"state_dict": checkpoint["state_dict"] | {name: torch.ones(3, 3)}}, r"has shape \(3, 3\) there"),
        ({"state_dict": {}}, "has shape None there"),
    )
    for change, words in changes:
        with pytest.raises(RimeError, match=words):
            module.on_load_checkpoint(checkpoint | change)
    module.trainer.state.fn = TrainerFn.TESTING  # all that trained is in the checkpoint
    module.on_load_checkpoint(checkpoint | {"start_hash": "other"})
