"""The contrastive loss between two sets of embeddings, in both directions, without false negatives.

Called by the modules with the gathered embeddings of the global batch: for gen-gen, for disc-disc and, in
CMA, across the modes.

Shape legend: B pairs, K further targets, C = B + K candidates, R rows of a block of scores, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Score of what counts as nothing; -inf would give NaN where a row has no negative.
_NOTHING = -1e30


@dataclass(frozen=True)
class Further:
    """K targets beside those of the batch: hard negatives, and further right answers of single queries.

    Every query is compared with all of them.

    Source: ours; hard negatives as in arXiv 2004.04906.

    Example:
        >>> one = torch.tensor([0])
        >>> Further(torch.eye(1), one, one, torch.tensor([True])).embeddings.shape
        torch.Size([1, 1])
    """

    embeddings: Tensor  # (K, D) float32, normalised
    owner: Tensor  # (K,) int64: the query of the B that each was given to
    content: Tensor  # (K,) int64 content ids
    positive: Tensor  # (K,) bool: a right answer of its owner; False: a hard negative


@dataclass(frozen=True)
class Weighting:
    """How negatives count.

    Args:
        hardness: beta >= 0: a negative with cosine s counts ``exp(beta s)`` times, without gradient through
            the weight; 0 counts all alike.
        false_negative_margin: A negative whose cosine is greater than that of the lowest right answer by more
            than this is left out: it is probably right, too. None leaves out none.

    Source: hardness: arXiv 2010.04592; the margin is ours.

    Example:
        >>> Weighting(hardness=1.0).false_negative_margin is None
        True
    """

    hardness: float = 0.0
    false_negative_margin: float | None = None


def same_content(query_content: Tensor, target_content: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return which pairs (query i, target j) are false negatives, because target j also answers query i.

    That is so when the two queries, or the two targets, have the same content. Two pictures of the same
    content differ in their bytes, so the content ids decide.

    Args:
        query_content: (B,) int64 content ids of the queries.
        target_content: (B,) int64 content ids of their targets.
        rows: (R,) int64, the queries i; None for all B.

    Returns:
        (R, B) bool, False where i = j.

    Source: ours; content ids are those of the corpus.

    Example:
        >>> same_content(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8]))
        tensor([[False,  True, False],
                [ True, False, False],
                [False, False, False]])
    """
    index = torch.arange(len(query_content), device=query_content.device)
    rows = index if rows is None else rows
    same = query_content[rows].unsqueeze(1) == query_content  # (R, B)
    same = same | (target_content[rows].unsqueeze(1) == target_content)
    return same & (rows.unsqueeze(1) != index)


def mean_negatives(contents: Tensor, further: Further | None = None) -> Tensor:
    """Return the number of negatives of a query, as :func:`info_nce` counts them: a mean over the queries.

    Args:
        contents: (B, 2) int64 content ids of query and target.
        further: Targets beside those of the batch. What :class:`Weighting` leaves out counts all the same.

    Returns:
        Scalar float32, B - 1 without false negatives and further targets; 0 if there are no rows.

    Source: ours.

    Example:
        >>> mean_negatives(torch.tensor([[1, 7], [2, 7], [3, 8]]))  # the first two share their target
        tensor(1.3333)
    """
    rows = max(1, len(contents))
    if further is not None and len(further.owner):
        counts = [
            (~(right | left_out)).sum()
            for right, left_out in (
                _of_queries(block, contents, further, len(contents) + len(further.owner))
                for block in torch.arange(len(contents), device=contents.device).split(1024)
            )
        ]
        return sum(counts, start=torch.zeros((), device=contents.device)) / rows
    sharing = []  # of each row: the number of rows with its query content, its target content, and both
    for key in (contents[:, :1], contents[:, 1:], contents):
        _, inverse, numbers = key.unique(dim=0, return_inverse=True, return_counts=True)
        sharing.append(numbers[inverse])
    query, target, both = sharing
    return (len(contents) - query - target + both).sum() / rows


