"""Packed rows give the hidden states and gradients of the padded rows of transformers, with each kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.packing import Packing, pack_rows
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES, save_checkpoint, synthetic_pairs
from rime_pl.types import Batch, Completions, Rows
from tests.conftest import MakeBackbone
from tests.generation.test_rollouts import tokens_read
from tests.micro import build_backbone, micro_config, plain_logits, randomise_adapter


def flash_in_a_loop(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a flash kernel in transformers computes, with the arguments that it gets there."""
    assert attention_mask is None and cu_seq_lens_q.dtype == torch.int32
    assert cu_seq_lens_q.equal(cu_seq_lens_k) and cu_seq_lens_q.diff().max() == max_length_q == max_length_k
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    mixed = []
    for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        q, k, v = (part[:, :, start:end] for part in (query, key, value))
        scores = (q @ k.mT * scaling).masked_fill(
            torch.ones(end - start, end - start).triu(1).bool(), -torch.inf
        )
        mixed.append(scores.softmax(dim=-1) @ v)
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def with_kernel(backbone: Backbone, kernel: str) -> Backbone:
    """The backbone with another kernel of attention; no flash kernel runs on a CPU."""
    if kernel == "flash_in_a_loop":
        AttentionInterface.register(kernel, flash_in_a_loop)
        backbone.config.attn_implementation = kernel
        backbone.language_model.model.language_model.config._attn_implementation = kernel
    return backbone


def make(
    kernel: str, family: str, make_backbone: MakeBackbone, tmp_path: Path
) -> tuple[Backbone, Batch | None]:
    settings = {"load_in_4bit": False, "attn_implementation": kernel if kernel == "eager" else "sdpa"}
    if family == "qwen3_vl":
        return make_backbone(**settings), None
    save_checkpoint(tmp_path, SHAPES["micro"], torch.device("cpu"))
    backbone = build_backbone(micro_config(tmp_path, **settings))
    return backbone, backbone.processor.training_batch(synthetic_pairs(4, SHAPES["micro"], (4, 12)))


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_in_a_loop"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(
    family: str, kernel: str, make_backbone: MakeBackbone, batch: Batch, tmp_path: Path
) -> None:
    """Rows with one, two and no pictures, of several lengths."""
    packed, other = make(kernel, family, make_backbone, tmp_path)
    padded, _ = make(kernel, family, make_backbone, tmp_path)
    rows = (other or batch).query if other is None else other.target
    assert rows.lengths().sum(1).unique().numel() > 1
    for backbone in (packed, padded):
        randomise_adapter(backbone.peft, scale=0.05)
    with_kernel(packed, kernel)
    labelled = rows.labels != -100
    got = packed(rows.prompts, rows.completions, rows.labels).logprobs
    logits = plain_logits(padded, rows.prompts, rows.completions)[labelled]
    expected = logits.log_softmax(-1).gather(1, rows.labels[labelled].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    got.square().sum().backward()
    expected.square().sum().backward()
    theirs = dict(padded.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            gradient = theirs[name].grad
            assert gradient is not None and parameter.grad is not None and gradient.norm() > 0, name
            assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "flash_in_a_loop"])
def test_each_kernel_embeds_alternatives_behind_the_same_prompt(
    kernel: str, make_backbone: MakeBackbone, batch: Batch
) -> None:
    expected, other = (
        make_backbone(load_in_4bit=False, attn_implementation=name).eval()
        for name in ("sdpa", kernel if kernel == "eager" else "sdpa")
    )
    for backbone in (expected, other):
        randomise_adapter(backbone.peft, scale=0.05)
    with_kernel(other, kernel)
    rows = batch.query
    wrong = rows.completions.select(torch.arange(len(rows)).roll(1))
    outs = [b(rows.prompts, rows.completions, rows.labels, alternatives=wrong) for b in (expected, other)]
    for name in ("disc", "gen", "logprobs", "alternative"):
        torch.testing.assert_close(getattr(outs[1], name), getattr(outs[0], name), atol=1e-5, rtol=0)


@torch.no_grad()
def test_only_tokens_go_through_the_layers(shared_backbone: Backbone, batch: Batch) -> None:
    rows = batch.query
    wrong = rows.completions.select(torch.arange(len(rows)).roll(1))
    with tokens_read(shared_backbone) as seen:
        shared_backbone(rows.prompts, rows.completions)
        shared_backbone(rows.prompts, rows.completions, alternatives=wrong)
    own = int(rows.lengths().sum())
    assert seen == [(1, own), (1, own + int(wrong.mask.sum()))]
    padded = len(rows) * (rows.prompts.input_ids.shape[1] + rows.completions.ids.shape[1])
    assert own < 0.9 * padded


@torch.no_grad()
def test_a_completion_may_be_empty(shared_backbone: Backbone, batch: Batch) -> None:
    """A row without a single token behind its prompt, beside one that has them."""
    rows = batch.query
    mask = rows.completions.mask.clone()
    mask[0] = 0
    out = shared_backbone(rows.prompts, Completions(rows.completions.ids, mask))
    assert out.gen_found.tolist() == [False, *[True] * (len(rows) - 1)] and out.gen[0].norm() == 0
    whole = shared_backbone(rows.prompts, rows.completions)
    torch.testing.assert_close(out.gen[1:], whole.gen[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.disc, whole.disc, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 40, 2, 39, 31, 20, 40], list(range(1, 60))])
def test_rows_are_taken_apart_and_brought_together(lengths: list[int]) -> None:
    """All tokens come back, and the padding of attention is bounded."""
    width = max(lengths) + 3
    places = torch.arange(width)
    valid = torch.stack([(places >= 2) & (places < 2 + length) for length in lengths]).int()
    packing = Packing.of(valid)
    total = sum(lengths)
    values = torch.arange(2.0 * total).view(1, 2, total, 1)  # (1, H, N, W)
    apart = packing.take_apart(values)
    assert packing.bring_together([group.transpose(1, 2) for group in apart]).equal(values.transpose(1, 2))
    assert [tuple(group.shape) for group in apart] == [
        (rows, 2, longest, 1) for rows, longest in packing.groups
    ]
    assert sum(rows for rows, _ in packing.groups) == len(lengths)
    assert sum(rows * longest for rows, longest in packing.groups) <= total / 0.75
    hidden = torch.rand(1, total, 4)
    (back,) = packing.put_back(hidden)
    assert back[valid.bool()].equal(hidden[0]) and not back[~valid.bool()].any()


@pytest.mark.parametrize("kernel", ["flex_attention", "nonsense"])
def test_another_kernel_is_refused(
    kernel: str, shared_backbone: Backbone, make_backbone: MakeBackbone
) -> None:
    """Some of them do not even load on this machine; others would ignore the borders of the rows."""
    words = "must be 'sdpa', 'eager' or a flash kernel that transformers knows on this machine, but is"
    with pytest.raises(RimeError, match=words):
        make_backbone(attn_implementation=kernel)
    with pytest.raises(RimeError, match=f"{words} '{kernel}'"):
        pack_rows(shared_backbone.language_model, kernel)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_batch_of_one_length_is_one_group(rows: int, batch: Batch) -> None:
    same: Rows = batch.query.select(torch.zeros(rows, dtype=torch.int64))
    packing = Packing.of(torch.cat([same.prompts.attention_mask, same.completions.mask], dim=1))
    assert packing.groups == ((rows, int(same.lengths()[0].sum())),)
