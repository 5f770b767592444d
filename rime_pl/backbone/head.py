"""Log-probabilities of given tokens at the head of a language model, a few rows at a time.

Called by mllm.py. With a vocabulary of 150,000, the logits of a batch take more memory than all the rest.
Here only those of one chunk exist. The gradient is made in the forward, because the chunk is at hand there: a
log-probability has its own row of hidden states, so what comes from the loss later only scales this gradient.

Shape legend: M tokens, D width, V vocabulary, K trained rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Logits of a chunk; 128 MiB in float32.
CHUNK = 2**25


@dataclass(frozen=True)
class Table:
    """The weight of the head: a frozen table, some of whose rows are replaced by trained ones."""

    frozen: Tensor  # (V, D)
    trained: Tensor  # (K, D), any float type
    ids: Sequence[int]  # K token ids
    bias: Tensor | None = None  # (V,), frozen


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are sampled from: ``softmax(logits / temperature)``."""

    temperature: float = 1.0  # > 0
    suppressed: Tensor | None = None  # (V,) bool: tokens that are never sampled
    with_entropy: bool = False  # whether the entropy is wanted, too


def token_logprobs(
    hidden: Tensor, table: Table, labels: Tensor, sampling: Sampling = Sampling()
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability of each label, and the entropy of its distribution.

    Args:
        hidden: (M, D), any float type; logits are computed in it, and all else in float32 at least.
        table: The head. Its frozen part gets no gradient.
        labels: (M,) int64; no suppressed tokens.
        sampling: The distribution.

    Returns:
        (M,) float32, in nats; and the same for the entropy, without gradient, or None.

    Example:
        >>> table = Table(torch.zeros(10, 4), torch.zeros(2, 4), [8, 9])
        >>> token_logprobs(torch.ones(1, 4), table, torch.tensor([3]))[0]  # - log 10
        tensor([-2.3026])
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        bias = None if table.bias is None else table.bias.to(dtype)
        logprobs, entropy = _TokenLogprobs.apply(
            hidden.to(dtype),
            table.trained,
            replace(
                table, frozen=table.frozen.to(dtype), trained=table.trained.detach().to(dtype), bias=bias
            ),
            labels,
            sampling,
            torch.is_grad_enabled(),
        )
    return logprobs, entropy if sampling.with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Computes both in chunks, and the gradient of each log-probability for its hidden state."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trained: Tensor,
        table: Table,  # of the type of hidden
        labels: Tensor,
        sampling: Sampling,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        ids = table.ids
        logprobs, entropy = hidden.new_zeros(2, len(hidden), dtype=exact)
        gradient = torch.empty_like(hidden, dtype=exact) if with_gradient else None  # (M, D): of - log p
        of_rows = hidden.new_empty(len(hidden), len(ids), dtype=exact)  # (M, K): of - log p, for their logits
        size = max(1, CHUNK // len(table.frozen))
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            scores = _scores(hidden[part], table, sampling).log_softmax(dim=1, dtype=exact)
            picked = labels[part].unsqueeze(1)
            logprobs[part] = scores.gather(1, picked).squeeze(1)
            if gradient is None and not sampling.with_entropy:
                continue
            slope = scores.exp() if sampling.with_entropy else scores.exp_()  # probabilities (m, V)
            if sampling.with_entropy:
                scores.clamp_(min=torch.finfo(exact).min)  # 0 times -inf is no number
                entropy[part] = -torch.linalg.vecdot(slope, scores)
            if gradient is not None:  # less one at the label
                slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1))
                for number, token in enumerate(ids):
                    of_rows[part, number] = slope[:, token]
                    slope[:, token] = 0
                gradient[part] = slope.to(hidden.dtype) @ table.frozen
                gradient[part].addmm_(of_rows[part], table.trained.to(exact))
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, trained, gradient, of_rows)
        ctx.temperature = sampling.temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, trained, gradient, of_rows = ctx.saved_tensors
        scale = grad.unsqueeze(1) / -ctx.temperature  # (M, 1)
        for_hidden = (gradient * scale).to(hidden.dtype)
        for_trained = ((of_rows * scale).T @ hidden.to(of_rows.dtype)).to(trained.dtype)
        return for_hidden, for_trained, None, None, None, None


def logits(hidden: Tensor, table: Table) -> Tensor:
    """Return the logits (..., V) of hidden states (..., D), in their type."""
    out = F.linear(hidden, table.frozen, table.bias)
    columns = F.linear(hidden, table.trained.to(hidden.dtype))  # (..., K)
    for token, column in zip(table.ids, columns.unbind(-1), strict=True):
        out[..., token] = column if table.bias is None else column + table.bias[token]
    return out


def _scores(hidden: Tensor, table: Table, sampling: Sampling) -> Tensor:
    """Return what the softmax is taken of: logits over the temperature, -inf at suppressed tokens."""
    scores = logits(hidden, table)
    if sampling.temperature != 1:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / sampling.temperature
    if sampling.suppressed is not None:
        scores = scores.masked_fill(sampling.suppressed, float("-inf"))
    return scores
