"""Token cross-entropy: naive loop, chunks with the global divisor, no labels, gradient."""

import math

import pytest
import torch

from rime_pl.losses.language_modeling import token_cross_entropy


def some_logits(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 11, generator=generator, dtype=dtype)
    return logits, torch.randint(11, (rows,), generator=generator)


def test_equals_the_naive_loop() -> None:
    logits, labels = some_logits(9)
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total += math.log(sum(math.exp(value) for value in row)) - row[label]
    assert token_cross_entropy(logits, labels, 9).item() == pytest.approx(total / 9, rel=1e-5)


def test_uniform_logits_cost_log_of_the_vocabulary() -> None:
    assert token_cross_entropy(torch.zeros(4, 11), torch.arange(4), 4).item() == pytest.approx(math.log(11))


def test_unequal_chunks_sum_to_the_whole_with_the_global_divisor() -> None:
    """The mean of the chunk means would be wrong here, because the last chunk has only one label."""
    logits, labels = some_logits(13)
    logits.requires_grad_()
    whole = token_cross_entropy(logits, labels, 13)
    (expected,) = torch.autograd.grad(whole, logits)
    cuts = [7, 5, 1]
    chunks = [
        token_cross_entropy(part, label, torch.tensor(13))
        for part, label in zip(logits.split(cuts), labels.split(cuts), strict=True)
    ]
    torch.testing.assert_close(sum(chunks), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(chunks), logits)[0], expected)


def test_without_labels_it_is_zero_and_has_a_gradient() -> None:
    """A rank whose rows have no rewrite must still take part in the backward pass."""
    weight = torch.ones(11, 3, requires_grad=True)
    for divisor in (0, 5):
        loss = token_cross_entropy(torch.zeros(0, 3) @ weight.T, torch.zeros(0, dtype=torch.int64), divisor)
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, weight)
        assert grad.abs().max() == 0


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, labels = some_logits(300, torch.bfloat16)
    loss = token_cross_entropy(logits, labels, 300)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_cross_entropy(logits.double(), labels, 300).float())


def test_gradient_is_right() -> None:
    """The loss computes in float32, so the check in float64 needs the tolerance of float32."""
    logits, labels = some_logits(4, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: token_cross_entropy(x, labels, 6), (logits,), eps=1e-2, atol=1e-3, rtol=1e-2
    )
