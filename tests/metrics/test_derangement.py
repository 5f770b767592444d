"""Derangements: equal to a loop and to the rule of the whole matrix, in memory that grows with the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rime_pl.metrics.derangement import derange


def naive(content: list[int], allowed: list[bool]) -> list[int]:
    """For each row walk on, round the end, until the content differs."""
    rows = len(content)
    return [
        next(
            (
                j % rows
                for j in range(i + 1, i + rows)
                if allowed[j % rows] and content[j % rows] != content[i]
            ),
            i,
        )
        for i in range(rows)
    ]


def by_matrix(content: Tensor, allowed: Tensor | None) -> Tensor:
    """The rule of earlier versions, whose memory grows with the square of the rows."""
    rows = len(content)
    index = torch.arange(rows)
    step = (index.unsqueeze(1) + 1 + index) % rows
    differs = content[step] != content.unsqueeze(1)
    if allowed is not None:
        differs &= allowed[step]
    return step[index, differs.int().argmax(dim=1)].where(differs.any(dim=1), index)


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("contents", [1, 2, 4, 50])
@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_it_equals_the_naive_loop_and_the_earlier_rule(rows: int, contents: int, share: float | None) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        content = torch.randint(contents, (rows,), generator=generator)
        if seed % 2:
            content = content.sort().values  # long runs of equal content
        allowed = None if share is None else torch.rand(rows, generator=generator) < share
        found = derange(content, allowed)
        assert found.equal(by_matrix(content, allowed))
        assert found.tolist() == naive(
            content.tolist(), [True] * rows if allowed is None else allowed.tolist()
        )


def test_memory_is_linear() -> None:
    """The largest tensor that any operation makes has at most two numbers for each row."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else (out,)
            largest = max([largest, *(t.numel() for t in made if isinstance(t, Tensor))])
            return out

    rows = 8192
    content = torch.randint(100, (rows,), generator=torch.Generator().manual_seed(0))
    with Watch():
        derange(content, torch.ones(rows, dtype=torch.bool))
    assert largest <= 2 * rows
