"""The nearest items of a gallery that comes in blocks, exactly, so that the gallery need not be in memory.

Called by the search on an index. But for the rounding of products, the blocks change nothing in the result.

Shape legend: Q queries, N gallery items, n items of a block, D embedding width, k results.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def top_k(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k best items of a gallery for each query; of equal scores the first item comes first.

    In plain terms: the exact nearest neighbours by dot product.

    ``score_qi = q . g_i``, sorted from high to low

    Args:
        queries: (Q, D) float.
        blocks: The gallery as blocks of (n, D) float, in the order of its items. Each is moved to the device
            and the type of the queries.
        k: Number of items.

    Returns:
        Scores (Q, min(k, N)) float and rows (Q, min(k, N)) int64, on the device of the queries.

    Raises:
        ValueError: If k is less than 1.

    Source: ours; exact search.

    Example:
        >>> scores, rows = top_k(torch.eye(2), [torch.eye(2), torch.eye(2)], 2)
        >>> rows
        tensor([[0, 2],
                [1, 3]])
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, but is {k}.")
    scores = queries.new_empty((len(queries), 0))
    rows = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    start = 0
    for block in blocks:
        products = queries @ block.to(queries).T  # (Q, n)
        best, places = _first_of_equals(products, min(k, len(block)))
        # rows of earlier blocks stand first, so a stable sort keeps them before equal ones of this block
        scores, order = torch.cat([scores, best], 1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, places + start], 1).gather(1, order)
        scores, rows = scores[:, :k], rows[:, :k]
        start += len(block)
    return scores, rows


def _first_of_equals(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of each row with their places; of equal ones those that come first.

    ``topk`` alone takes any of them. Only queries with equal scores at the border are sorted as a whole.
    """
    best, places = scores.topk(k, dim=1)
    last = best[:, -1:]
    tied = (scores == last).sum(1) > (best == last).sum(1)
    if bool(tied.any()):
        whole, order = scores[tied].sort(dim=1, descending=True, stable=True)
        best[tied], places[tied] = whole[:, :k], order[:, :k]
    by_place = places.argsort(dim=1)
    best, places = best.gather(1, by_place), places.gather(1, by_place)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best, places.gather(1, order)
