"""Hard negatives, further positives and several lengths of embeddings in SFT and CMA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import DataError, RimeError
from rime_pl.losses.alignment import cross_mode_alignment, decisive_rewrite
from rime_pl.losses.contrastive import Further, Weighting, info_nce
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.settings import MicroBatchSettings, NegativeSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, ModeEmbeddings, Pair, content_hash
from tests.micro import build_backbone, micro_config, randomise_adapter
from tests.preflight.steps import loss_and_gradients, stage_module, worst_error

TAU = 0.1


@pytest.fixture(scope="module")
def backbone(micro_base: Path) -> Backbone:
    found = build_backbone(micro_config(micro_base, load_in_4bit=False))
    randomise_adapter(found.peft, scale=0.05)
    return found


@pytest.fixture(scope="module")
def pairs(train_pairs: list[Pair]) -> list[Pair]:
    """Pairs with negatives and positives; one of each has no rewrite, and neither has one of the pairs."""
    found = list(train_pairs[:6])
    others = [replace(pair.target, content_id=f"other {n}") for n, pair in enumerate(train_pairs[6:12])]
    found[0] = replace(found[0], hard_negatives=(others[0], replace(others[1], rewrite=None)))
    found[2] = replace(found[2], hard_negatives=(others[2],), positives=(others[3],))
    found[3] = replace(found[3], target=replace(found[3].target, rewrite=None), hard_negatives=(others[4],))
    found[5] = replace(found[5], positives=(replace(others[5], rewrite=None),))
    return found


@pytest.fixture(scope="module")
def batch(pairs: list[Pair], processor: RimeProcessor) -> Batch:
    return processor.training_batch(pairs, further=True)


def test_rows_say_whose_they_are(batch: Batch, pairs: list[Pair]) -> None:
    further = batch.further
    assert further is not None and len(further) == 6
    assert further.owner.tolist() == [0, 0, 2, 2, 3, 5]
    assert further.positive.tolist() == [False, False, False, True, False, True]
    assert further.rewritten.tolist() == [True, False, True, True, True, False]
    assert not further.rows.annotated.any() and further.used.all()
    assert further.content[3] == content_hash(pairs[2].positives[0].content_id)


def test_a_rank_without_any_holds_one_row_that_does_not_count(
    processor: RimeProcessor, train_pairs: list[Pair], backbone: Backbone
) -> None:
    plain = processor.training_batch(train_pairs[:6])
    empty = processor.training_batch(train_pairs[:6], further=True)
    assert plain.further is None and empty.further is not None
    assert len(empty.further) == 1 and not empty.further.used.any()
    module = stage_module("cma", backbone)
    losses = [module.training_step(one, 0).item() for one in (plain, empty)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def by_hand(
    backbone: Backbone, batch: Batch, stage: str, weighting: Weighting, sizes: list[int]
) -> torch.Tensor:
    """The loss written out: each side in one forward, the losses called one by one."""
    sides = [backbone(side.prompts, side.completions, side.labels) for side in batch.sides]
    further = batch.further
    assert further is not None
    more = backbone(further.rows.prompts, further.rows.completions)
    contents = torch.stack([batch.query_content, batch.target_content], dim=1)
    annotated = batch.query.annotated & batch.target.annotated
    kept = further.rewritten & annotated[further.owner]
    owner = torch.tensor([int(annotated[:row].sum()) for row in further.owner.tolist()])

    def cut(vectors: torch.Tensor, size: int) -> torch.Tensor:
        return F.normalize(vectors[:, :size], dim=-1)

    module = CMAModule(backbone.config)
    module.backbone = backbone
    wrong_rows = module.wrong_rewrites(batch, torch.arange(len(batch)))
    wrong = backbone(batch.query.prompts, batch.query.completions, alternatives=wrong_rows).alternative
    assert wrong is not None
    totals = []
    for size in [*sizes, more.disc.shape[1]]:
        q, t = (ModeEmbeddings(cut(side.disc, size), cut(side.gen, size)) for side in sides)
        ga, ta = (ModeEmbeddings(side.disc[annotated], side.gen[annotated]) for side in (q, t))
        all_disc = Further(cut(more.disc, size), further.owner, further.content, further.positive)
        some = [
            Further(cut(one, size)[kept], owner[kept], further.content[kept], further.positive[kept])
            for one in (more.disc, more.gen)
        ]
        total = info_nce(q.disc, t.disc, TAU, contents, all_disc, weighting)
        total = total + info_nce(ga.gen, ta.gen, TAU, contents[annotated], some[1], weighting)
        if stage == "cma":
            total = total + cross_mode_alignment(
                ga, ta, TAU, contents[annotated], (some[0], some[1]), weighting
            )
            total = total + decisive_rewrite(ga.gen, cut(wrong, size)[annotated], ta, TAU)
        totals.append(total)
    ce = sum(
        token_cross_entropy(side.logprobs, (rows.labels != -100).sum())
        for side, rows in zip(sides, batch.sides, strict=True)
    )
    return torch.stack(totals).mean() + ce


@pytest.mark.parametrize("stage", ["sft", "cma"])
@pytest.mark.parametrize(
    ("negatives", "dimensions"),
    [({}, None), ({"hardness": 2.0, "false_negative_margin": 0.2}, None), ({}, [16, 32])],
)
def test_a_stage_gives_the_loss_and_gradients_of_the_terms_by_hand(
    stage: str, negatives: dict[str, Any], dimensions: list[int] | None, backbone: Backbone, batch: Batch
) -> None:
    settings = {"temperature": TAU, "negatives": NegativeSettings(**negatives), "dimensions": dimensions}
    module = stage_module(stage, backbone, **settings)  # type: ignore[arg-type]
    loss, gradients = loss_and_gradients(module, batch)
    weighting = Weighting(negatives.get("hardness", 0.0), negatives.get("false_negative_margin"))
    expected = by_hand(backbone, batch, stage, weighting, dimensions or [])
    backbone.zero_grad()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = {f"backbone.{n}": p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    assert worst_error(gradients, wanted) < 1e-5
    backbone.zero_grad(set_to_none=True)


@pytest.mark.parametrize("stage", ["sft", "cma"])
def test_the_gradient_cache_is_exact_with_them(stage: str, backbone: Backbone, batch: Batch) -> None:
    settings: dict[str, Any] = {"temperature": TAU, "dimensions": [16]}
    cached = stage_module(stage, backbone, MicroBatchSettings(size=2), **settings)
    plain = stage_module(stage, backbone, **settings)
    loss, gradients = loss_and_gradients(cached, batch)
    expected_loss, expected = loss_and_gradients(plain, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert worst_error(gradients, expected) < 1e-5


def test_negatives_are_counted_for_each_mode(backbone: Backbone, batch: Batch) -> None:
    module = stage_module("sft", backbone)
    module.training_step(batch, 0)
    found = module.negatives_per_query
    assert found is not None
    # 5 targets of the batch and 6 further ones, but the own positives of the rows 2 and 5
    assert found["discriminative"] == pytest.approx((6 * (5 + 6) - 2) / 6)
    # 5 annotated pairs; 3 further ones have a rewrite and an annotated owner, and one is right for its owner
    assert found["generative"] == pytest.approx((5 * (4 + 3) - 1) / 5)


@pytest.mark.parametrize(
    ("dimensions", "says"),
    [([64], "must be less than the 64 numbers"), ([0, 8], "must be 1 or more, but has 0")],
)
def test_dimensions_that_cannot_be_are_refused(
    dimensions: list[int], says: str, backbone: Backbone, batch: Batch
) -> None:
    with pytest.raises(RimeError, match=rf"model.dimensions {says}"):
        stage_module("sft", backbone, dimensions=dimensions).training_step(batch, 0)  # type: ignore[arg-type]


def test_a_negative_hardness_is_refused() -> None:
    with pytest.raises(RimeError, match=r"model.negatives.hardness must be 0 or more"):
        NegativeSettings(hardness=-1.0)


@pytest.mark.parametrize("kind", ["hard_negatives", "positives"])
def test_a_further_target_that_does_not_fit_breaks_its_pair_by_name(
    kind: str, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    bad = replace(train_pairs[1].target, text="a <|im_end|> b")
    pair = replace(train_pairs[0], **{kind: (train_pairs[2].target, bad)})
    with pytest.raises(DataError, match=rf"\({kind}\[1\]\): field 'text' must not contain"):
        processor.check(pair)
    processor.check(pair, ("query",))  # evaluation does not use them


def test_they_train_through_the_stage_classes(backbone: Backbone) -> None:
    for stage in (SFTModule, CMAModule):
        module = stage(backbone.config, dimensions=[32, 8, 8])
        assert module.dimensions == [8, 32]
