"""What rewrites are compared with, against loops over items: every form with every kind of anchors."""

from __future__ import annotations

import math
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.losses.advantages import group_advantages
from rime_pl.modules.scoring import AnchorTable, Rewards, SampledPart, Scorer
from rime_pl.modules.settings import AnchorKind, RewardForm, RewardSettings
from rime_pl.types import Side

GROUP, WIDTH, TAU = 2, 5, 0.3
#: Query and target content of three items, and of the table: 0 and 2 ask the same; all have duplicates there.
ITEMS = [(1, 11), (2, 12), (1, 13)]
TABLE = [(1, 21), (22, 12), (23, 13), (24, 24), (2, 12)]
SETTINGS: dict[str, Any] = {
    "temperature": TAU,
    "weight_format": 0.7,
    "weight_embedding": 1.3,
    "weight_length": 0.2,
    "free_length": 4,
}


class Pairs:
    """What the scorer asks of a batch."""

    dataset = "one"
    query_content, target_content = torch.tensor(ITEMS).T

    def __len__(self) -> int:
        return len(ITEMS)


class Scene:
    """Random embeddings of three items and a table; queries go through in two parts, targets in one."""

    def __init__(self, form: RewardForm, anchors: AnchorKind) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.scorer = Scorer(RewardSettings(form=form, anchors=anchors, **SETTINGS), GROUP)
        self.table: dict[Side, Tensor] = {side: self.unit(len(TABLE)) for side in ("query", "target")}
        self.scorer.tables["one"] = AnchorTable(self.table, torch.tensor(TABLE))
        self.disc: dict[Side, Tensor] = {side: self.unit(len(ITEMS)) for side in ("query", "target")}
        self.greedy: dict[Side, Tensor] = {side: self.unit(len(ITEMS)) for side in ("query", "target")}
        self.parts = [self.part("query", [0]), self.part("query", [1, 2]), self.part("target", [0, 1, 2])]
        self.batch: Any = Pairs()

    def unit(self, rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, WIDTH, generator=self.generator), dim=1)

    def part(self, side: Side, rows: list[int]) -> SampledPart:
        number = len(rows) * GROUP
        lengths = torch.randint(1, 9, (number,), generator=self.generator)
        rollouts: Any = SimpleNamespace(well_formed=torch.arange(number) % 3 != 1, lengths=lengths)
        nothing: Any = None
        return SampledPart(side, torch.tensor(rows), nothing, None, rollouts, nothing, self.unit(number))

    def rewrites(self, side: Side) -> list[tuple[int, Tensor]]:
        """Item and embedding of each rewrite."""
        return [
            (int(part.rows[n // GROUP]), embedding)
            for part in self.parts
            if part.side == side
            for n, embedding in enumerate(part.embeddings)
        ]

    def value(self, embedding: Tensor, item: int, side: Side, form: str, kind: str) -> float:
        """The reward of one embedding, by loops."""
        other: Side = "target" if side == "query" else "query"
        if kind == "rollouts":
            found = [(of, ITEMS[of], vector) for of, vector in self.rewrites(other)]
        else:
            own = self.greedy if kind == "greedy" else self.disc
            found = [(of, ITEMS[of], vector) for of, vector in enumerate(own[other])]
            found += [
                (-1, contents, v)
                for contents, v in zip(TABLE[: len(self.table[other])], self.table[other], strict=True)
            ]
        good = [float(embedding @ vector) for of, _, vector in found if of == item]
        bad = [
            float(embedding @ vector)
            for _, (query, target), vector in found
            if query != ITEMS[item][0] and target != ITEMS[item][1]
        ]
        if form == "anchored":
            hit = sum(math.exp(s / TAU) for s in good)
            share = hit / (hit + sum(math.exp(s / TAU) for s in bad))
            return math.log(share) - math.log(len(good) / (len(good) + len(bad)))
        first = sorted([*good, *bad], reverse=True)[: len(good)]
        return sum(s in first for s in good) / len(good) * (mean(good) - mean(bad))


@pytest.mark.parametrize("anchors", ["discriminative", "greedy", "rollouts"])
@pytest.mark.parametrize("form", ["anchored", "rank_margin"])
def test_every_reward_equals_the_loops(form: str, anchors: str) -> None:
    scene = Scene(cast(RewardForm, form), cast(AnchorKind, anchors))
    rewards: list[Rewards] = scene.scorer.rewards(
        scene.parts, scene.batch, scene.disc, scene.greedy if anchors == "greedy" else None
    )
    gains = []
    for part, reward in zip(scene.parts, rewards, strict=True):
        for place, item in enumerate(part.rows.tolist()):
            own = scene.value(scene.disc[part.side][item], item, part.side, form, anchors)
            assert reward.own[place].item() == pytest.approx(own, abs=1e-5)
            for row in range(place * GROUP, (place + 1) * GROUP):
                value = scene.value(part.embeddings[row], item, part.side, form, anchors)
                assert reward.embedding[row].item() == pytest.approx(value, abs=1e-5)
                formed, length = bool(part.rollouts.well_formed[row]), int(part.rollouts.lengths[row])
                total = (0.7 + 1.3 * value if formed else 0.0) - 0.2 * max(0.0, (length - 4) / 4)
                assert reward.total[row].item() == pytest.approx(total, abs=1e-5)
                gains.append(value - own)
    advantages = [group_advantages(reward.total.view(-1, GROUP)) for reward in rewards]
    means = scene.scorer.means(scene.parts, rewards, advantages)
    assert means["gain"].item() == pytest.approx(mean(gains), abs=1e-5)
    assert means["reward"].item() == pytest.approx(
        mean(r for reward in rewards for r in reward.total.tolist()), abs=1e-5
    )
    excess = [max(0, n - 4) / 4 for part in scene.parts for n in part.rollouts.lengths.tolist()]
    assert means["reward_excess_length"].item() == pytest.approx(mean(excess), abs=1e-5)


@pytest.mark.parametrize("with_table", [True, False])
def test_the_table_to_look_at_is_in_the_anchored_reward_whatever_trains(with_table: bool) -> None:
    scene = Scene("rank_margin", "rollouts")
    if not with_table:
        scene.scorer.tables.clear()
        scene.table = {"query": torch.empty(0, WIDTH), "target": torch.empty(0, WIDTH)}
    gen, formed = scene.unit(len(ITEMS)), torch.tensor([True, False, True])
    found = scene.scorer.pair_rewards(
        scene.batch, gen, scene.disc["target"], formed, torch.full((len(ITEMS),), 4)
    )
    for item in range(len(ITEMS)):
        value = scene.value(gen[item], item, "query", "anchored", "discriminative") if formed[item] else 0
        assert found[item].item() == pytest.approx((0.7 + 1.3 * value) if formed[item] else 0.0, abs=1e-5)
