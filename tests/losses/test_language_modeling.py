"""Token cross-entropy: a plain softmax, chunks with the global divisor, no labels, gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.losses.language_modeling import token_cross_entropy


def some_logprobs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over 11 tokens, labels, and the log-probabilities of these."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (rows,), generator=generator)
    return logits, labels, logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def test_equals_torch_with_its_gradient() -> None:
    logits, labels, logprobs = some_logprobs(9)
    expected, found = F.cross_entropy(logits, labels), token_cross_entropy(logprobs, 9)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(torch.autograd.grad(found, logits), wanted)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_unequal_chunks_sum_to_the_whole_with_the_global_divisor(kind: type) -> None:
    """The mean of the chunk means would be wrong here, because the last chunk has only one label."""
    logits, labels, logprobs = some_logprobs(13)
    chunks = sum(token_cross_entropy(part, kind(13)) for part in logprobs.split([7, 5, 1]))
    torch.testing.assert_close(chunks, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("divisor", [0, 5])
def test_without_labels_it_is_zero_and_has_a_gradient(divisor: int) -> None:
    """A rank whose rows have no rewrite must still take part in the backward pass."""
    weight = torch.ones(3, requires_grad=True)
    loss = token_cross_entropy(torch.zeros(0, 3) @ weight, divisor)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.equal(torch.zeros(3))
