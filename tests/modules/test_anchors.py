"""Anchors are read in bounded passes, which change no embedding, and no picture of a step is read twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rime_pl.backbone import tower
from rime_pl.backbone.adapters import adapter_values
from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules import anchors
from rime_pl.modules.anchors import anchors_of
from rime_pl.modules.scoring import SampledPart
from rime_pl.modules.settings import AnchorKind, RolloutSettings
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair, Prompts, Side
from tests.conftest import MakeBackbone
from tests.micro import RewardPairs, randomise_adapter, refine_rl_module


@pytest.fixture(scope="module")
def pairs(train_pairs: list[Pair]) -> list[Pair]:
    """8 pairs of one task."""
    return [replace(pair, dataset="one") for pair in train_pairs[:8]]


@pytest.fixture(scope="module")
def batch(processor: RimeProcessor, pairs: list[Pair]) -> Batch:
    made = processor.training_batch(pairs[:5])
    media = [side.prompts.num_media for side in (made.query, made.target)]
    assert torch.cat(media).unique().numel() > 1, "rows with and without pictures"
    return made


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backbone], tuple[list[int], list[int], list[int]]]:
    """Return what lists the media of each pass of the tower, the prompt rows of each of the decoder, and the
    anchors that are written together.
    """

    def watch(backbone: Backbone) -> tuple[list[int], list[int], list[int]]:
        media: list[int] = []
        rows: list[int] = []
        together: list[int] = []
        encode, positions = tower.encode, backbone.prompt_positions

        def encoded(model: Any, pixels: Tensor, grid: Tensor, *rest: Any) -> Any:
            media.append(len(grid))
            return encode(model, pixels, grid, *rest)

        def placed(prompts: Any) -> Tensor:
            rows.append(len(prompts))
            return positions(prompts)

        def written(model: Any, prompts: Prompts, *rest: Any, **more: Any) -> Any:
            together.append(len(prompts))
            return write_rewrites(model, prompts, *rest, **more)

        monkeypatch.setattr(tower, "encode", encoded)
        monkeypatch.setattr(backbone, "prompt_positions", placed)
        monkeypatch.setattr(anchors, "write_rewrites", written)
        return media, rows, together

    return watch


@pytest.mark.parametrize("kind", ["discriminative", "greedy"])
def test_passes_change_nothing_but_their_size(
    kind: AnchorKind, make_backbone: MakeBackbone, batch: Batch, watched: Any
) -> None:
    backbone = make_backbone()
    whole = anchors_of(kind, backbone, batch, RolloutSettings(max_new_tokens=8))
    assert whole["query"].shape == (5, whole["target"].shape[1])
    _, rows, written = watched(backbone)
    for size, together in ((2, None), (2, 2), (1, 1), (3, 7)):
        bounds = RolloutSettings(max_new_tokens=8, items_per_pass=size, passes_per_sampling=together)
        rows.clear()
        written.clear()
        found = anchors_of(kind, backbone, batch, bounds)
        assert max(rows) == size and sum(rows) == 10
        if kind == "greedy":
            assert max(written) == min(5, size * (together or 5)) and sum(written) == 10
        else:
            assert not written
        for side, expected in whole.items():
            torch.testing.assert_close(found[side], expected, atol=1e-4, rtol=0)
    assert backbone.training


@pytest.mark.parametrize("sides", ["query", "both"])
@pytest.mark.parametrize("kind", ["discriminative", "greedy"])
def test_a_step_reads_in_passes_and_what_was_sampled_only_once(
    kind: AnchorKind, sides: Any, make_backbone: MakeBackbone, batch: Batch, watched: Any
) -> None:
    module = refine_rl_module(
        make_backbone(),
        reward={"anchors": kind, "num_anchors": 0},
        rollouts={"sides": sides, "items_per_pass": 2, "passes_per_sampling": 1},
    )
    media, rows, written = watched(module.model)
    module.training_step(batch, 0)
    assert max(rows) <= 2 and max(written, default=0) == (2 if kind == "greedy" else 0)
    of_side = {
        side: int(rows_of.prompts.num_media.sum())
        for side, rows_of in (("query", batch.query), ("target", batch.target))
    }
    assert sum(media) == sum(of_side.values())


def with_others(part: SampledPart, backbone: Backbone) -> SampledPart:
    """Return the part with features of its patches in another order."""
    pixels = part.prompts.pixel_values
    if pixels is None:
        return part
    return replace(part, images=backbone.encode_media(replace(part.prompts, pixel_values=pixels.flip(0))))


@pytest.mark.parametrize("size", [None, 2])
def test_features_that_were_given_are_used(
    size: int | None, make_backbone: MakeBackbone, batch: Batch, watched: Any
) -> None:
    """They are those of the step, each in its pass; other features would give other anchors."""
    reward, rollouts = {"anchors": "greedy", "num_anchors": 0}, {"items_per_pass": size}
    module = refine_rl_module(make_backbone(), reward=reward, rollouts=rollouts)
    parts, _ = module.sample(batch)
    expected = module.greedy_anchors(batch, [])
    media, _, _ = watched(module.model)
    found = module.greedy_anchors(batch, parts)
    assert media == []
    others = module.greedy_anchors(batch, [with_others(part, module.model) for part in parts])
    assert expected is not None and found is not None and others is not None
    has_media = {"query": batch.query.prompts.num_media > 0, "target": batch.target.prompts.num_media > 0}
    sides: list[Side] = ["query", "target"]
    for side in sides:
        torch.testing.assert_close(found[side], expected[side])
        changed = (others[side] - expected[side]).abs().amax(dim=1) > 1e-3
        assert changed.equal(has_media[side]), "what is given reaches the anchors"


def test_greedy_anchors_are_those_of_the_reference_one_item_at_a_time(
    make_backbone: MakeBackbone, pairs: list[Pair], batch: Batch
) -> None:
    """The policy has moved; anchors and table are still what the reference writes and embeds."""
    module = refine_rl_module(make_backbone(), reward={"anchors": "greedy"})
    module.prepare(RewardPairs(module.model.processor, pairs))
    randomise_adapter(module.model.peft, seed=5, scale=0.02)
    found = module.greedy_anchors(batch, [])
    assert found is not None and refine_rl_module(make_backbone()).greedy_anchors(batch, []) is None
    model, table = module.model, module.scorer.tables["one"]
    sides: dict[Side, Prompts] = {"query": batch.query.prompts, "target": batch.target.prompts}
    with torch.no_grad(), adapter_values(model, module.reference):
        for side, prompts in sides.items():
            for row in range(5):
                one = prompts.select(torch.tensor([row]))
                written = write_rewrites(model, one).completions
                gen = model(one, written).gen[0]
                assert float(gen @ found[side][row]) > 0.9999
                assert float((table.embeddings[side] @ gen).max()) > 0.9999  # the batch is in the table
                assert float(gen @ model(one).disc[0]) < 0.999
    parts, discs = module.sample(batch)
    rewards = module.scorer.rewards(parts, batch, discs, found)
    assert all(bool(one.total.isfinite().all()) for one in rewards)
