"""Log-probabilities in chunks equal those of a plain softmax, with their gradients, in far less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone import head, mllm
from rime_pl.backbone.head import Sampling, Table, token_logprobs
from rime_pl.backbone.mllm import Backbone
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import randomise_adapter

V, D, IDS = 23, 6, [4, 17]


def example(
    rows: int, dtype: torch.dtype = torch.float64, bias: bool = False
) -> tuple[Tensor, Table, Tensor]:
    """Hidden states and trained rows with a gradient, and labels that hold the trained tokens, too."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    trained = normal(2, D).requires_grad_()
    table = Table(normal(V, D), trained, IDS, normal(V) if bias else None)
    labels = torch.randint(V - 1, (rows,), generator=generator)
    labels[: len(IDS)] = torch.tensor(IDS)[:rows]
    return normal(rows, D).requires_grad_(), table, labels


def plain(hidden: Tensor, table: Table, labels: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The same from all logits at once, by autograd, with the trained rows copied into the table."""
    trained = table.trained.to(hidden.dtype)
    whole = table.frozen.index_copy(0, torch.tensor(table.ids), trained)
    logits = F.linear(hidden, whole, table.bias)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    scores = logits.to(exact) / sampling.temperature
    if sampling.suppressed is not None:
        scores = scores[:, ~sampling.suppressed]
        labels = labels - sampling.suppressed.cumsum(0)[labels]
    logprobs = scores.log_softmax(1)
    return logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows}_rows_a_chunk")
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", request.param * V)


LAST_SUPPRESSED = torch.arange(V) >= V - 1
CASES = {
    "plain": (Sampling(), False),
    "temperature": (Sampling(0.7), False),
    "suppressed": (Sampling(1.3, LAST_SUPPRESSED), False),
    "bias": (Sampling(), True),
}


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("sampling", "bias"), CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_a_softmax(sampling: Sampling, bias: bool) -> None:
    hidden, table, labels = example(8, bias=bias)
    expected, expected_entropy = plain(hidden, table, labels, sampling)
    found, entropy = token_logprobs(hidden, table, labels, replace(sampling, with_entropy=True))
    assert entropy is not None and not entropy.requires_grad
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    weight = torch.linspace(-1, 2, 8, dtype=torch.float64)
    inputs = [hidden, table.trained]
    wanted = torch.autograd.grad((weight * expected).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((weight * found).sum(), inputs), wanted)


@pytest.mark.usefixtures("chunked")
def test_numerical_gradient() -> None:
    hidden, table, labels = example(5)

    def function(hidden: Tensor, trained: Tensor) -> Tensor:
        return token_logprobs(hidden, replace(table, trained=trained), labels, Sampling(0.8))[0]

    assert torch.autograd.gradcheck(function, (hidden, table.trained))


def test_no_tokens_give_a_zero_gradient() -> None:
    hidden, table, labels = example(0)
    found, _ = token_logprobs(hidden, table, labels)
    gradient = torch.autograd.grad(found.sum(), [hidden, table.trained])
    assert len(found) == 0 and gradient[1].equal(torch.zeros(2, D, dtype=torch.float64))


def test_without_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of the gradient cache, the reference of Refine-RL, and evaluation."""
    hidden, table, labels = example(4)
    expected = token_logprobs(hidden, table, labels)[0].detach()
    scatter: Any = Tensor.scatter_add_
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *a: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert token_logprobs(hidden, table, labels)[0].equal(expected)
    monkeypatch.setattr(Tensor, "scatter_add_", scatter)


def far_from(exact: Tensor, found: Tensor) -> float:
    exact, found = exact.detach().double(), found.detach().double()
    return float((found - exact).norm() / exact.norm())


def test_bfloat16_is_as_near_the_truth_as_a_softmax() -> None:
    """Hidden states and table are bfloat16, the trained rows float32, as with configs/cma.yaml.

    The gradient of the hidden states is rounded once more, when the loss scales it.
    """
    hidden, table, labels = example(400, torch.bfloat16)
    table = replace(table, trained=table.trained.detach().float().requires_grad_())
    inputs = [hidden, table.trained]
    errors: dict[str, list[float]] = {}
    exact_table = Table(table.frozen.double(), table.trained.double(), IDS)
    truth = plain(hidden.double(), exact_table, labels, Sampling())[0]
    true_gradients = torch.autograd.grad(truth.sum() / 400, inputs)
    for name, function in (("softmax", plain), ("chunks", token_logprobs)):
        found = function(hidden, table, labels, Sampling())[0]
        assert found.dtype == torch.float32
        pairs = zip(true_gradients, torch.autograd.grad(found.sum() / 400, inputs), strict=True)
        errors[name] = [far_from(truth, found), *(far_from(one, other) for one, other in pairs)]
    for chunks, softmax, bound in zip(errors["chunks"], errors["softmax"], (1.01, 1.15, 0.75), strict=True):
        assert chunks <= bound * softmax, errors


def test_bfloat16_gradients_of_a_model_are_no_further_from_float32(
    make_backbone: MakeBackbone, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = batch.query
    rounded, exact = (make_backbone(load_in_4bit=False, dtype=t) for t in ("bfloat16", "float32"))
    randomise_adapter(rounded.peft)
    exact.load_state_dict(rounded.state_dict())  # the rounded values, in float32

    def gradients(backbone: Backbone) -> Tensor:
        loss = -backbone(rows.prompts, rows.completions, rows.labels).logprobs.mean()
        found = torch.autograd.grad(loss, [p for p in backbone.parameters() if p.requires_grad])
        return torch.cat([one.flatten() for one in found])

    truth, chunks = gradients(exact), gradients(rounded)
    monkeypatch.setattr(mllm, "token_logprobs", lambda h, t, labels, s: (plain(h, t, labels, s)[0], None))
    softmax = gradients(rounded)
    assert not softmax.equal(chunks), "the plain way must have run"
    assert 0 < far_from(truth, chunks) <= 1.02 * far_from(truth, softmax) < 0.2


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows, width = 5000, 300, 8
    monkeypatch.setattr(head, "CHUNK", 20 * vocabulary)
    hidden = torch.randn(rows, width, requires_grad=True)
    table = Table(torch.randn(vocabulary, width), torch.randn(2, width, requires_grad=True), IDS)
    labels = torch.arange(rows)
    peaks = {}
    for name, function in (("softmax", plain), ("chunks", token_logprobs)):
        with LiveBytes([hidden, table.frozen, table.trained]) as live:
            (-function(hidden, table, labels, Sampling())[0].sum()).backward()
        peaks[name] = live.peak.total()
    assert peaks["chunks"] < 4 * 20 * vocabulary * 4 < 0.2 * peaks["softmax"], peaks


def test_autocast_computes_in_its_type() -> None:
    hidden, table, labels = example(6, torch.float32)
    expected = token_logprobs(hidden.bfloat16(), replace(table, frozen=table.frozen.bfloat16()), labels)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logprobs(hidden, table, labels)[0]
    assert found.equal(expected) and found.dtype == torch.float32
    found.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