def check_temperature(temperature: float) -> None:
    """Raise a ValueError if the temperature is not positive.

    Raises:
        ValueError: If it is 0 or less.

    Source: ours.

    Example:
        >>> check_temperature(0.0)
        Traceback (most recent call last):
        ValueError: temperature must be greater than 0 because it divides the cosines, but is 0.0.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature must be greater than 0 because it divides the cosines, but is {temperature}."
        )


def info_nce(
    queries: Tensor,
    targets: Tensor,
    temperature: float,
    contents: Tensor | None = None,
    further: Further | None = None,
    weighting: Weighting = Weighting(),
    block_size: int = 1 << 20,
) -> Tensor:
    """Return the symmetric InfoNCE loss; row i of ``targets`` is the positive of row i of ``queries``.

    In plain terms: a query must be nearer to its own target than to all others, and the other way round.

    ``NCE(A, B) = 1/2 mean_i [ -log softmax_j(a_i.b_j / tau)_i - log softmax_j(b_i.a_j / tau)_i ]``

    A query with several right answers has the mean of their losses, each without the others as negatives.

    Args:
        queries, targets: (B, D) float32, normalised.
        temperature: Divisor tau of the cosines, > 0.
        contents: (B, 2) int64 content ids of query and target; leaves out the pairs of :func:`same_content`.
        further: Targets beside those of the batch; need ``contents``.
        weighting: How negatives count.
        block_size: Maximum number of scores in memory, but at least one row: made again in backward.

    Returns:
        Scalar, in nats; 0 if there are no rows.

    Raises:
        ValueError: If the temperature is not positive, or further targets come without contents.

    Source: UME-R1, arXiv 2511.00405, with tau 0.02. Differences: no false negatives; blocks of rows. Several
    right answers as in arXiv 2004.11362, with the sum outside of the logarithm.

    Example:
        >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)
        0.7437
    """
    check_temperature(temperature)
    if not len(queries):
        return (queries.sum() + targets.sum()) * 0.0  # DDP needs a 0 that depends on the inputs
    further = further if further is not None and len(further.owner) else None
    if further is not None and contents is None:
        raise ValueError("further targets need the content ids of queries and targets.")
    losses = _Losses(len(queries), temperature, contents, further, weighting)
    both = losses.of_queries(queries, targets, block_size) + losses.of_targets(queries, targets, block_size)
    return 0.5 * both


class _Losses:
    """The losses of both directions, in blocks of rows."""

    def __init__(
        self,
        pairs: int,
        temperature: float,
        contents: Tensor | None,
        further: Further | None,
        weighting: Weighting,
    ) -> None:
        self.pairs, self.temperature, self.contents = pairs, temperature, contents
        self.further, self.weighting = further, weighting

    def of_queries(self, queries: Tensor, targets: Tensor, block_size: int) -> Tensor:
        """Return the mean loss of queries that look for their targets."""
        candidates, owner = targets, torch.arange(self.pairs, device=targets.device)
        if self.further is not None:
            candidates = torch.cat([targets, self.further.embeddings])
        return self._in_blocks(queries, candidates, owner, True, block_size)

    def of_targets(self, queries: Tensor, targets: Tensor, block_size: int) -> Tensor:
        """Return the mean loss of targets, and of further right answers, that look for their queries."""
        answers, owner = targets, torch.arange(self.pairs, device=targets.device)
        if self.further is not None:
            answers = torch.cat([targets, self.further.embeddings[self.further.positive]])
            owner = torch.cat([owner, self.further.owner[self.further.positive]])
        return self._in_blocks(answers, queries, owner, False, block_size)

    def _in_blocks(
        self, rows: Tensor, others: Tensor, owner: Tensor, from_queries: bool, block_size: int
    ) -> Tensor:
        size, total = max(1, block_size // len(others)), rows.new_zeros(())
        for number, block in enumerate(rows.split(size)):
            places = torch.arange(number * size, number * size + len(block), device=rows.device)
            inputs = (block, others, places, owner, from_queries)
            if size >= len(rows):
                total = total + self._of_block(*inputs)
            else:
                total = total + checkpoint(
                    self._of_block, *inputs, use_reentrant=False, preserve_rng_state=False
                )
        return total / self.pairs

    def _of_block(
        self, block: Tensor, others: Tensor, places: Tensor, owner: Tensor, from_queries: bool
    ) -> Tensor:
        """Return the summed loss of some rows of one side against all of the other.

        Args:
            block: (R, D).
            others: (C, D) candidates of queries, or (B, D) queries.
            places: (R,) int64: where the rows stand on their side.
            owner: (rows of the side,) int64: the query of each.
            from_queries: Whether the rows are queries.
        """
        cosines = block @ others.T
        if from_queries:
            right, left_out = _of_queries(places, self.contents, self.further, len(others))
        else:
            right, left_out = _of_targets(places, owner, self.contents, self.further, len(others))
        known = cosines.detach()
        if self.weighting.false_negative_margin is not None:
            lowest = known.masked_fill(~right, float("inf")).amin(dim=1, keepdim=True)
            left_out = left_out | (known > lowest + self.weighting.false_negative_margin)
        scores = cosines / self.temperature
        negatives = scores + self.weighting.hardness * known if self.weighting.hardness else scores
        negatives = negatives.masked_fill(right | left_out, _NOTHING).logsumexp(dim=1)  # (R,)
        row, column = right.nonzero(as_tuple=True)
        losses = -F.logsigmoid(scores[row, column] - negatives[row])  # -log (e^p / (e^p + sum of negatives))
        return (losses * self._share(losses)[owner[places[row]]]).sum()

    def _share(self, like: Tensor) -> Tensor:
        """Return (B,) what a right answer counts among those of its query."""
        answers = torch.ones(self.pairs, device=like.device, dtype=like.dtype)
        if self.further is not None:
            extra = self.further.owner[self.further.positive]
            answers = answers + extra.bincount(minlength=self.pairs)
        return 1 / answers


def _of_queries(
    rows: Tensor, contents: Tensor | None, further: Further | None, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return which candidates (R, C) are right for queries, and which are neither right nor wrong."""
    right = rows.unsqueeze(1) == torch.arange(candidates, device=rows.device)  # (R, C)
    if contents is None:
        return right, torch.zeros_like(right)
    left_out = same_content(contents[:, 0], contents[:, 1], rows)
    if further is None:
        return right, left_out
    known = torch.cat([contents[:, 1], further.content])  # (C,)
    own = (rows.unsqueeze(1) == further.owner) & further.positive  # (R, K)
    right = torch.cat([right[:, : len(contents)], own], dim=1)
    left_out = torch.cat([left_out, contents[rows, 1].unsqueeze(1) == further.content], dim=1)
    # what has the content of a further right answer of the query
    answers = own.any(dim=0).nonzero().squeeze(1)
    equal = (further.content[answers].unsqueeze(1) == known).to(torch.int8)  # (answers of these rows, C)
    place = (rows.unsqueeze(1) == further.owner[answers]).int().argmax(dim=0)
    found = torch.zeros(right.shape, dtype=torch.int8, device=rows.device).index_add_(0, place, equal)
    return right, (left_out | (found > 0)) & ~right


def _of_targets(
    places: Tensor, origin: Tensor, contents: Tensor | None, further: Further | None, queries: int
) -> tuple[Tensor, Tensor]:
    """Return which queries (R, B) are right for targets, and which are neither right nor wrong."""
    owner = origin[places]
    right = owner.unsqueeze(1) == torch.arange(queries, device=places.device)  # (R, B)
    if contents is None:
        return right, torch.zeros_like(right)
    left_out = same_content(contents[:, 0], contents[:, 1], owner)
    if further is None:
        return right, left_out
    content = torch.cat([contents[:, 1], further.content[further.positive]])[places]  # (R,)
    left_out |= content.unsqueeze(1) == contents[:, 1]
    answers = further.content[further.positive]
    equal = (content.unsqueeze(1) == answers).to(torch.int8)  # (R, right answers)
    found = torch.zeros(right.shape, dtype=torch.int8, device=places.device)
    found.index_add_(1, further.owner[further.positive], equal)
    return right, (left_out | (found > 0)) & ~right
