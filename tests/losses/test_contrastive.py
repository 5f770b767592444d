"""InfoNCE: closed form, naive loop without false negatives, gradient, extreme temperatures, blocks."""

import math

import pytest
import torch
from torch import Tensor

from rime_pl.losses.contrastive import info_nce, mean_negatives, same_content


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def naive_info_nce(queries: Tensor, targets: Tensor, temperature: float, skip: Tensor) -> float:
    """Both directions as loops over pairs, written out from the definition."""
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
    no_pair = torch.zeros(6, 6, dtype=torch.bool)
    expected = naive_info_nce(queries, targets, temperature, no_pair)
    assert info_nce(queries, targets, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_false_negatives_are_left_out_of_both_directions() -> None:
    queries, targets = unit(6, 5, seed=1, dtype=torch.float64), unit(6, 5, seed=2, dtype=torch.float64)
    contents = torch.tensor([[1, 7], [2, 7], [3, 8], [4, 9], [5, 9], [2, 6]])
    expected = naive_info_nce(queries, targets, 0.1, same_content(*contents.T))
    masked = info_nce(queries, targets, 0.1, contents)
    assert masked.item() == pytest.approx(expected, rel=1e-9)
    assert masked < info_nce(queries, targets, 0.1)


@pytest.mark.parametrize("rows", [0, 1, 9, 40])
def test_mean_negatives_counts_what_the_loss_compares_with(rows: int) -> None:
    contents = torch.randint(6, (rows, 2), generator=torch.Generator().manual_seed(rows))
    negatives = ~same_content(*contents.T) & ~torch.eye(rows, dtype=torch.bool)
    expected = negatives.sum(1).float().mean() if rows else torch.tensor(0.0)
    torch.testing.assert_close(mean_negatives(contents), expected)


def test_same_content_equals_the_naive_loop() -> None:
    query, target = torch.tensor([1, 2, 3, 2, 9]), torch.tensor([5, 6, 5, 7, 8])
    expected = [
        [i != j and bool(query[i] == query[j] or target[i] == target[j]) for j in range(5)] for i in range(5)
    ]
    assert same_content(query, target).tolist() == expected


def test_a_masked_pair_gets_no_gradient() -> None:
    queries, targets = unit(2, 4, seed=3).requires_grad_(), unit(2, 4, seed=4).requires_grad_()
    info_nce(queries, targets, 0.1, torch.tensor([[1, 2], [1, 3]])).backward()
    assert queries.grad is not None and queries.grad.abs().max() == 0


def test_gradient_is_right_in_float64() -> None:
    queries = unit(4, 3, seed=5, dtype=torch.float64).requires_grad_()
    targets = unit(4, 3, seed=6, dtype=torch.float64).requires_grad_()
    contents = torch.tensor([[1, 4], [2, 5], [1, 6], [3, 7]])
    for block_size in (64, 8):  # the whole matrix, and two rows at a time
        assert torch.autograd.gradcheck(
            lambda q, t, size=block_size: info_nce(q, t, 0.2, contents, block_size=size), (queries, targets)
        )


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
    with pytest.raises(ValueError, match=rf"temperature must be greater than 0 .* but is {temperature}"):
        info_nce(torch.eye(2), torch.eye(2), temperature)


@pytest.mark.parametrize("block_size", [1, 7, 14, 30, 48])  # 1, 1, 2, 4 and 6 of 7 rows at a time
def test_blocks_of_rows_change_neither_loss_nor_gradients(block_size: int) -> None:
    contents = torch.tensor([[1, 7], [2, 7], [3, 8], [4, 9], [5, 9], [2, 6], [1, 1]])
    seen = []
    for size in (49, block_size):
        queries, targets = (unit(7, 5, seed=n, dtype=torch.float64).requires_grad_() for n in (1, 2))
        loss = info_nce(queries, targets, 0.05, contents, block_size=size)
        gradients = torch.autograd.grad(loss, (queries, targets))
        seen.append(torch.cat([part.flatten() for part in (loss, *gradients)]))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)


def test_the_matrix_of_scores_is_not_kept() -> None:
    """What autograd saves grows with the number of rows, not with its square."""

    def saved_numbers(pairs: int, block_size: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        queries, targets = (unit(pairs, 8, seed=n).requires_grad_() for n in (1, 2))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = info_nce(
                queries, targets, 0.1, torch.arange(2 * pairs).view(pairs, 2), block_size=block_size
            )
        assert loss.requires_grad
        return sum(sizes.values())

    assert saved_numbers(128, 128 * 128) > 2 * 128 * 128
    assert saved_numbers(128, 4 * 128) < 128 * 128 / 2
