"""Exact rank of the right target of each query, the same for any number of processes.

Called by callbacks/retrieval_recall.py with what ``validation_step`` returns. Every recall that this project
reports comes from these ranks, because recall@k for any k and MRR can be computed from them.

RetrievalRecall of torchmetrics is not used: it treats scores <= 0 as "not retrieved", wrong for cosines.

Shape legend: Q queries, N gallery items, R rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rime_pl.types import Side

#: Scores closer than this are a tie. It is far below any difference between float32 embeddings, and far
#: above the rounding error of a float64 dot product, which depends on the chunk.
TIE = 1e-9


def first_rows(keys: Tensor, order: Tensor) -> Tensor:
    """Return, for each distinct key, the row that comes first in ``order``.

    Args:
        keys: (R,) int64, e.g. content ids.
        order: (R,) int64, a permutation of the rows, preferred rows first.

    Returns:
        (distinct keys,) int64 rows, in the order of ``order``.
    Source: ours.

    Example:
        >>> first_rows(torch.tensor([7, 8, 7]), torch.tensor([2, 1, 0]))
        tensor([2, 1])
    """
    distinct, inverse = keys[order].unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(distinct, len(keys)).scatter_reduce(0, inverse, places, "amin")
    return order[first.sort().values]


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    contents: Tensor,
    relevant: Tensor,
    chunk_size: int = 4096,
    device: torch.device | None = None,
) -> Tensor:
    """Return the rank of each query's right target in a gallery of distinct contents.

    In plain terms: 1 plus the number of other items that score at least as high; a tie counts against it.

    ``rank_q = 1 + #{i != p : q.g_i >= q.g_p - TIE}``, p = the row with ``contents[p] == relevant[q]``
    If all embeddings are equal (a collapsed model) or NaN, the rank is the worst one, N.

    Args:
        queries: (Q, D) float, normalised if the scores shall be cosines.
        gallery: (N, D) float.
        contents: (N,) int64, all distinct.
        relevant: (Q,) int64, content of the right target of each query.
        chunk_size: Rows of queries and of gallery in a block of scores; changes the memory, never the ranks.
        device: Device that computes the blocks of scores (default: that of the queries). It holds one block
            of each side at a time.

    Returns:
        (Q,) int64 from 1 to N; N + 1 where the gallery does not hold the right target.

    Raises:
        ValueError: If a content appears twice in the gallery.
    Source: ours.

    Example:
        >>> retrieval_ranks(torch.eye(2), torch.eye(2), torch.tensor([5, 6]), torch.tensor([5, 6]))
        tensor([1, 1])
        >>> retrieval_ranks(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([5, 6, 7]), torch.tensor([5]))
        tensor([3])
    """
    by_content, rows = contents.sort()
    if bool((by_content[1:] == by_content[:-1]).any()):
        raise ValueError("The contents of a gallery must be distinct, but one occurs twice. Use first_rows.")
    if len(contents) == 0:
        return torch.ones_like(relevant)
    place = torch.searchsorted(by_content, relevant).clamp(max=len(contents) - 1)
    found = by_content[place] == relevant
    positive = rows[place]
    device, ranks = device or queries.device, []
    for start in range(0, len(queries), chunk_size):
        chunk = slice(start, start + chunk_size)
        ranks.append(_ranks_of_chunk(queries[chunk], gallery, positive[chunk], chunk_size, device))
    return torch.where(found, torch.cat(ranks) if ranks else relevant, len(contents) + 1)


def _ranks_of_chunk(
    queries: Tensor, gallery: Tensor, positive: Tensor, chunk_size: int, device: torch.device
) -> Tensor:
    """Return the ranks (C,) of C queries; ``positive`` (C,) holds the gallery rows of their targets."""
    if device.type == "mps":  # mps has no float64
        device = torch.device("cpu")
    wide = queries.to(device).double()
    needed = (wide * gallery[positive].to(device).double()).sum(-1, keepdim=True) - TIE  # (C, 1)
    ahead = torch.zeros(len(queries), dtype=torch.int64, device=device)
    for block in gallery.split(chunk_size):
        # "not below" and not ">=", so that NaN counts as ahead; the target itself counts as 1
        ahead += (~(wide @ block.to(device).double().T < needed)).sum(-1)
    return ahead.to(positive.device)


def recall_at(ranks: Tensor, k: int) -> Tensor:
    """Return 1.0 for each query whose right target is among the first k, else 0.0; the mean is recall@k.

    ``recall@k = mean_q [rank_q <= k]``, also called hit rate@k or success@k if a query has one right target

    Args:
        ranks: (Q,) int64, from 1.
        k: How many items of the gallery count.

    Returns:
        (Q,) float32.
    Source: standard.

    Example:
        >>> recall_at(torch.tensor([1, 2, 6]), 5)
        tensor([1., 1., 0.])
    """
    return (ranks <= k).float()


def measured(ranks: Tensor) -> Tensor:
    """Return the ranks without those of queries that lack the view.

    Args:
        ranks: (Q,) int64; 0 where a query lacks the view.
    Source: ours.

    Example:
        >>> measured(torch.tensor([3, 0, 1]))
        tensor([3, 1])
    """
    return ranks[ranks > 0]


def reciprocal_ranks(ranks: Tensor) -> Tensor:
    """Return 1 / rank of each query; the mean is MRR (mean reciprocal rank), greater than 0 and at most 1.

    Args:
        ranks: (Q,) int64, from 1.

    Returns:
        (Q,) float32.
    Source: standard.

    Example:
        >>> reciprocal_ranks(torch.tensor([1, 2, 4]))
        tensor([1.0000, 0.5000, 0.2500])
    """
    return 1.0 / ranks.float()


@dataclass
class RankTable:
    """Ranks of Q distinct queries, ordered by item id, on the CPU, the same on every process.
    Source: ours.

    Example:
        >>> one = torch.tensor([1])
        >>> RankTable(one, one, one, one, {"disc-disc": one}).found().tolist()
        [True]
    """

    item_ids: Tensor  # (Q,) int64
    task_ids: Tensor  # (Q,) int64
    gallery_ids: Tensor  # (Q,) int64
    gallery_sizes: Tensor  # (Q,) int64, number of distinct contents in the gallery of the query
    #: pair -> (Q,) int64; gallery size + 1: the right target is missing; 0: the query lacks the view
    ranks: dict[str, Tensor]

    def of_task(self, task_id: int) -> RankTable:
        """Return the rows of one task."""
        rows = self.task_ids == task_id
        cut = {pair: ranks[rows] for pair, ranks in self.ranks.items()}
        sizes = self.gallery_sizes[rows]
        return RankTable(self.item_ids[rows], self.task_ids[rows], self.gallery_ids[rows], sizes, cut)

    def found(self) -> Tensor:
        """Return (Q,) bool: False where the gallery does not hold the right target."""
        return next(iter(self.ranks.values())) <= self.gallery_sizes

    def with_best_of(self, name: str, pairs: Sequence[str]) -> RankTable:
        """Return the table with one more pair: for each query the best of its ranks in the given pairs."""
        best = torch.stack([self.ranks[pair] for pair in pairs]).amin(0)
        return replace(self, ranks={**self.ranks, name: best})


def gathered(rows: Tensor, device: torch.device, chunk_size: int) -> Tensor:
    """Return the rows of all processes in main memory, in rank order. A collective: all must call it.

    Args:
        rows: (R, ...) in main memory; R may differ between processes.
        device: Device of the process group; it holds one block of each process at a time.
        chunk_size: Rows in a block.

    Source: ours.

    Example:
        >>> gathered(torch.ones(2, 1), torch.device("cpu"), chunk_size=1).shape
        torch.Size([2, 1])
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    world = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
    lengths = [int(count) for count in counts]
    parts: list[list[Tensor]] = [[] for _ in range(world)]
    for start in range(0, max(lengths), chunk_size):
        size = min(chunk_size, max(lengths) - start)
        block = torch.zeros((size, *rows.shape[1:]), dtype=rows.dtype, device=device)
        mine = rows[start : start + size]
        block[: len(mine)] = mine.to(device)
        blocks = [torch.empty_like(block) for _ in range(world)]
        torch.distributed.all_gather(blocks, block)
        for part, found, length in zip(parts, blocks, lengths, strict=True):
            part.append(found[: max(0, length - start)].cpu())
    return torch.cat([block for part in parts for block in part]) if max(lengths) else rows


