"""Rewards of sampled rewrites: the anchors of the batch and of a table, the terms of the reward, their means.

Used by modules/refine_rl.py only. Nothing here has a gradient.

Shape legend: B items of this rank, n of all ranks, G rewrites each, A anchors, M rows of a table, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.generation.rollouts import Scores
from rime_pl.losses.advantages import Advantages
from rime_pl.losses.rewards import Anchors, anchored_reward, rank_margin_reward, total_reward
from rime_pl.modules.settings import RewardSettings
from rime_pl.scaling.gather import all_gather_rows, rank
from rime_pl.types import Batch, Prompts, Rollouts, Side


@dataclass(frozen=True)
class SampledPart:
    """Some items of one side with their rollouts: what goes through the model together."""

    side: Side
    rows: Tensor  # (R,) int64: which items of this rank's batch
    prompts: Prompts  # R rows
    images: Any | None  # features of the vision tower, shared by all passes
    rollouts: Rollouts  # R * G
    reference: Scores  # of the frozen reference
    embeddings: Tensor  # (R * G, D) generative, of the embedder


@dataclass(frozen=True)
class Rewards:
    """The rewards of one part."""

    total: Tensor  # (R * G,)
    embedding: Tensor  # (R * G,): the embedding's term only
    own: Tensor  # (R,): the same term for the item's own discriminative embedding


@dataclass
class AnchorTable:
    """Embeddings of the reference for M training pairs of one task, of the kind that ``anchors`` says."""

    embeddings: dict[Side, Tensor]  # (M, D) each
    contents: Tensor  # (M, 2) int64: query, target


class Scorer:
    """Rewards rollouts.

    Args:
        settings: Form, anchors and weights of the reward.
        num_generations: Number of rewrites of each item (G).
    """

    def __init__(self, settings: RewardSettings, num_generations: int) -> None:
        self.settings = settings
        self.num_generations = num_generations
        self.tables: dict[str, AnchorTable] = {}

    def add_anchors(self, batch: Batch, embeddings: dict[Side, Tensor]) -> None:
        """Add rows to the table of the batch's task.

        Args:
            batch: B pairs.
            embeddings: (B, D) of both sides, by the reference: discriminative, or of its greedy rewrites.
        """
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)  # (B, 2)
        old = self.tables.get(batch.dataset)
        if old is not None:
            embeddings = {side: torch.cat([old.embeddings[side], rows]) for side, rows in embeddings.items()}
            contents = torch.cat([old.contents, contents])
        self.tables[batch.dataset] = AnchorTable(embeddings, contents)

    def rewards(
        self,
        parts: list[SampledPart],
        batch: Batch,
        discs: dict[Side, Tensor],
        greedy: dict[Side, Tensor] | None = None,
    ) -> list[Rewards]:
        """Return the rewards of each part.

        Args:
            parts: All of this rank's batch; the parts of a side stand together.
            batch: This rank's pairs.
            discs: (B, D) discriminative embeddings by the reference: of the sides of the parts and, without
                ``greedy``, of those that they are compared with.
            greedy: (B, D) embeddings of the reference's greedy rewrites, of each side that is compared with;
                needed for greedy anchors only.
        """
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)  # (B, 2)
        known = all_gather_rows(contents)  # (n, 2)
        mine = rank() * len(batch) + torch.arange(len(batch), device=known.device)
        anchors: dict[Side, Anchors] = {}
        for side in dict.fromkeys(part.side for part in parts):  # not a set: all ranks gather in one order
            other: Side = "target" if side == "query" else "query"
            embeddings = self._anchors(parts, batch, other, (greedy or discs)[other], known)
            everyone = exclude_duplicates(embeddings, known, self._copies)
            self._need_negatives(everyone, batch.dataset)  # of all ranks, so that they stop together
            anchors[side] = select(everyone, mine)
        return [self._of_part(part, anchors[part.side], discs[part.side]) for part in parts]

    def _of_part(self, part: SampledPart, anchors: Anchors, disc: Tensor) -> Rewards:
        of_items = select(anchors, part.rows)
        of_rewrites = select(anchors, part.rows.repeat_interleave(self.num_generations))
        embedding = self._value(part.embeddings, of_rewrites)
        return Rewards(
            total=self._total(embedding, part.rollouts.well_formed, part.rollouts.lengths),
            embedding=embedding,
            own=self._value(disc[part.rows], of_items),
        )

    @property
    def _copies(self) -> int:
        """Number of anchors of each item of the batch."""
        return self.num_generations if self.settings.anchors == "rollouts" else 1

    def _anchors(
        self, parts: list[SampledPart], batch: Batch, other: Side, own: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings (A, D) and contents (A, 2): the global batch first, then the table."""
        if self.settings.anchors == "rollouts":
            gen = torch.cat([part.embeddings for part in parts if part.side == other])
            return all_gather_rows(gen), known.repeat_interleave(self.num_generations, dim=0)
        table = self.tables.get(batch.dataset)
        embeddings = all_gather_rows(own)
        if table is None:
            return embeddings, known
        return torch.cat([embeddings, table.embeddings[other]]), torch.cat([known, table.contents])

    def _need_negatives(self, anchors: Anchors, dataset: str) -> None:
        if not bool(anchors.negatives.any(dim=1).all()):
            raise RimeError(
                f"model.reward.anchors={self.settings.anchors}: an item of task {dataset!r} has no negative "
                "among its anchors, so no rewrite is better than another. Raise data.batch_size or, with "
                "other anchors than rollouts, model.reward.num_anchors."
            )

    def _value(self, embeddings: Tensor, anchors: Anchors) -> Tensor:
        if self.settings.form == "rank_margin":
            return rank_margin_reward(embeddings, anchors)
        return anchored_reward(embeddings, anchors, self.settings.temperature)

    def _total(self, embedding_rewards: Tensor, well_formed: Tensor, lengths: Tensor) -> Tensor:
        s = self.settings
        return total_reward(
            embedding_rewards,
            well_formed,
            lengths,
            weight_format=s.weight_format,
            weight_embedding=s.weight_embedding,
            weight_length=s.weight_length,
            free_length=s.free_length,
        )

    def pair_rewards(
        self, batch: Batch, gen: Tensor, targets: Tensor, well_formed: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the anchored reward of one rewrite of each query, whatever form trains: for people to read.

        Args:
            gen: (B, D) of the queries' rewrites, by the reference.
            targets: (B, D) by the reference, of the same kind as the table.

        Returns:
            (B,). Without a table a rewrite is compared with the other targets of the batch.
        """
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)
        embeddings, known = targets, contents
        if batch.dataset in self.tables:
            table = self.tables[batch.dataset]
            embeddings = torch.cat([embeddings, table.embeddings["target"]])
            known = torch.cat([known, table.contents])
        anchors = exclude_duplicates((embeddings, known), contents, 1)
        value = anchored_reward(gen, anchors, self.settings.temperature)
        return self._total(value, well_formed, lengths)

    def means(
        self, parts: list[SampledPart], rewards: list[Rewards], advantages: list[Advantages]
    ) -> dict[str, Tensor]:
        """Return means over this rank's rewrites, for the log; docs/reference/metrics.md explains them."""
        totals = torch.cat([reward.total.view(-1, self.num_generations) for reward in rewards])
        value = torch.cat([reward.embedding for reward in rewards])
        lengths = torch.cat([part.rollouts.lengths for part in parts]).float()
        excess = ((lengths - self.settings.free_length) / self.settings.free_length).clamp(min=0)
        return {
            "reward": totals.mean(),
            "reward_spread": totals.std(dim=1).mean(),
            "reward_format": torch.cat([part.rollouts.well_formed for part in parts]).float().mean(),
            "reward_embedding": value.mean(),
            "reward_excess_length": excess.mean(),
            "gain": value.mean() - torch.cat([reward.own for reward in rewards]).mean(),
            "no_signal": (~torch.cat([one.has_signal for one in advantages])).float().mean(),
            "rewrite_length": lengths.mean(),
        }


def exclude_duplicates(anchors: tuple[Tensor, Tensor], contents: Tensor, copies: int) -> Anchors:
    """Return which anchors are positive and negative for each item; duplicates are neither.

    Args:
        anchors: Embeddings (A, D) and contents (A, 2); those of the items first, ``copies`` of each.
        contents: (n, 2) of the items.

    Example:
        >>> content = torch.tensor([[1, 7], [2, 8], [3, 7]])  # the third target is a duplicate of the first
        >>> got = exclude_duplicates((torch.eye(3), content), content, copies=1)
        >>> got.positives[0].tolist(), got.negatives[0].tolist()
        ([True, False, False], [False, True, False])
    """
    embeddings, known = anchors
    same = (known == contents.unsqueeze(1)).any(dim=2)
    items = torch.arange(len(contents), device=known.device).unsqueeze(1)
    place = torch.arange(len(known), device=known.device) // copies
    positives = place == items
    return Anchors(embeddings, positives, ~same & ~positives)


def select(anchors: Anchors, rows: Tensor) -> Anchors:
    """Return the anchors of some rows; repeats are allowed."""
    return Anchors(anchors.embeddings, anchors.positives[rows], anchors.negatives[rows])


def cut_parts(rows: int, size: int | None) -> list[Tensor]:
    """Return row numbers in parts of at most ``size``.

    >>> [part.tolist() for part in cut_parts(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return list(torch.arange(rows).split(size or rows))
