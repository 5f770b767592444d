"""Greedy rewrites: cut and closed correctly, equal to a plain loop, without special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.rewriting import close_rewrites, finish_rewrites, write_rewrites
from rime_pl.generation.rollouts import PromptPart, random_numbers, sample_rollouts
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Completions, Pair, Prompts
from tests.conftest import MakeBackbone
from tests.micro import build_backbone, micro_config, randomise_adapter

GEN, END, PAD = 1, 2, 0


@contextmanager
def changed_logits(backbone: Backbone, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = backbone.language_model.lm_head.register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        handle.remove()


# -- closing --------------------------------------------------------------------------------------------


def naive_close(row: list[int], budget: int) -> tuple[list[int], int, bool]:
    """One row, written out from the definition: completion, length, well-formed."""
    kept: list[int] = []
    ended = False
    for token in row:
        if token in (GEN, END) or len(kept) == budget:
            ended = token == GEN
            break
        kept.append(token)
    return [*kept, GEN, END], len(kept), ended and bool(kept)


@pytest.mark.parametrize(
    ("row", "budget", "completion", "well_formed"),
    [
        ([5, 6, GEN, PAD], 3, [5, 6, GEN, END], True),
        ([5, 6, 7, GEN], 3, [5, 6, 7, GEN, END], True),  # ends exactly at the budget
        ([5, 6, 7, 8], 3, [5, 6, 7, GEN, END], False),  # cut at the budget
        ([5, 6, END, PAD], 3, [5, 6, GEN, END], False),  # the turn ends without <gen_emb>
        ([5, END, GEN, 6], 3, [5, GEN, END], False),  # <gen_emb> after the end does not count
        ([GEN, 5, 6, 7], 3, [GEN, END], False),  # empty rewrite
        ([5, 6], 3, [5, 6, GEN, END], False),  # stopped early for another reason
    ],
)
def test_close_one_row(row: list[int], budget: int, completion: list[int], well_formed: bool) -> None:
    closed = close_rewrites(torch.tensor([row]), GEN, END, PAD, budget)
    assert closed.completions.ids.tolist() == [completion]
    assert closed.completions.mask.tolist() == [[1] * len(completion)]
    assert closed.lengths.tolist() == [len(completion) - 2]
    assert closed.well_formed.tolist() == [well_formed]
    assert naive_close(row, budget) == (completion, len(completion) - 2, well_formed)


@pytest.mark.parametrize("budget", [1, 4, 9])
def test_close_many_rows_equals_the_naive_loop(budget: int) -> None:
    written = torch.randint(1, 9, (200, budget + 1), generator=torch.Generator().manual_seed(budget))
    closed = close_rewrites(written, GEN, END, PAD, budget)
    ids, mask = closed.completions.ids, closed.completions.mask
    for row, tokens in enumerate(written.tolist()):
        expected, length, well_formed = naive_close(tokens, budget)
        assert ids[row][mask[row].bool()].tolist() == expected
        assert mask[row].tolist() == [1] * len(expected) + [0] * (ids.shape[1] - len(expected))
        assert (ids[row][len(expected) :] == PAD).all()
        assert (int(closed.lengths[row]), bool(closed.well_formed[row])) == (length, well_formed)
    assert 0 < closed.well_formed.sum() < 200


@pytest.mark.parametrize(("text", "says"), [("a", True), (" a", True), (" ", False), ("\n \n", False)])
def test_only_visible_text_makes_a_rewrite_well_formed(
    text: str, says: bool, processor: RimeProcessor
) -> None:
    """Neither white space nor a padding token that the model wrote."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    for row in (ids, [*ids, processor.pad_id]):
        written = torch.tensor([[*row, processor.gen_id]])
        assert finish_rewrites(written, processor, budget=9).well_formed.tolist() == [says]
        assert finish_rewrites(written[:, :-1], processor, budget=9).well_formed.tolist() == [False]


# -- writing --------------------------------------------------------------------------------------------


def tokens(completions: Completions, row: int) -> list[int]:
    return completions.ids[row][completions.mask[row].bool()].tolist()


@torch.no_grad()
def naive_greedy(backbone: Backbone, prompts: Prompts, budget: int) -> list[int]:
    """One row, with one full forward without cache for each token."""
    processor = backbone.processor
    stop = [processor.gen_id, processor.turn_end_id]
    ids, written = prompts.input_ids, []
    for _ in range(budget):
        media = backbone.media_inputs(prompts) | backbone.layout(prompts, ids)
        logits = backbone.language_model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits
        logits[..., [i for i in processor.special_ids if i not in stop]] = float("-inf")
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return [*written, *stop]