class RecallMetric(Metric):
    """Recall@k of embeddings that arrive in batches, on any number of processes.

    A query is ranked against the distinct contents of its own gallery. A row whose item id has been seen
    before (sampler padding) is dropped. Of duplicates (equal content), the one with the lowest item id is
    kept, but a real gallery item before a distractor. Rows are sorted by item id before they are ranked, so
    the number of batches and processes changes nothing. Rows stay in main memory: the device of the metric
    holds blocks of ``chunk_size`` rows, when they are ranked and when the processes exchange them.

    Args:
        pairs: name -> (query view, gallery view), e.g. ``{"gen-disc": ("gen", "disc")}``. A view is one kind
            of embedding of the same items.
        ks: The k of ``compute``.
        chunk_size: See :func:`retrieval_ranks`.

    Raises:
        ValueError: In ``compute`` and ``ranks``, if a gallery cannot be ranked (:func:`retrieval_ranks`).

    Source: ours; the states are those of torchmetrics.Metric.

    Example:
        >>> metric = RecallMetric({"disc-disc": ("disc", "disc")}, ks=(1,))
        >>> ids, zero = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64)
        >>> metric.update("query", {"disc": torch.eye(2)}, ids, ids, zero, zero, zero.bool())
        >>> metric.update("target", {"disc": torch.eye(2)}, ids, ids, zero, zero, zero.bool())
        >>> metric.compute()
        {'recall@1/disc-disc': tensor(1.)}
    """

    full_state_update = False
    higher_is_better = True

    query_vectors: list[Tensor]
    query_ids: list[Tensor]
    target_vectors: list[Tensor]
    target_ids: list[Tensor]

    def __init__(
        self, pairs: Mapping[str, tuple[str, str]], ks: Sequence[int] = (1, 5, 10), chunk_size: int = 4096
    ) -> None:
        # compute() calls ranks(), which gathers by itself
        super().__init__(sync_on_compute=False)
        self.pairs = dict(pairs)
        self.ks = tuple(ks)
        self.chunk_size = chunk_size
        self.views: dict[str, list[str]] = {
            "query": sorted({query for query, _ in self.pairs.values()}),
            "target": sorted({target for _, target in self.pairs.values()}),
        }
        for side in self.views:
            self.add_state(f"{side}_vectors", default=[], dist_reduce_fx="cat")  # (R, views, D)
            self.add_state(f"{side}_ids", default=[], dist_reduce_fx="cat")  # (R, 6)

    def update(
        self,
        side: Side,
        vectors: Mapping[str, Tensor],
        item_ids: Tensor,
        relevant_ids: Tensor,
        gallery_ids: Tensor,
        task_ids: Tensor,
        distractor: Tensor,
        absent: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add R rows of one side.

        Args:
            side: ``query`` or ``target``.
            vectors: view -> (R, D) float; all views that ``pairs`` names for this side.
            item_ids: (R,) int64, unique per side.
            relevant_ids: (R,) int64, content of the right target; of a target: its own content.
            gallery_ids: (R,) int64, the gallery of the row.
            task_ids: (R,) int64, the task of a query; any number for a target.
            distractor: (R,) bool, gallery items that are used only by ``ranks(distractors=True)``.
            absent: view -> (R,) bool, queries without this view: they get rank 0, which is "not measured".
        """
        item_ids, *others = (row.cpu() for row in (item_ids, relevant_ids, gallery_ids, task_ids, distractor))
        lacking = torch.zeros_like(item_ids)  # one bit for each view
        for view, rows in (absent or {}).items():
            lacking |= rows.cpu().to(lacking) << self.views[side].index(view)
        ids = torch.stack([item_ids, *(row.to(item_ids) for row in others), lacking], 1)
        stacked = torch.stack([vectors[view].detach().float().cpu() for view in self.views[side]], 1)
        states = (
            (self.query_vectors, self.query_ids)
            if side == "query"
            else (self.target_vectors, self.target_ids)
        )
        states[0].append(stacked)
        states[1].append(ids)

    def cut(self, size: int, pairs: Sequence[str]) -> RecallMetric:
        """Return the metric of some pairs with the first ``size`` numbers of embeddings, normalised again."""
        other = RecallMetric({name: self.pairs[name] for name in pairs}, self.ks, self.chunk_size)
        for side, views in self.views.items():
            places = [views.index(view) for view in other.views[side]]
            whole = getattr(self, f"{side}_vectors")
            setattr(other, f"{side}_vectors", [F.normalize(r[:, places, :size], dim=-1) for r in whole])
            setattr(other, f"{side}_ids", list(getattr(self, f"{side}_ids")))
        return other.to(self.device)

    def compute(self) -> dict[str, Tensor]:
        """Return ``recall@k/<pair>`` -> scalar float32: the mean over all queries, without distractors."""
        ranks = {pair: measured(ranks) for pair, ranks in self.ranks().ranks.items()}
        return {f"recall@{k}/{pair}": recall_at(ranks[pair], k).mean() for k in self.ks for pair in ranks}

    def ranks(self, distractors: bool = False) -> RankTable:
        """Return the rank of each query in each pair. A collective: all processes must call it.

        Args:
            distractors: Whether the gallery includes its distractors, which never improve a rank.
        """
        self._give_empty_process_its_shape()
        states = (self.query_vectors, self.query_ids, self.target_vectors, self.target_ids)
        query_vectors, query_ids, target_vectors, target_ids = (
            gathered(dim_zero_cat(state), self.device, self.chunk_size) for state in states
        )
        kept = first_rows(query_ids[:, 0], query_ids[:, 0].argsort(stable=True))
        wanted = target_ids[:, 4] == 0
        rows = torch.arange(len(target_ids), device=target_ids.device)[wanted | distractors]
        return self._rank_galleries(
            query_vectors[kept], query_ids[kept], target_vectors[rows], target_ids[rows]
        )

    def _rank_galleries(
        self, query_vectors: Tensor, query_ids: Tensor, target_vectors: Tensor, target_ids: Tensor
    ) -> RankTable:
        sizes = torch.zeros_like(query_ids[:, 0])
        ranks = {pair: torch.zeros_like(sizes) for pair in self.pairs}
        by_id = target_ids[:, 0].argsort(stable=True)
        order = by_id[target_ids[by_id, 4].argsort(stable=True)]  # real items before distractors
        for gallery in query_ids[:, 2].unique().tolist():
            asked = (query_ids[:, 2] == gallery).nonzero()[:, 0]
            mine = order[target_ids[order, 2] == gallery]
            kept = mine[first_rows(target_ids[mine, 1], torch.arange(len(mine), device=mine.device))]
            sizes[asked] = len(kept)
            for pair, (query, target) in self.pairs.items():
                place = self.views["query"].index(query)
                found = retrieval_ranks(
                    query_vectors[asked, place],
                    target_vectors[kept, self.views["target"].index(target)],
                    target_ids[kept, 1],
                    query_ids[asked, 1],
                    self.chunk_size,
                    self.device,
                )
                ranks[pair][asked] = found.masked_fill(query_ids[asked, 5] >> place & 1 == 1, 0)
        return RankTable(query_ids[:, 0], query_ids[:, 3], query_ids[:, 2], sizes, ranks)

    def _give_empty_process_its_shape(self) -> None:
        """Let a process without rows of a side take part in the gathering, with shape (0, views, D)."""
        seen = self.query_vectors or self.target_vectors
        width = torch.tensor([seen[0].shape[-1] if seen else 0], device=self.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
        for side, vectors, ids in (
            ("query", self.query_vectors, self.query_ids),
            ("target", self.target_vectors, self.target_ids),
        ):
            if not vectors:
                shape = (0, len(self.views[side]), int(width))
                vectors.append(torch.zeros(shape))
                ids.append(torch.zeros((0, 6), dtype=torch.int64))
