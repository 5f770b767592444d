"""Wrong rewrites: never a row's own, never one of equal content, every second one empty."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.annotation import without_rewrites
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, EncodedSide, Pair, Rows
from tests.backbone.test_packing import with_kernel
from tests.conftest import MakeBackbone
from tests.micro import randomise_adapter


@pytest.fixture
def module(shared_backbone: Backbone) -> CMAModule:
    stage = CMAModule(shared_backbone.config)
    stage.backbone, stage.log = shared_backbone, lambda *_, **__: None  # type: ignore[method-assign]
    return stage


def with_contents(pairs: list[Pair], contents: list[str]) -> list[Pair]:
    """Each row's rewrite names its number, so that a test sees whose it is."""
    changed = []
    for number, (pair, content) in enumerate(zip(pairs, contents, strict=False)):
        assert pair.query is not None
        query = replace(pair.query, rewrite=f"row {number}" + " of many" * (number % 3))
        changed.append(replace(pair, query=query, target=replace(pair.target, content_id=content)))
    return changed


def written(module: CMAModule, batch: Batch) -> list[str]:
    rows = torch.arange(len(batch))
    return module.model.processor.decode(module.wrong_rewrites(batch, rows))


@pytest.mark.parametrize("contents", ["abcdefgh", "aabbccdd", "aaaaaaab", "abababab"])
def test_wrong_rewrites_are_wrong(
    contents: str, module: CMAModule, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    batch = processor.training_batch(with_contents(train_pairs[:8], list(contents)))
    for number, text in enumerate(written(module, batch)):
        if number % 2:
            assert text == ""
        else:
            theirs = int(text.split()[1])
            assert theirs != number and contents[theirs] != contents[number]


def test_without_other_content_all_are_empty(
    module: CMAModule, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    batch = processor.training_batch(with_contents(train_pairs[:4], list("aaaa")))
    assert written(module, batch) == [""] * 4


def test_a_wrong_rewrite_is_whole(
    module: CMAModule, processor: RimeProcessor, train_pairs: list[Pair]
) -> None:
    """The reference completion of the other row, with <gen_emb> and end of turn."""
    batch = processor.training_batch(with_contents(train_pairs[:4], list("abcd")))
    wrong = module.wrong_rewrites(batch, torch.tensor([0, 2]))
    theirs = batch.query.completions.select(torch.tensor([1, 3]))
    assert wrong.ids.equal(theirs.ids) and wrong.mask.equal(theirs.mask)


@pytest.mark.parametrize("stage", [SFTModule, CMAModule])
def test_negatives_are_counted_for_each_mode(
    stage: type[SFTModule | CMAModule],
    shared_backbone: Backbone,
    processor: RimeProcessor,
    train_pairs: list[Pair],
) -> None:
    """Of eight pairs three are annotated, and two of all share their target."""
    pairs = with_contents(train_pairs[:8], list("abcdefgg"))
    pairs = [replace(p, query=replace(p.query, content_id=str(n))) for n, p in enumerate(pairs) if p.query]
    batch = processor.training_batch(pairs[:3] + [without_rewrites(pair) for pair in pairs[3:]])
    module, logged = stage(shared_backbone.config), {}
    assert module.negatives_per_query is None
    module.backbone = shared_backbone
    module.log = lambda key, value, **_: logged.update({key: float(value)})  # type: ignore[method-assign]
    module.training_step(batch, 0)
    assert (logged["train/negatives_disc"], logged["train/negatives_gen"]) == ((6 * 7 + 2 * 6) / 8, 2.0)
    assert module.negatives_per_query == {"discriminative": 6.75, "generative": 2.0}


@pytest.mark.parametrize(("share", "expected"), [(1.0, [(6, 6), (6, 0)]), (0.5, [(3, 3), (3, 0), (6, 0)])])
def test_a_wrong_rewrite_stands_behind_the_same_prompt(
    share: float,
    expected: list[tuple[int, int]],
    module: CMAModule,
    shared_backbone: Backbone,
    batch: Batch,
) -> None:
    """Rows and wrong rewrites of each forward: queries with a wrong one, without, the targets."""
    seen: list[tuple[int, int]] = []
    hook = shared_backbone.register_forward_hook(
        lambda m, args, out: seen.append(
            (len(out.gen), 0 if out.alternative is None else len(out.alternative))
        )
    )
    module.wrong_share = share
    module.training_step(batch, 0)
    hook.remove()
    assert seen == expected


def test_the_margin_asks_for_more(module: CMAModule, batch: Batch) -> None:
    logged: dict[str, float] = {}
    module.log = lambda key, value, **_: logged.update({key: float(value)})  # type: ignore[method-assign]
    found = []
    for margin in (1.0, 4.0):
        module.margin_dec = margin
        module.training_step(batch, 0)
        found.append(logged["train/loss_decisive"])
    assert found[1] - found[0] > 3, "two targets, each with a margin of 3 more"


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("kernel", ["sdpa", "flash_in_a_loop"])
def test_loss_and_gradients_equal_those_of_a_pass_of_its_own(
    kernel: str, share: float, make_backbone: MakeBackbone, batch: Batch
) -> None:
    """A kernel without masks of our own gives each rewrite its own row, so there is no prompt to share."""
    backbone = make_backbone(load_in_4bit=False)
    randomise_adapter(backbone.peft, scale=0.05)
    module = CMAModule(backbone.config, wrong_share=share)
    module.backbone, module.log = backbone, lambda *_, **__: None  # type: ignore[method-assign]
    apart = deepcopy(module)
    apart.log = lambda *_, **__: None  # type: ignore[method-assign]
    count = round(share * len(batch))

    def encode_queries(batch: Batch) -> EncodedSide:
        side, chosen = apart.encode(batch.query), torch.arange(count)
        again = Rows(
            batch.query.prompts.select(chosen),
            apart.wrong_rewrites(batch, chosen),
            torch.zeros(count, dtype=torch.bool),
        )
        return replace(side, wrong=apart.encode(again).gen)

    apart.encode_queries = encode_queries  # type: ignore[method-assign]
    with_kernel(backbone, kernel)
    found = []
    for each in (module, apart):
        loss = each.training_step(batch, 0)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in each.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
