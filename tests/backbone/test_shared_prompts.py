"""Attention of several completions behind one prompt equals that of each completion with its own prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone.packing import Packing
from rime_pl.backbone.shared_prompts import SharedPrompts

HEADS, WIDTH = 2, 4
#: Tokens of each prompt; tokens of each completion of a part, those of a prompt together.
CASES: dict[str, tuple[list[int], list[list[int]]]] = {
    "one prompt": ([5], [[1, 7, 3]]),
    "ragged prompts": ([1, 9, 4], [[2, 2, 6, 1, 1, 5]]),
    "two parts": ([6, 2], [[3, 4], [1, 8]]),
    "parts of unlike counts": ([6, 2], [[3, 4], [1, 8, 2, 2]]),
    "a completion without tokens": ([3, 3], [[0, 2, 1, 0]]),
    "a part without tokens": ([3, 2], [[2, 1], [0, 0]]),
    "no part with tokens": ([3, 2], [[0, 0]]),
}


def left_padded(lengths: list[int]) -> Tensor:
    return (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)).int()


def right_padded(lengths: list[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).int()


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None).transpose(1, 2)


def plainly(prompts: list[int], parts: list[list[int]], states: list[Tensor]) -> Tensor:
    """Each completion in a row of its own behind its prompt, one after the other."""
    tokens = [*prompts, *(length for part in parts for length in part)]
    rows = list(zip(*(each[0].split(tokens, dim=1) for each in states), strict=True))
    mixed = [kernel(*(state.unsqueeze(0) for state in row), None)[0] for row in rows[: len(prompts)]]
    done = len(prompts)
    for part in parts:
        for number in range(len(part)):
            prompt = rows[number // (len(part) // len(prompts))]
            pieces = zip(prompt, rows[done], strict=True)
            whole = [torch.cat(pair, dim=1).unsqueeze(0) for pair in pieces]
            mixed.append(kernel(*whole, None)[0][prompt[0].shape[1] :])
            done += 1
    return torch.cat(mixed).unsqueeze(0)


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradient_are_those_of_separate_rows(name: str, with_masks: bool) -> None:
    torch.manual_seed(0)
    prompts, parts = CASES[name]
    valid = left_padded(prompts), [right_padded(part) for part in parts]
    shared = SharedPrompts.of(*valid, torch.float32)
    total = sum(prompts) + sum(map(sum, parts))
    states = [torch.randn(1, HEADS, total, WIDTH, requires_grad=True) for _ in range(3)]
    if with_masks:
        shared = shared.with_masks(torch.float32)
    seen: list[Any] = []

    def noting(*given: Any) -> Tensor:
        seen.append(given[-1])
        return kernel(*given)

    found = shared.attend(noting, *states)
    expected = plainly(prompts, parts, states)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weights).sum(), states) for out in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert all(mask is not None for mask in seen) == with_masks


def test_tokens_come_back_to_their_places() -> None:
    """Of parts of unlike widths, each keeps its own; one that is nothing but padding, too."""
    prompts = left_padded([2, 3])
    parts = [right_padded([1, 0, 4, 2]), right_padded([2, 1]), torch.zeros(2, 3, dtype=torch.int)]
    shared = SharedPrompts.of(prompts, parts, torch.float32)
    given = [rows * tens for rows, tens in zip([prompts, *parts], (10, 20, 30, 40), strict=True)]
    picked = shared.pick(*given)
    assert picked.tolist() == [[10] * 5 + [20] * 7 + [30] * 3]
    found = shared.put_back(picked.unsqueeze(-1))
    for rows, expected in zip(found, given, strict=True):
        assert rows[..., 0].equal(expected)


def test_it_does_less_than_one_row_of_all_completions() -> None:
    """The scores of 8 completions behind a long prompt: a quarter of those of one long row."""
    shared = SharedPrompts.of(left_padded([60]), [right_padded([30] * 8)], torch.float32)
    assert sum(mask.numel() for mask in shared.masks) < (60 + 8 * 30) ** 2 / 4
    assert isinstance(shared.prompts, Packing) and shared.prompts.masks is None, "prompts are causal"
