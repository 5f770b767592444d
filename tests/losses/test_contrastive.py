"""InfoNCE: closed form, naive loop with twins left out, gradient, extreme temperatures."""

import math

import pytest
import torch
from torch import Tensor

from rime_pl.losses.contrastive import info_nce, same_content


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def naive_info_nce(queries: Tensor, targets: Tensor, temperature: float, skip: Tensor) -> float:
    """Both directions as loops over pairs, from the definition."""
    rows, total = len(queries), 0.0
    for i in range(rows):
        for a, b, transposed in ((queries, targets, False), (targets, queries, True)):
            partners = [j for j in range(rows) if not (skip[j, i] if transposed else skip[i, j])]
            scores = {j: float(a[i] @ b[j]) / temperature for j in partners}
            log_sum = math.log(sum(math.exp(score) for score in scores.values()))
            total += (log_sum - scores[i]) / (2 * rows)
    return total


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_closed_form_of_orthogonal_pairs(rows: int, temperature: float) -> None:
    eye = torch.eye(rows)
    expected = math.log(1 + (rows - 1) * math.exp(-1 / temperature))
    assert info_nce(eye, eye, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_constant_embeddings_cost_log_of_the_batch() -> None:
    constant = unit(1, 8, seed=0).expand(7, 8)
    assert info_nce(constant, constant, 0.02).item() == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.02, 0.3])
def test_equals_the_naive_loop(temperature: float) -> None:
    queries, targets = unit(6, 5, seed=1, dtype=torch.float64), unit(6, 5, seed=2, dtype=torch.float64)
    nobody = torch.zeros(6, 6, dtype=torch.bool)
    expected = naive_info_nce(queries, targets, temperature, nobody)
    assert info_nce(queries, targets, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_twins_are_left_out_of_both_directions() -> None:
    queries, targets = unit(6, 5, seed=1, dtype=torch.float64), unit(6, 5, seed=2, dtype=torch.float64)
    skip = same_content(torch.tensor([1, 2, 3, 4, 5, 2]), torch.tensor([7, 7, 8, 9, 9, 6]))
    expected = naive_info_nce(queries, targets, 0.1, skip)
    masked = info_nce(queries, targets, 0.1, skip)
    assert masked.item() == pytest.approx(expected, rel=1e-9)
    assert masked < info_nce(queries, targets, 0.1)


def test_same_content_equals_the_naive_loop() -> None:
    query, target = torch.tensor([1, 2, 3, 2, 9]), torch.tensor([5, 6, 5, 7, 8])
    expected = [
        [i != j and bool(query[i] == query[j] or target[i] == target[j]) for j in range(5)] for i in range(5)
    ]
    assert same_content(query, target).tolist() == expected


def test_a_masked_pair_gets_no_gradient() -> None:
    queries, targets = unit(2, 4, seed=3).requires_grad_(), unit(2, 4, seed=4).requires_grad_()
    info_nce(queries, targets, 0.1, ~torch.eye(2, dtype=torch.bool)).backward()
    assert queries.grad is not None and queries.grad.abs().max() == 0


def test_gradient_is_right_in_float64() -> None:
    queries = unit(4, 3, seed=5, dtype=torch.float64).requires_grad_()
    targets = unit(4, 3, seed=6, dtype=torch.float64).requires_grad_()
    skip = same_content(torch.tensor([1, 2, 1, 3]), torch.tensor([4, 5, 6, 7]))
    assert torch.autograd.gradcheck(lambda q, t: info_nce(q, t, 0.2, skip), (queries, targets))


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    queries, targets = unit(8, 4, seed=7).requires_grad_(), unit(8, 4, seed=8)
    loss = info_nce(queries, targets, temperature)
    loss.backward()
    assert loss.isfinite() and queries.grad is not None and queries.grad.isfinite().all()
    if temperature > 1:  # all scores equal: log of the batch size
        assert loss.item() == pytest.approx(math.log(8), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, -0.02])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature={temperature} must be > 0"):
        info_nce(torch.eye(2), torch.eye(2), temperature)