@pytest.mark.parametrize("penalty", [0.0, 1e4], ids=["stops by itself", "never stops"])
def test_greedy_equals_a_loop_of_full_forwards_row_by_row(
    penalty: float, make_backbone: MakeBackbone, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """The batch is padded on the left and mixes texts with pictures; a single row has no padding."""
    backbone = make_backbone().eval()
    randomise_adapter(backbone.peft, seed=2, scale=0.3)  # otherwise it repeats one token for every prompt
    bias = torch.zeros(len(processor.tokenizer))
    bias[[processor.gen_id, processor.turn_end_id]] = -penalty
    items = [pair.query for pair in train_pairs[:6] if pair.query]
    prompts = processor.prompts(items)
    assert (prompts.attention_mask[:, 0] == 0).any()
    with changed_logits(backbone, lambda logits: logits + bias):
        together = write_rewrites(backbone, prompts, max_new_tokens=6)
        for row, item in enumerate(items):
            single = processor.prompts([item])
            expected = naive_greedy(backbone, single, budget=6)
            assert tokens(together.completions, row) == expected
            assert tokens(write_rewrites(backbone, single, max_new_tokens=6).completions, 0) == expected
    assert len({tuple(tokens(together.completions, row)) for row in range(len(items))}) > 1


def test_special_tokens_are_never_written(shared_backbone: Backbone, batch: Batch) -> None:
    """Not even by a model that prefers them to all other tokens."""
    processor = shared_backbone.processor
    stop = [processor.gen_id, processor.turn_end_id]
    unwanted = [i for i in processor.special_ids if i not in stop]
    assert processor.image_id in unwanted and processor.disc_id in unwanted
    bonus = torch.zeros(len(processor.tokenizer))
    bonus[unwanted] = 1e4
    with changed_logits(shared_backbone, lambda logits: logits + bonus):
        out = write_rewrites(shared_backbone, batch.query.prompts, max_new_tokens=5)
    assert out.lengths.max() > 0
    written = out.completions.ids[out.completions.mask.bool()]
    assert not set(written.tolist()) & set(unwanted)
    shared_backbone(batch.query.prompts, out.completions)  # the next forward takes it


def test_a_rewrite_that_never_ends_is_cut_and_not_well_formed(
    shared_backbone: Backbone, batch: Batch
) -> None:
    processor = shared_backbone.processor
    penalty = torch.zeros(len(processor.tokenizer))
    penalty[[processor.gen_id, processor.turn_end_id]] = -1e4
    with changed_logits(shared_backbone, lambda logits: logits + penalty):
        out = write_rewrites(shared_backbone, batch.query.prompts, max_new_tokens=4)
    assert out.lengths.tolist() == [4] * 6 and not out.well_formed.any()
    assert (out.completions.ids[:, -2:] == torch.tensor([processor.gen_id, processor.turn_end_id])).all()
    assert shared_backbone(batch.query.prompts, out.completions).gen_found.all()


def test_a_rewrite_that_ends_by_itself_is_well_formed(shared_backbone: Backbone, batch: Batch) -> None:
    """Every second row writes <gen_emb> as its third token, the others as their first."""
    processor, step = shared_backbone.processor, 0

    def want_gen(logits: Tensor) -> Tensor:
        nonlocal step
        logits = logits.clone()
        logits[..., [processor.gen_id, processor.turn_end_id]] = -1e4
        rows = (slice(1, None, 2), slice(0, 0), slice(None))[min(step, 2)]  # the first to end are dropped
        logits[rows, processor.gen_id] = 1e4
        step += 1
        return logits

    with changed_logits(shared_backbone, want_gen):
        out = write_rewrites(shared_backbone, batch.query.prompts, max_new_tokens=8)
    assert out.lengths.tolist() == [2, 0] * 3
    assert out.well_formed.tolist() == [True, False] * 3
    assert out.completions.ids.shape[1] == 4, "no longer than the longest rewrite"


def test_the_generation_config_of_the_checkpoint_is_not_used(
    micro_base: Path, tmp_path: Path, batch: Batch
) -> None:
    """Qwen2.5-VL has a repetition penalty of 1.05 there, which also punishes the words of the query."""
    base = shutil.copytree(micro_base, tmp_path / "base")
    settings = {
        "repetition_penalty": 5.0,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 6,
        "bad_words_ids": [[number] for number in range(300, 400)],
        "do_sample": True,
        "temperature": 9.0,
    }
    path = base / "generation_config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | settings))
    prompts = batch.query.prompts
    numbers = random_numbers(0, 0, [str(row) for row in range(len(prompts))], 2, 9)
    written = []

    def never_ends(logits: Tensor) -> Tensor:  # so that it repeats itself
        return logits.index_fill(-1, torch.tensor(stops), -1e4)

    for folder in (micro_base, base):
        backbone = build_backbone(micro_config(folder)).eval()
        stops = [backbone.processor.gen_id, backbone.processor.turn_end_id]
        randomise_adapter(backbone.peft, scale=0.2)
        with changed_logits(backbone, never_ends):
            greedy = write_rewrites(backbone, prompts, max_new_tokens=8).completions.ids
        (sampled,) = sample_rollouts(backbone, [PromptPart(prompts, numbers)])
        written.append((greedy, sampled.completions.ids))
    (greedy, sampled), (greedy_again, sampled_again) = written
    assert greedy.equal(greedy_again) and sampled.equal(sampled_again)
    assert all(len(set(row[:8])) < 8 for row in greedy.tolist()), "a repetition penalty would show"
