"""The two terms of CMA: closed form, naive loop, gradient, extreme temperatures."""

import math

import pytest
import torch
from torch import Tensor

from rime_pl.losses.alignment import cross_mode_alignment, decisive_rewrite
from rime_pl.losses.contrastive import same_content
from rime_pl.types import ModeEmbeddings


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).requires_grad_()


def naive_nce(queries: Tensor, targets: Tensor, temperature: float, skip: Tensor) -> float:
    scores = (queries @ targets.T / temperature).tolist()
    rows, total = len(scores), 0.0
    for i in range(rows):
        row = sum(math.exp(scores[i][j]) for j in range(rows) if not skip[i, j])
        column = sum(math.exp(scores[j][i]) for j in range(rows) if not skip[j, i])
        total += 0.5 * (math.log(row) + math.log(column)) - scores[i][i]
    return total / rows


def test_alignment_crosses_the_modes() -> None:
    g_q, d_q, g_t, d_t = (unit(5, seed) for seed in range(4))
    contents = torch.tensor([[1, 5], [1, 6], [2, 7], [3, 8], [4, 8]])
    skip = same_content(*contents.T)
    loss = cross_mode_alignment(
        ModeEmbeddings(disc=d_q, gen=g_q), ModeEmbeddings(disc=d_t, gen=g_t), 0.1, contents
    )
    expected = naive_nce(g_q, d_t, 0.1, skip) + naive_nce(d_q, g_t, 0.1, skip)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_alignment_in_closed_form() -> None:
    """Two orthogonal pairs: equal modes cost 2 log(1 + e^(-1/tau)), swapped targets 2/tau more."""
    eye, swapped = torch.eye(2), torch.eye(2).flip(0)
    agree = cross_mode_alignment(ModeEmbeddings(eye, eye), ModeEmbeddings(eye, eye), 0.5)
    assert agree.item() == pytest.approx(2 * math.log(1 + math.exp(-2)), rel=1e-5)
    apart = cross_mode_alignment(ModeEmbeddings(eye, eye), ModeEmbeddings(swapped, swapped), 0.5)
    assert (apart - agree).item() == pytest.approx(2 / 0.5, rel=1e-5)


@pytest.mark.parametrize("margin", [1.0, 4.0])
def test_decisive_equals_the_naive_loop(margin: float) -> None:
    own, wrong, g_t, d_t = (unit(5, seed).detach() for seed in range(4, 8))
    total = 0.0
    for i in range(5):
        for target in (g_t, d_t):
            gap = sum(float((wrong[i, k] - own[i, k]) * target[i, k]) for k in range(4)) / 0.05
            total += math.log1p(math.exp(gap + margin)) / 5
    loss = decisive_rewrite(own, wrong, ModeEmbeddings(disc=d_t, gen=g_t), 0.05, margin)
    assert loss.item() == pytest.approx(total, rel=1e-9)


def test_decisive_in_closed_form() -> None:
    """The own rewrite equals the target and the wrong one is orthogonal, so both gaps are -1/tau."""
    own, wrong = torch.eye(4)[:2], torch.eye(4)[2:]
    loss = decisive_rewrite(own, wrong, ModeEmbeddings(own, own), temperature=0.5)
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-1)), rel=1e-5)


def test_decisive_pushes_the_wrong_rewrite_away_from_the_target() -> None:
    own, wrong, target = unit(3, 8), unit(3, 9), unit(3, 10).detach()
    decisive_rewrite(own, wrong, ModeEmbeddings(target, target), 0.5).backward()
    assert own.grad is not None and wrong.grad is not None
    assert ((own.grad * target).sum(-1) < 0).all() and ((wrong.grad * target).sum(-1) > 0).all()


def test_gradients_are_right_in_float64() -> None:
    a, b, c, d = (unit(3, seed) for seed in range(11, 15))
    assert torch.autograd.gradcheck(
        lambda dq, gq, dt, gt: cross_mode_alignment(ModeEmbeddings(dq, gq), ModeEmbeddings(dt, gt), 0.3),
        (a, b, c, d),
    )
    assert torch.autograd.gradcheck(
        lambda own, wrong, dt, gt: decisive_rewrite(own, wrong, ModeEmbeddings(dt, gt), 0.3), (a, b, c, d)
    )


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    own, wrong, target = unit(3, 15), unit(3, 16), unit(3, 17).detach()
    loss = decisive_rewrite(own, wrong, ModeEmbeddings(target, target), temperature)
    loss.backward()
    assert loss.isfinite() and own.grad is not None and own.grad.isfinite().all()
