"""One forward gives embeddings and log-probabilities; a row depends neither on other rows nor on padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES, save_checkpoint, synthetic_pairs
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.modules.wrong_rewrites import empty_completions
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair
from tests.conftest import MakeBackbone
from tests.micro import build_backbone, micro_config, plain_logits

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@contextmanager
def count_forwards(backbone: Backbone) -> Iterator[list[int]]:
    """Collect the number of tokens of each forward of the Hugging Face model, below PEFT and our wrapper."""
    seen: list[int] = []
    handle = backbone.language_model.model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("module", [SFTModule, CMAModule])
def test_one_forward_a_side_gives_all(
    module: type[SFTModule] | type[CMAModule], make_backbone: MakeBackbone, batch: Batch
) -> None:
    backbone = make_backbone()
    stage = module(backbone.config)
    stage.backbone = backbone
    logged: dict[str, float] = {}
    stage.log = lambda key, value, **_: logged.update({key: float(value)})  # type: ignore[method-assign]
    with count_forwards(backbone) as seen:
        loss = stage.training_step(batch, 0)
    query, target = (int(side.lengths().sum()) for side in batch.sides)
    if isinstance(stage, CMAModule):  # with a wrong rewrite beside the own one
        query += int(stage.wrong_rewrites(batch, torch.arange(6)).mask.sum())
    assert seen == [query, target]
    loss.backward()
    assert {
        "train/loss",
        "train/loss_info_nce_gen",
        "train/loss_info_nce_disc",
        "train/loss_ce",
    } <= logged.keys()
    assert logged["train/loss"] == pytest.approx(
        sum(value for key, value in logged.items() if key.startswith("train/loss_")), rel=1e-5
    )


def test_plain_alignment_costs_no_extra_forward(make_backbone: MakeBackbone, batch: Batch) -> None:
    backbone = make_backbone()
    stage = CMAModule(backbone.config, lambda_dec=0.0)
    stage.backbone, stage.log = backbone, lambda *_, **__: None  # type: ignore[method-assign]
    with count_forwards(backbone) as seen:
        stage.training_step(batch, 0)
    assert seen == [int(side.lengths().sum()) for side in batch.sides]


@torch.no_grad()
def test_disc_does_not_depend_on_the_rewrite(shared_backbone: Backbone, batch: Batch) -> None:
    rows, processor = batch.query, shared_backbone.processor
    empty = empty_completions(len(rows), 5, processor, torch.device("cpu"))
    prompt_only = shared_backbone(rows.prompts)
    own, none = shared_backbone(rows.prompts, rows.completions), shared_backbone(rows.prompts, empty)
    torch.testing.assert_close(prompt_only.disc, own.disc, **TOLERANCE)
    torch.testing.assert_close(own.disc, none.disc, **TOLERANCE)
    assert prompt_only.gen is None and prompt_only.logprobs is None
    assert (own.gen - none.gen).norm(dim=-1).min() > 1e-3, "the generative embedding must read the rewrite"


@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one(
    shared_backbone: Backbone, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """Texts and pictures are mixed and of several lengths; a single row has no padding."""
    pairs = train_pairs[:5]
    rows = processor.training_batch(pairs).query
    assert (rows.prompts.attention_mask.sum(1).unique().numel() > 2) and rows.prompts.num_media.tolist() == [
        0, 2, 0, 1, 0,
    ]  # fmt: skip
    together = shared_backbone(rows.prompts, rows.completions, rows.labels)
    logprobs = []
    for number, pair in enumerate(pairs):
        row = processor.training_batch([pair]).query
        assert row.prompts.attention_mask.all()
        one = shared_backbone(row.prompts, row.completions, row.labels)
        torch.testing.assert_close(one.disc[0], together.disc[number], **TOLERANCE)
        torch.testing.assert_close(one.gen[0], together.gen[number], **TOLERANCE)
        logprobs.append(one.logprobs)
    torch.testing.assert_close(torch.cat(logprobs), together.logprobs, **TOLERANCE)


@torch.no_grad()
def test_selected_rows_take_their_own_patches(shared_backbone: Backbone, batch: Batch) -> None:
    rows = batch.query
    whole = shared_backbone(rows.prompts, rows.completions)
    picked = torch.tensor([5, 0, 4])
    some = shared_backbone(rows.prompts.select(picked), rows.completions.select(picked))
    torch.testing.assert_close(some.gen, whole.gen[picked], **TOLERANCE)
    no_picture = shared_backbone(rows.prompts.select(torch.tensor([2])))
    torch.testing.assert_close(no_picture.disc, whole.disc[2:3], **TOLERANCE)


@torch.no_grad()
def test_logprobs_are_those_of_the_whole_model_at_labelled_positions(
    shared_backbone: Backbone, batch: Batch
) -> None:
    rows = batch.query
    annotated = torch.tensor([True, False, True, True, False, True])
    out = shared_backbone(rows.prompts, rows.completions, replace(rows, annotated=annotated).labels)
    full = plain_logits(shared_backbone, rows.prompts, rows.completions).log_softmax(-1)  # (R, C, V)
    expected, labels = [], []
    for row in range(len(rows)):
        if annotated[row]:
            for column in range(int(rows.completions.mask[row].sum())):
                labels.append(int(rows.completions.ids[row, column]))
                expected.append(full[row, column, labels[-1]])
    torch.testing.assert_close(out.logprobs, torch.stack(expected), **TOLERANCE)
    assert out.entropy is None
    assert labels.count(shared_backbone.processor.gen_id) == 4  # <gen_emb> and end of turn are learned too
    assert labels.count(shared_backbone.processor.turn_end_id) == 4


@torch.no_grad()
def test_embeddings_are_read_at_the_mode_tokens(shared_backbone: Backbone, batch: Batch) -> None:
    rows, processor = batch.target, shared_backbone.processor
    out = shared_backbone(rows.prompts, rows.completions)
    ids = torch.cat([rows.prompts.input_ids, rows.completions.ids], dim=1)
    mask = torch.cat([rows.prompts.attention_mask, rows.completions.mask], dim=1)
    media = shared_backbone.media_inputs(rows.prompts) | shared_backbone.layout(rows.prompts, ids)
    hidden = shared_backbone.language_model.model(
        input_ids=ids, attention_mask=mask, **media
    ).last_hidden_state
    for row in range(len(rows)):
        for got, token in ((out.disc, processor.disc_id), (out.gen, processor.gen_id)):
            (place,) = (ids[row] == token).nonzero().flatten().tolist()
            expected = hidden[row, place] / hidden[row, place].norm()
            torch.testing.assert_close(got[row], expected, **TOLERANCE)


@torch.no_grad()
def test_missing_gen_token_is_reported_and_gives_the_zero_vector(
    shared_backbone: Backbone, batch: Batch
) -> None:
    rows, processor = batch.query, shared_backbone.processor
    ids = rows.completions.ids.clone()
    ids[2][ids[2] == processor.gen_id] = processor.turn_end_id
    at = int((rows.completions.ids[3] == processor.gen_id).nonzero())
    mask = rows.completions.mask.clone()
    mask[3, at:] = 0  # present, but outside the mask
    completions = type(rows.completions)(ids, mask)
    out = shared_backbone(rows.prompts, completions)
    assert out.gen_found.tolist() == [True, True, False, False, True, True]
    assert out.gen.norm(dim=-1).tolist() == pytest.approx([1, 1, 0, 0, 1, 1], abs=1e-5)


def test_a_prompt_without_disc_token_is_refused(shared_backbone: Backbone, batch: Batch) -> None:
    prompts = batch.query.prompts.select(torch.tensor([0, 1]))
    prompts.input_ids[prompts.input_ids == shared_backbone.processor.disc_id] = 0
    with pytest.raises(RimeError, match="Each prompt must hold <disc_emb>"):
        shared_backbone(prompts)


@torch.no_grad()
def test_shared_image_features_change_nothing(shared_backbone: Backbone, batch: Batch) -> None:
    rows = batch.target
    features = shared_backbone.encode_media(rows.prompts)
    for _ in range(2):  # used by several forwards
        shared = shared_backbone(rows.prompts, rows.completions, features=features)
        torch.testing.assert_close(
            shared.gen, shared_backbone(rows.prompts, rows.completions).gen, **TOLERANCE
        )
    assert shared_backbone.encode_media(rows.prompts.select(torch.tensor([], dtype=torch.int64))) is None


def test_gradient_checkpointing_gives_equal_gradients(make_backbone: MakeBackbone, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone(gradient_checkpointing=checkpointing)
        assert backbone.training, (
            "from_pretrained returns eval mode, where gradient checkpointing does nothing"
        )
        if checkpointing:
            assert backbone.language_model.is_gradient_checkpointing
        out = backbone(batch.query.prompts, batch.query.completions, batch.query.labels)
        weight = torch.linspace(-1, 1, out.disc.numel()).view_as(out.disc)
        (out.logprobs.sum() + (weight * out.disc).sum() + (weight * out.gen).sum()).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient is not None and recomputed[name] is not None, name
        assert (gradient - recomputed[name]).norm() <= 1e-5 * gradient.norm(), name
        if "lora_B" in name or "delta" in name:  # that of lora_A is 0 while B is 0
            assert gradient.norm() > 0, name


@pytest.mark.parametrize("kept", [False, True])
def test_the_frozen_vision_tower_never_runs_backward(kept: bool, tmp_path: Path) -> None:
    """Qwen2-VL names its patch embedding as an input, and transformers could ask for its gradient."""
    save_checkpoint(tmp_path, SHAPES["micro"], torch.device("cpu"))
    config = micro_config(tmp_path, gradient_checkpointing=True)
    backbone = build_backbone(config)
    items = [pair.query for pair in synthetic_pairs(2, SHAPES["micro"]) if pair.query is not None]
    rows = backbone.processor.rows(items, ["a", "b"])
    assert rows.prompts.pixel_values is not None
    seen: list[bool] = []
    for block in backbone.language_model.model.visual.modules():
        block.register_forward_hook(
            lambda m, args, out: seen.extend(
                one.requires_grad for one in tree_leaves(out) if torch.is_tensor(one)
            )
        )
    features = backbone.encode_media(rows.prompts) if kept else None
    out = backbone(rows.prompts, rows.completions, rows.labels, features)
    assert len(seen) > 5 and not any(seen)
    assert out.gen.requires_grad and out.logprobs.requires_grad


def test_missing_base_is_named(processor: RimeProcessor, make_backbone: MakeBackbone) -> None:
    config = make_backbone().config
    config.name_or_path = "/nowhere/base"
    with pytest.raises(
        RimeError, match=r"model.backbone.name_or_path must be .* no checkpoint .*'/nowhere/base'"
    ):
        Backbone(config, processor)
    with pytest.raises(
        RimeError, match=r"model.backbone.name_or_path must be .* no processor .*'/nowhere/base'"
    ):
        RimeProcessor.from_pretrained("/nowhere/base", processor.prompt)
