"""Rewrites that share a prompt get the same numbers and gradients as rows with a prompt each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone.adapters import adapter_values, trained_values
from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.decoding import suppressed_tokens
from rime_pl.generation.rollouts import (
    PromptPart,
    distribution,
    random_numbers,
    sample_rollouts,
    sample_tokens,
    score_rollouts,
)
from rime_pl.types import Batch, Prompts, Rollouts
from tests.conftest import MakeBackbone
from tests.micro import plain_logits, randomise_adapter

G, BUDGET = 3, 10
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def policy(make_backbone: MakeBackbone) -> Backbone:
    return moved(make_backbone(load_in_4bit=False))


def moved(backbone: Backbone) -> Backbone:
    """Give the adapter random values, and the output layer a bias towards both stop tokens."""
    randomise_adapter(backbone.peft, scale=0.1)
    processor = backbone.processor
    bias = torch.zeros(backbone.language_model.get_output_embeddings().weight.shape[0])
    bias[[processor.gen_id, processor.turn_end_id]] = torch.tensor([4.0, 3.0])
    backbone.language_model.lm_head.token_adapter.base_layer.bias = torch.nn.Parameter(
        bias, requires_grad=False
    )
    return backbone


def numbers(rows: int, seed: int = 0) -> Tensor:
    return random_numbers(seed, 5, [f"query {n}" for n in range(rows)], G, BUDGET + 1)


def sample_one(policy: Backbone, prompts: Prompts, given: Tensor, temperature: float = 1.0) -> Rollouts:
    (sampled,) = sample_rollouts(policy, [PromptPart(prompts, given)], temperature)
    return sampled


@pytest.fixture(scope="module")
def rollouts(policy: Backbone, batch: Batch) -> Rollouts:
    return sample_one(policy, batch.query.prompts, numbers(len(batch)), temperature=0.8)


def plain_logprobs(policy: Backbone, prompts: Prompts, rollouts: Rollouts, temperature: float) -> Tensor:
    """The log-probabilities from all logits, where each rewrite has its own copy of the prompt."""
    repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(G))
    logits = plain_logits(policy, repeated, rollouts.completions)  # (N, C, V)
    suppressed = suppressed_tokens(policy.processor, logits.shape[-1], logits.device)
    scores = (logits.masked_fill(suppressed, float("-inf")) / temperature).log_softmax(-1)
    labels = rollouts.labels.masked_fill(rollouts.labels == -100, 5)  # an arbitrary allowed token
    picked = scores.gather(2, labels.unsqueeze(2)).squeeze(2)
    return torch.where(rollouts.labels != -100, picked, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1]])  # mixed; only texts; one picture
def test_shared_prompts_equal_repeated_rows(
    policy: Backbone, batch: Batch, rollouts: Rollouts, rows: list[int]
) -> None:
    index = torch.tensor(rows)
    prompts = batch.query.prompts.select(index)
    mine = rollouts.select((index[:, None] * G + torch.arange(G)).flatten())
    scores = score_rollouts(policy, prompts, mine, 0.8)
    repeated = prompts.select(torch.arange(len(rows)).repeat_interleave(G))
    out = policy(repeated, mine.completions)
    torch.testing.assert_close(scores.gen, out.gen, **CLOSE)
    torch.testing.assert_close(scores.disc, out.disc[::G], **CLOSE)
    torch.testing.assert_close(scores.logprobs, plain_logprobs(policy, prompts, mine, 0.8), **CLOSE)
    features = policy.encode_media(prompts)
    again = score_rollouts(policy, prompts, mine, 0.8, features=features)
    torch.testing.assert_close(again.logprobs, scores.logprobs, **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_repeated_rows(
    checkpointing: bool, make_backbone: MakeBackbone, batch: Batch, rollouts: Rollouts
) -> None:
    """Also the gradient through the prompt, and with gradient checkpointing, which cannot use a cache."""
    found = []
    for shared in (True, False):
        backbone = moved(make_backbone(load_in_4bit=False, gradient_checkpointing=checkpointing and shared))
        weights = torch.randn(rollouts.labels.shape, generator=torch.Generator().manual_seed(0))
        if shared:
            logprobs = score_rollouts(backbone, batch.query.prompts, rollouts, 0.8).logprobs
        else:
            logprobs = plain_logprobs(backbone, batch.query.prompts, rollouts, 0.8)
        (logprobs * weights).sum().backward()
        found.append({n: p.grad for n, p in backbone.named_parameters() if p.requires_grad})
    for name, expected in found[1].items():
        assert expected is not None and expected.norm() > 0, name
        error = (found[0][name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@contextmanager
def tokens_read(backbone: Backbone) -> Iterator[list[tuple[int, ...]]]:
    seen: list[tuple[int, ...]] = []
    handle = backbone.language_model.model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def test_each_prompt_is_read_once(policy: Backbone, batch: Batch) -> None:
    """Sampling then reads one token per step; scoring reads the prompt and its G completions once."""
    prompts = batch.query.prompts
    items, length = prompts.input_ids.shape
    with tokens_read(policy) as seen:
        sampled = sample_one(policy, prompts, numbers(items))
    assert seen[0] == (items, length) and seen[1] == (items * G, 1) > seen[-1]
    # rows that have ended are dropped
    assert all(rows >= later and width == 1 for (rows, width), (later, _) in itertools.pairwise(seen[1:]))
    going = [int((sampled.labels[:, step] != -100).sum()) for step in range(1, len(seen))]
    assert all(rows == 1 or count > 0.75 * rows for (rows, _), count in zip(seen[1:], going, strict=True))
    pictures: list[int] = []
    handle = policy.language_model.model.visual.register_forward_hook(lambda *_: pictures.append(1))
    with tokens_read(policy) as seen, torch.no_grad():
        score_rollouts(policy, prompts, sampled)
    handle.remove()
    tokens = int(prompts.attention_mask.sum() + sampled.completions.mask.sum())
    assert seen == [(1, tokens)] and len(pictures) == 1


@torch.no_grad()
def test_tokens_are_sampled_from_the_scored_distribution(policy: Backbone, batch: Batch) -> None:
    """Each sampled token is computed again from the probabilities of a plain forward and the same number."""
    prompts = batch.query.prompts.select(torch.tensor([0, 1]))
    given = numbers(2)
    sampled = sample_one(policy, prompts, given, temperature=0.7)
    repeated = prompts.select(torch.arange(2).repeat_interleave(G))
    logits = plain_logits(policy, repeated, sampled.completions)  # (N, C, V)
    suppressed = suppressed_tokens(policy.processor, logits.shape[-1], torch.device("cpu"))
    for row, column in (sampled.labels != -100).nonzero().tolist():
        probabilities = (logits[row, column].double() / 0.7).masked_fill(suppressed, float("-inf")).softmax(0)
        sums = itertools.accumulate(probabilities.tolist())
        token = next(number for number, total in enumerate(sums) if total > given[row, column])
        assert token == sampled.labels[row, column].item()


def test_what_rollouts_hold(policy: Backbone, rollouts: Rollouts) -> None:
    processor = policy.processor
    stops = {processor.gen_id, processor.turn_end_id}
    specials = set(processor.special_ids) - stops
    early = 0
    for row in range(len(rollouts)):
        labels = rollouts.labels[row][rollouts.labels[row] != -100].tolist()
        ids = rollouts.completions.ids[row][rollouts.completions.mask[row].bool()].tolist()
        assert not specials & set(labels) and ids[-2:] == [processor.gen_id, processor.turn_end_id]
        assert not stops & set(labels[:-1]) and ids[:-2] == labels[: len(ids) - 2]
        assert len(ids) - 2 == rollouts.lengths[row] <= BUDGET
        ended = labels[-1] == processor.gen_id
        says = processor.tokenizer.decode(labels, skip_special_tokens=True).strip()
        assert rollouts.well_formed[row] == (ended and says != "")
        early += labels[-1] in stops
    assert early > 0, "the fixture holds no rewrite that ends by itself"


def test_rewrites_are_reproducible_and_independent_of_other_rows(
    policy: Backbone, batch: Batch, rollouts: Rollouts
) -> None:
    again = sample_one(policy, batch.query.prompts, numbers(6), temperature=0.8)
    assert again.labels.equal(rollouts.labels)
    other = sample_one(policy, batch.query.prompts, numbers(6, seed=1), temperature=0.8)
    assert other.labels.shape != rollouts.labels.shape or not other.labels.equal(rollouts.labels)
    half = batch.query.prompts.select(torch.tensor([3, 4, 5]))
    mine = random_numbers(0, 5, ["query 3", "query 4", "query 5"], G, BUDGET + 1)
    got = sample_one(policy, half, mine, temperature=0.8)
    width = min(got.labels.shape[1], rollouts.labels.shape[1])
    assert got.labels[:, :width].equal(rollouts.labels[3 * G :, :width])


def test_parts_of_any_length_are_written_together(policy: Backbone, batch: Batch, rollouts: Rollouts) -> None:
    """Each part gets the rewrites that it gets without the others, whatever the width of its prompts."""
    rows = (torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.tensor([5]))
    prompts = [batch.query.select(some).prompts for some in rows]
    given = numbers(6).split([len(some) * G for some in rows])
    parts = [PromptPart(one, some) for one, some in zip(prompts, given, strict=True)]
    assert len({one.input_ids.shape[1] for one in prompts}) > 1
    with tokens_read(policy) as seen:
        together = sample_rollouts(policy, parts, temperature=0.8)
    assert [read for read, _ in seen[:3]] == [3, 2, 1], "prompts are read part by part"
    longest = max(int((sampled.labels != -100).sum(1).max()) for sampled in together)
    assert len(seen) == 3 + longest - 1, "one loop writes them"
    for some, sampled in zip(rows, together, strict=True):
        of = (some.unsqueeze(1) * G + torch.arange(G)).flatten()
        width = sampled.labels.shape[1]
        assert sampled.labels.equal(rollouts.labels[of, :width])
        assert rollouts.labels[of, width:].eq(-100).all()


def test_sampling_stops_when_all_rows_are_done(policy: Backbone, batch: Batch) -> None:
    """A model that can only end its rewrite: one forward, whatever the budget."""
    prompts, head = batch.query.prompts, policy.language_model.lm_head
    handle = head.register_forward_hook(
        lambda module, args, out: (
            F.one_hot(torch.tensor(policy.processor.gen_id), out.shape[-1]) * 1e4 + 0 * out
        )
    )
    with tokens_read(policy) as seen:
        sampled = sample_one(policy, prompts, numbers(6))
    handle.remove()
    assert len(seen) == 1 and sampled.lengths.eq(0).all() and not sampled.well_formed.any()
    assert policy.training, "the mode is restored"


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    logprobs = distribution(logits, torch.tensor([False, False, False, True]), temperature=2.0)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sample_tokens(logprobs.expand(20000, -1), uniform).bincount(minlength=4) / 20000
    assert counts[3] == 0
    torch.testing.assert_close(counts, logprobs[0].exp(), atol=0.01, rtol=0)
    edges = sample_tokens(logprobs.expand(2, -1), torch.tensor([0.0, 1 - 1e-16]))
    assert edges.tolist() == [0, 2]


@torch.no_grad()
def test_reference_values_over_the_same_base(make_backbone: MakeBackbone, batch: Batch) -> None:
    backbone = make_backbone()
    reference = trained_values(backbone)
    before = backbone(batch.query.prompts).disc
    randomise_adapter(backbone.peft)
    after = backbone(batch.query.prompts).disc
    with adapter_values(backbone, reference):
        torch.testing.assert_close(backbone(batch.query.prompts).disc, before, atol=0, rtol=0)
    torch.testing.assert_close(backbone(batch.query.prompts).disc, after, atol=0, rtol=0)
    assert (after - before).norm() > 0.1
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="no_grad"),
        adapter_values(backbone, reference),
    ):
        pass
