"""The policy loss: closed form, a naive loop, and the loss of TRL on the same tensors, value and gradient."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from rime_pl.losses.policy_gradient import (
    Divisors,
    embedding_drift,
    k2_divergence,
    k3_divergence,
    policy_loss,
)

LOSS_TYPES = ["grpo", "dr_grpo", "dapo"]
MAX_TOKENS = 9


def tensors(seed: int, spread: float = 0.5) -> dict[str, Tensor]:
    """6 rows of 1 to 7 tokens in float64, with ratios so far from 1 that both clips act."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 8, (6,), generator=generator)
    logprobs = -normal(6, 7).abs()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * normal(6, 7),
        "ref_logprobs": logprobs + spread * normal(6, 7),
        "advantages": normal(6),
        "mask": (torch.arange(7) < lengths.unsqueeze(1)).long(),
    }


def divisors_of(given: dict[str, Tensor]) -> Divisors:
    return Divisors(num_rows=6, num_tokens=int(given["mask"].sum()), max_tokens=MAX_TOKENS)


def ours(given: dict[str, Tensor], loss_type: str, kl_coef: float) -> tuple[float, Tensor]:
    logprobs = given["logprobs"].clone().requires_grad_()
    out = policy_loss(
        logprobs,
        given["old_logprobs"],
        given["advantages"],
        given["mask"],
        given["ref_logprobs"],
        divisors_of(given),
        loss_type,  # type: ignore[arg-type]
        kl_coef=kl_coef,
    )
    out.loss.backward()
    assert logprobs.grad is not None
    return out.loss.item(), logprobs.grad


