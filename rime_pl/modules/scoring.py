"""What rollouts are measured with: anchors of the batch and of a table, the reward's parts, their means.

Used by modules/refine_rl.py only. Everything is without gradient.

Shape legend: B items of this rank, n of all ranks, G rewrites each, A anchors, M rows of a table, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.generation.rollouts import Scores
from rime_pl.losses.advantages import Advantages
from rime_pl.losses.rewards import Anchors, anchored_reward, rank_margin_reward, total_reward
from rime_pl.scaling.gather import all_gather_rows, rank
from rime_pl.types import Batch, Prompts, Rollouts, Side

RewardForm = Literal["anchored", "rank_margin"]
AnchorKind = Literal["discriminative", "rollouts"]


@dataclass
class RewardSettings:
    """The reward's switches, as the module got them."""

    form: RewardForm
    anchors: AnchorKind
    temperature: float
    weight_format: float
    weight_embedding: float
    weight_length: float
    free_length: int


@dataclass
class Part:
    """Some items of one side with their rollouts: what one pass takes."""

    side: Side
    rows: Tensor  # (R,) int64: which items of this rank's batch
    prompts: Prompts  # R rows
    images: Any | None  # features of the vision tower, shared by all passes
    rollouts: Rollouts  # R * G
    reference: Scores  # of the frozen reference
    embeddings: Tensor  # (R * G, D) generative, of the embedder
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # (R * G,)
    embedding_rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # (R * G,)
    own: Tensor = field(default_factory=lambda: torch.empty(0))  # (R,): the item's own d, by the same reward
    advantages: Advantages = field(default_factory=lambda: Advantages(torch.empty(0), torch.empty(0)))
    old_logprobs: Tensor = field(default_factory=lambda: torch.empty(0))  # (R * G, C)


@dataclass
class AnchorTable:
    """Discriminative embeddings of the reference for M training pairs of one task."""

    discs: dict[Side, Tensor]  # (M, D) each
    contents: Tensor  # (M, 2) int64: query, target


