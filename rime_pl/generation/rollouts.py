"""Sampled rewrites for reinforcement learning, and what a policy thinks of them.

Called by modules/refine_rl.py. The prompt is computed once per item and shared by its rewrites, in sampling
and in scoring. Drawing and scoring go through one function, ``distribution``, so that policy, old policy and
reference can never disagree about suppressed tokens or temperature.

Shape legend: R items, G rewrites each, N = R * G, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.rewriting import close_rewrites, suppressed_tokens
from rime_pl.generation.shared_prompts import ReadPrompts, forward_groups, read_prompts, read_token
from rime_pl.types import Prompts, Rollouts


@dataclass
class Scores:
    """What one model says about rollouts, from one teacher-forced pass."""

    logprobs: Tensor  # (N, C) float32 of the drawn tokens, 0 elsewhere
    entropy: Tensor  # (N, C) float32 without gradient, 0 elsewhere
    gen: Tensor  # (N, D) float32, normalised: the generative embeddings
    disc: Tensor  # (R, D) float32, normalised


def distribution(logits: Tensor, suppressed: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the next token as it is drawn.

    ``log softmax(logits / temperature)`` over the tokens that are not suppressed

    Args:
        logits: (N, V), any float type.
        suppressed: (V,) bool.
        temperature: Divisor, > 0.

    Returns:
        (N, V) float32; suppressed tokens have the lowest finite number.

    Example:
        >>> distribution(torch.zeros(1, 3), torch.tensor([False, True, False]), 1.0).exp().tolist()
        [[0.5, 0.0, 0.5]]
    """
    scores = logits.float() / temperature
    lowest = torch.finfo(torch.float32).min
    return scores.masked_fill(suppressed, float("-inf")).log_softmax(dim=-1).clamp(min=lowest)


def random_numbers(seed: int, position: int, rows: Sequence[str], num_generations: int, steps: int) -> Tensor:
    """The only source of chance of a rollout batch: one stream for each item, whatever process holds it.

    Args:
        seed: Of the run.
        position: Number of the global batch since the start of training.
        rows: Name of each item within the global batch.
        num_generations, steps: G, and the most tokens that a rewrite draws.

    Returns:
        (R * G, steps) float64 in [0, 1), on the CPU.
    """
    drawn = []
    for row in rows:
        digest = hashlib.blake2b(f"{seed} {position} {row}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        drawn.append(torch.rand(num_generations, steps, generator=generator, dtype=torch.float64))
    return torch.cat(drawn)


def draw(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """One token of each row by inversion: the first at which the cumulated probability exceeds the number.

    Args:
        logprobs: (N, V) from :func:`distribution`.
        numbers: (N,) float64 in [0, 1).

    Returns:
        (N,) int64.

    Example:
        >>> draw(torch.tensor([[0.25, 0.0, 0.75]]).log(), torch.tensor([0.3]))
        tensor([2])
    """
    cumulated = logprobs.double().exp().cumsum(dim=-1)
    total = cumulated[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # a product that rounds up to the total finds no token
    wanted = (numbers.to(cumulated).unsqueeze(1) * total).minimum(below)
    at = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    return at.clamp(max=logprobs.shape[1] - 1)  # a broken model (not a number) is told by its loss


@torch.no_grad()
def sample_rollouts(
    backbone: Backbone,
    prompts: Prompts,
    numbers: Tensor,
    temperature: float = 1.0,
    image_features: Any | None = None,
) -> Rollouts:
    """Draw G rewrites of each prompt, up to the first <gen_emb> or end of turn, or the budget.

    Args:
        backbone: The policy.
        prompts: R rows.
        numbers: (R * G, T) from :func:`random_numbers`; T - 1 is the budget, the last draw is for <gen_emb>.
        temperature: Divisor of the logits.
        image_features: From ``Backbone.encode_images``.

    Returns:
        R * G rollouts. Stops when all rows are done.
    """
    processor, training = backbone.processor, backbone.training
    budget = numbers.shape[1] - 1
    numbers = numbers.to(prompts.input_ids.device)
    backbone.eval()  # gradient checkpointing, which acts in training mode, would throw the cache away
    try:
        read = read_prompts(backbone, prompts, len(numbers) // len(prompts), image_features)
        written = sample_tokens(backbone, read, numbers, temperature)
    finally:
        backbone.train(training)
    closed = close_rewrites(written, processor.gen_id, processor.turn_end_id, processor.pad_id, budget)
    labels = torch.full_like(closed.completions.ids, -100)
    width = min(labels.shape[1], written.shape[1])
    drawn = torch.arange(width, device=written.device) <= closed.lengths.unsqueeze(1)
    labels[:, :width] = torch.where(drawn, written[:, :width], -100)
    return Rollouts(closed.completions, labels, closed.lengths, closed.well_formed)


def sample_tokens(backbone: Backbone, read: ReadPrompts, numbers: Tensor, temperature: float) -> Tensor:
    """Draw token after token until all rows have ended, or the numbers are used up.

    Args:
        backbone: In eval mode.
        read: The prompts; its cache grows.
        numbers: (N, T), one for each token.
        temperature: Divisor of the logits.

    Returns:
        (N, up to T) int64; anything after a row's first stop.
    """
    processor = backbone.processor
    hidden, tokens = read.last, []
    done = torch.zeros(len(numbers), dtype=torch.bool, device=numbers.device)
    suppressed: Tensor | None = None
    for step in range(numbers.shape[1]):
        logits = backbone.language_model.lm_head(hidden)
        if suppressed is None:
            suppressed = suppressed_tokens(processor, logits.shape[-1], logits.device)
        tokens.append(draw(distribution(logits, suppressed, temperature), numbers[:, step]))
        done |= (tokens[-1] == processor.gen_id) | (tokens[-1] == processor.turn_end_id)
        if step + 1 == numbers.shape[1] or bool(done.all()):
            break
        hidden = read_token(backbone, read, tokens[-1])
    return torch.stack(tokens, dim=1)


def score_rollouts(
    backbone: Backbone,
    prompts: Prompts,
    rollouts: Rollouts,
    temperature: float = 1.0,
    image_features: Any | None = None,
) -> Scores:
    """One teacher-forced pass: log-probabilities of the drawn tokens, their entropy and both embeddings.

    Args:
        backbone: Policy or reference, dropout off.
        prompts: R rows.
        rollouts: R * G rows.
        temperature: The one that was drawn with.
        image_features: From ``Backbone.encode_images``.
    """
    output = forward_groups(backbone, prompts, rollouts.completions, image_features)
    drawn = rollouts.labels != -100
    logits = backbone.language_model.lm_head(output.before[drawn])
    suppressed = suppressed_tokens(backbone.processor, logits.shape[-1], logits.device)
    logprobs = distribution(logits, suppressed, temperature)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    picked = logprobs.gather(1, rollouts.labels[drawn].unsqueeze(1)).squeeze(1)
    empty = torch.zeros(drawn.shape, device=picked.device)
    return Scores(
        empty.masked_scatter(drawn, picked), empty.masked_scatter(drawn, entropy), output.gen, output.disc
    )