def trl_loss(given: dict[str, Tensor], loss_type: str, kl_coef: float) -> tuple[float, Tensor]:
    """Call ``GRPOTrainer._compute_loss`` unbound, on a stub that returns our log-probabilities."""
    logprobs = given["logprobs"].clone().requires_grad_()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    metrics: dict[str, Any] = {"train": _Lists()}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_coef,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        accelerator=accelerator,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )
    mask = given["mask"]
    inputs = {
        "prompt_ids": torch.zeros(6, 1, dtype=torch.long),
        "prompt_mask": torch.ones(6, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        self[key] = []
        return self[key]


@pytest.mark.parametrize("kl_coef", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_trl(loss_type: str, kl_coef: float) -> None:
    for seed in range(5):
        given = tensors(seed)
        value, gradient = ours(given, loss_type, kl_coef)
        expected, expected_gradient = trl_loss(given, loss_type, kl_coef)
        assert value == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=0)
        assert gradient.abs().max() > 1e-3, "nothing to compare"


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_the_naive_loop(loss_type: str) -> None:
    given = tensors(7)
    rows, total = [], 0.0
    for row in range(6):
        terms = []
        for t in range(int(given["mask"][row].sum())):
            logp, old, ref = (given[n][row, t].item() for n in ("logprobs", "old_logprobs", "ref_logprobs"))
            advantage, ratio = given["advantages"][row].item(), math.exp(logp - old)
            clipped = min(max(ratio, 0.8), 1.28)
            kl = math.exp(ref - logp) - (ref - logp) - 1
            terms.append(-min(ratio * advantage, clipped * advantage) + 0.04 * kl)
        rows.append(sum(terms) / len(terms))
        total += sum(terms)
    expected = {
        "grpo": sum(rows) / 6,
        "dapo": total / given["mask"].sum().item(),
        "dr_grpo": total / (6 * MAX_TOKENS),
    }
    assert ours(given, loss_type, 0.04)[0] == pytest.approx(expected[loss_type], abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chunks_add_up(loss_type: str) -> None:
    """The divisors are those of the whole batch, so the losses of its parts add up."""
    given = tensors(3)
    parts = [
        policy_loss(
            *(
                given[name][rows]
                for name in ("logprobs", "old_logprobs", "advantages", "mask", "ref_logprobs")
            ),
            divisors_of(given),
            loss_type,  # type: ignore[arg-type]
        ).loss.item()
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts) == pytest.approx(ours(given, loss_type, 0.04)[0], abs=1e-12)


def test_the_clip_is_asymmetric_and_counted() -> None:
    """Ratios of good rows may grow to 1.28, of bad ones shrink to 0.8; beyond, a token has no gradient."""
    ratios = torch.tensor([[1.27, 1.29, 0.5], [0.81, 0.79, 2.0]])
    logprobs = ratios.log().requires_grad_()
    out = policy_loss(
        logprobs,
        torch.zeros(2, 3),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 3),
        torch.zeros(2, 3),
        Divisors(2, 6, 3),
        kl_coef=0.0,
    )
    out.loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad == 0).tolist() == [[False, True, False], [False, True, False]]
    assert out.clipped_sum.item() == 2


def test_several_updates_move_the_ratio_until_the_clip_stops_them() -> None:
    """With many updates on one batch and no clip, the log-probability would rise for ever."""
    logprobs = torch.full((1, 1), -1.0, requires_grad=True)
    old, optimizer = logprobs.detach().clone(), torch.optim.SGD([logprobs], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        policy_loss(
            logprobs,
            old,
            torch.ones(1),
            torch.ones(1, 1),
            old,
            Divisors(1, 1, 1),
            kl_coef=0.0,
        ).loss.backward()
        optimizer.step()
    assert 1.28 < (logprobs - old).exp().item() < 1.28 + 0.1


def test_k3_in_closed_form() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    torch.testing.assert_close(k3_divergence(policy, reference), torch.tensor([0.0, math.e - 2]))


def test_k2_and_k3_agree_near_the_reference_and_k2_is_smaller_far_from_it() -> None:
    far, near, zero = torch.tensor(-8.0), torch.tensor(-1e-2), torch.tensor(0.0)
    assert k2_divergence(far, zero) == 32 and k3_divergence(far, zero) > 2900
    torch.testing.assert_close(k2_divergence(near, zero), k3_divergence(near, zero), rtol=1e-2, atol=0)


def test_an_unknown_type_is_named() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="but is 'ppo'"):
        policy_loss(one, one, one[0], one, one, Divisors(1, 1, 1), "ppo")  # type: ignore[arg-type]


def test_the_drift_is_the_mean_cosine_distance_of_items_and_of_rewrites_whatever_the_parts() -> None:
    """Against ``torch.cosine_similarity``: value and gradient, whole and in two unequal parts."""
    generator = torch.Generator().manual_seed(3)
    items, group, width = 5, 3, 7

    def unit(rows: int) -> Tensor:
        drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(drawn, dim=1)

    disc, ref_disc, gen, ref_gen = (unit(rows) for rows in (items, items, items * group, items * group))
    wanted_of = [disc.clone().requires_grad_(), gen.clone().requires_grad_()]
    wanted = (1 - torch.cosine_similarity(wanted_of[0], ref_disc)).mean()
    wanted = wanted + (1 - torch.cosine_similarity(wanted_of[1], ref_gen)).mean()
    wanted.backward()
    divisors = Divisors(num_rows=items * group, num_tokens=1, max_tokens=1)
    for cuts in ((0, 5), (0, 2, 5)):
        found_of = [disc.clone().requires_grad_(), gen.clone().requires_grad_()]
        found = sum(
            embedding_drift(
                found_of[0][a:b],
                found_of[1][a * group : b * group],
                ref_disc[a:b],
                ref_gen[a * group : b * group],
                divisors,
            )
            for a, b in itertools.pairwise(cuts)
        )
        assert isinstance(found, Tensor) and found.item() == pytest.approx(wanted.item(), abs=1e-12)
        found.backward()
        for mine, theirs, rows in zip(found_of, wanted_of, (disc, gen), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            # the cosine normalises once more, so its gradient lies in the tangent plane
            tangent = mine.grad - (mine.grad * rows).sum(1, keepdim=True) * rows
            torch.testing.assert_close(tangent, theirs.grad, atol=1e-12, rtol=0)
