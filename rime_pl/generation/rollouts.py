"""Sample rewrites for reinforcement learning, and compute the log-probabilities that a model gives them.

Called by modules/refine_rl.py. Each prompt is computed once and shared by its G rewrites. Sampling and
scoring both use ``distribution``, so that policy, old policy and reference suppress the same tokens.

Shape legend: R items, G rewrites each, N = R * G, C completion tokens, V vocabulary, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_pl.backbone.head import Sampling
from rime_pl.backbone.mllm import Backbone, MediaFeatures
from rime_pl.generation.decoding import decode, join_states, prefill, suppressed_tokens
from rime_pl.generation.rewriting import finish_rewrites
from rime_pl.types import Prompts, Rollouts


@dataclass
class Scores:
    """What one teacher-forced pass of a model gives for N rewrites of R items."""

    logprobs: Tensor  # (N, C) float32: log-probabilities of the sampled tokens, 0 elsewhere
    entropy: Tensor | None  # (N, C) float32 without gradient, 0 elsewhere; None if not wanted
    gen: Tensor  # (N, D) float32, normalised: generative embeddings
    disc: Tensor  # (R, D) float32, normalised: discriminative embeddings


def distribution(logits: Tensor, suppressed: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities from which the next token is sampled.

    ``log softmax(logits / temperature)`` over the tokens that are not suppressed

    Args:
        logits: (N, V), any float type.
        suppressed: (V,) bool.
        temperature: Divisor, > 0.

    Returns:
        (N, V) float32; the lowest finite number at suppressed tokens.

    Example:
        >>> distribution(torch.zeros(1, 3), torch.tensor([False, True, False]), 1.0).exp().tolist()
        [[0.5, 0.0, 0.5]]
    """
    scores = logits.float() / temperature
    lowest = torch.finfo(torch.float32).min
    return scores.masked_fill(suppressed, float("-inf")).log_softmax(dim=-1).clamp(min=lowest)


def random_numbers(seed: int, position: int, rows: Sequence[str], num_generations: int, steps: int) -> Tensor:
    """Return the random numbers of a batch of rollouts; nothing else in sampling is random.

    Each item has a generator of its own, so the numbers do not depend on which process holds the item.

    Args:
        seed: Seed of the run.
        position: Number of the global batch since the start of training.
        rows: Name of each of the R items within the global batch.
        num_generations: G.
        steps: Maximum number of tokens that are sampled for a rewrite.

    Returns:
        (N, steps) float64 in [0, 1), on the CPU.
    """
    numbers = []
    for row in rows:
        digest = hashlib.blake2b(f"{seed} {position} {row}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        numbers.append(torch.rand(num_generations, steps, generator=generator, dtype=torch.float64))
    return torch.cat(numbers)


def sample_tokens(logprobs: Tensor, numbers: Tensor) -> Tensor:
    """Sample one token of each row: the first whose cumulative probability exceeds the random number.

    Args:
        logprobs: (N, V) from :func:`distribution`.
        numbers: (N,) float64 in [0, 1).

    Returns:
        (N,) int64.

    Example:
        >>> sample_tokens(torch.tensor([[0.25, 0.0, 0.75]]).log(), torch.tensor([0.3]))
        tensor([2])
    """
    cumulated = logprobs.double().exp().cumsum(dim=-1)  # (N, V)
    total = cumulated[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # a product that rounds up to the total finds no token
    wanted = (numbers.to(cumulated).unsqueeze(1) * total).minimum(below)  # (N, 1)
    at = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    # with NaN no token is found; the loss then reports that the model is broken
    return at.clamp(max=logprobs.shape[1] - 1)


@dataclass(frozen=True)
class PromptPart:
    """R items whose rewrites are to be sampled."""

    prompts: Prompts  # R rows
    numbers: Tensor  # (N, T) from ``random_numbers``; T is the budget plus 1, for <gen_emb>
    images: Any | None = None  # from ``Backbone.encode_media``


@torch.no_grad()
def sample_rollouts(
    backbone: Backbone, parts: Sequence[PromptPart], temperature: float = 1.0
) -> list[Rollouts]:
    """Sample G rewrites of each prompt, each up to its first <gen_emb> or end of turn, or to the budget.

    The prompts are read part by part, and the rewrites of all parts are written together.

    Args:
        backbone: The policy.
        parts: All with the same T.
        temperature: Divisor of the logits.

    Returns:
        N rewrites of each part, the G of an item together.
    """
    training = backbone.training
    device = parts[0].prompts.input_ids.device
    numbers = torch.cat([part.numbers for part in parts]).to(device)  # (all N, T)
    suppressed: Tensor | None = None

    def sampled(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        nonlocal suppressed
        if suppressed is None:
            suppressed = suppressed_tokens(backbone.processor, logits.shape[-1], logits.device)
        return sample_tokens(distribution(logits, suppressed, temperature), numbers[rows, step])

    if training:  # gradient checkpointing would discard the cache of keys and values
        backbone.eval()
    try:
        read = [
            prefill(backbone, part.prompts, len(part.numbers) // len(part.prompts), part.images)
            for part in parts
        ]
        written = decode(backbone, join_states(read), numbers.shape[1], sampled)
    finally:
        if training:
            backbone.train()
    sizes = [len(part.numbers) for part in parts]
    budget = numbers.shape[1] - 1
    return [finish_rewrites(rows, backbone.processor, budget) for rows in written.split(sizes)]


def score_rollouts(
    backbone: Backbone,
    prompts: Prompts,
    rollouts: Rollouts,
    temperature: float = 1.0,
    features: MediaFeatures | None = None,
    with_entropy: bool = False,
) -> Scores:
    """Return log-probabilities of the sampled tokens and both embeddings, from one forward.

    Args:
        backbone: Policy or reference, dropout off.
        prompts: R rows.
        rollouts: N rows.
        temperature: The temperature of the sampling.
        features: From ``Backbone.encode_media``.
        with_entropy: Whether the entropy of the tokens' distributions is wanted, too.
    """
    sampled = rollouts.labels != -100  # (N, C), M of them True
    suppressed = suppressed_tokens(backbone.processor, len(backbone.head().frozen), sampled.device)
    sampling = Sampling(temperature, suppressed, with_entropy)
    output = backbone(prompts, rollouts.completions, rollouts.labels, features, sampling=sampling)
    empty = torch.zeros(sampled.shape, device=sampled.device)
    return Scores(
        empty.masked_scatter(sampled, output.logprobs),
        None if output.entropy is None else empty.masked_scatter(sampled, output.entropy),
        output.gen,
        output.disc,
    )