class Yardstick:
    """Rewards of rollouts.

    Args:
        settings: The switches.
        num_generations: G.
    """

    def __init__(self, settings: RewardSettings, num_generations: int) -> None:
        self.settings = settings
        self.num_generations = num_generations
        self.tables: dict[str, AnchorTable] = {}

    def add(self, batch: Batch, discs: dict[Side, Tensor]) -> None:
        """More rows of the table of the batch's task."""
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)
        old = self.tables.get(batch.dataset)
        if old is not None:
            discs = {side: torch.cat([old.discs[side], rows]) for side, rows in discs.items()}
            contents = torch.cat([old.contents, contents])
        self.tables[batch.dataset] = AnchorTable(discs, contents)

    def reward(self, parts: list[Part], batch: Batch, discs: dict[Side, Tensor]) -> None:
        """Fill in the rewards of all parts.

        Args:
            parts: All of this rank's batch.
            batch: This rank's pairs.
            discs: (B, D) of both sides, by the reference.
        """
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)
        known = all_gather_rows(contents)
        mine = rank() * len(batch) + torch.arange(len(batch), device=known.device)
        for side in dict.fromkeys(part.side for part in parts):  # not a set: all ranks gather in one order
            other: Side = "target" if side == "query" else "query"
            embeddings = self._anchors(parts, batch, other, discs[other], known)
            everyone = exclude_twins(embeddings, known, self._copies)
            self._need_negatives(everyone, batch.dataset)  # of all ranks, so that they stop together
            anchors = select(everyone, mine)
            for part in (part for part in parts if part.side == side):
                of_items = select(anchors, part.rows)
                of_rewrites = select(anchors, part.rows.repeat_interleave(self.num_generations))
                part.embedding_rewards = self._value(part.embeddings, of_rewrites)
                part.own = self._value(discs[side][part.rows], of_items)
                part.rewards = self._total(
                    part.embedding_rewards, part.rollouts.well_formed, part.rollouts.lengths
                )

    @property
    def _copies(self) -> int:
        """Anchors of each item of the batch."""
        return 1 if self.settings.anchors == "discriminative" else self.num_generations

    def _anchors(
        self, parts: list[Part], batch: Batch, other: Side, disc: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (A, D) and contents (A, 2): the global batch first, in its order, then the table."""
        if self.settings.anchors == "rollouts":
            gen = torch.cat([part.embeddings for part in parts if part.side == other])
            return all_gather_rows(gen), known.repeat_interleave(self.num_generations, dim=0)
        table = self.tables.get(batch.dataset)
        embeddings = all_gather_rows(disc)
        if table is None:
            return embeddings, known
        return torch.cat([embeddings, table.discs[other]]), torch.cat([known, table.contents])

    def _need_negatives(self, anchors: Anchors, dataset: str) -> None:
        if not bool(anchors.negatives.any(dim=1).all()):
            raise RimeError(
                f"model.anchors={self.settings.anchors}: an item of task {dataset!r} has no negative among "
                "them, so that no rewrite is better than another. Raise data.batch_size, or "
                "model.num_anchors where the anchors are discriminative."
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

    def of_pairs(
        self, batch: Batch, gen: Tensor, target_disc: Tensor, well_formed: Tensor, lengths: Tensor
    ) -> Tensor:
        """The anchored reward of one rewrite of each query, whatever form trains: for the table to look at.

        Args:
            gen: (B, D) of the queries' rewrites, by the reference.
            target_disc: (B, D) by the reference.

        Returns:
            (B,); without a table against the other targets of the batch.
        """
        contents = torch.stack([batch.query_content, batch.target_content], dim=1)
        embeddings, known = target_disc, contents
        if batch.dataset in self.tables:
            table = self.tables[batch.dataset]
            embeddings = torch.cat([embeddings, table.discs["target"]])
            known = torch.cat([known, table.contents])
        anchors = exclude_twins((embeddings, known), contents, 1)
        value = anchored_reward(gen, anchors, self.settings.temperature)
        return self._total(value, well_formed, lengths)

    def watched(self, parts: list[Part]) -> dict[str, Tensor]:
        """Means over this rank's rewrites, for the log; see docs/reference/metrics.md."""
        rewards = torch.cat([part.rewards.view(-1, self.num_generations) for part in parts])
        value = torch.cat([part.embedding_rewards for part in parts])
        lengths = torch.cat([part.rollouts.lengths for part in parts]).float()
        excess = ((lengths - self.settings.free_length) / self.settings.free_length).clamp(min=0)
        return {
            "reward": rewards.mean(),
            "reward_spread": rewards.std(dim=1).mean(),
            "reward_format": torch.cat([part.rollouts.well_formed for part in parts]).float().mean(),
            "reward_embedding": value.mean(),
            "reward_excess_length": excess.mean(),
            "gain": value.mean() - torch.cat([part.own for part in parts]).mean(),
            "no_signal": (~torch.cat([part.advantages.has_signal for part in parts])).float().mean(),
            "rewrite_length": lengths.mean(),
        }


def exclude_twins(anchors: tuple[Tensor, Tensor], contents: Tensor, copies: int) -> Anchors:
    """Which anchors are positive and negative for each item.

    Args:
        anchors: Embeddings (A, D) and contents (A, 2); those of the items first, ``copies`` of each.
        contents: (n, 2) of the items.

    Example:
        >>> content = torch.tensor([[1, 7], [2, 8], [3, 7]])  # the third target is a twin of the first
        >>> got = exclude_twins((torch.eye(3), content), content, copies=1)
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
    """The anchors for some rows, repeats allowed."""
    return Anchors(anchors.embeddings, anchors.positives[rows], anchors.negatives[rows])


def cut_parts(rows: int, size: int | None) -> list[Tensor]:
    """Row numbers in parts of at most ``size``.

    >>> [part.tolist() for part in cut_parts(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return list(torch.arange(rows).split(size or rows))
