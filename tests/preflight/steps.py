"""One training step with micro-batches, and its gradients: what the tests beside it compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from rime_pl.backbone.mllm import Backbone
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Item, Pair
from tests.micro import mixed

STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}
Content = Literal["image", "text", "mixed"]


def pairs_of(content: Content, pairs: Sequence[Pair], count: int) -> list[Pair]:
    """Pairs of pictures, of texts alone, or queries by turns one and the other beside pictures.

    Two rewrites are missing and two targets are twins.
    """

    def words_only(item: Item | None) -> Item:
        assert item is not None
        return replace(item, media=(), text=f"{item.text} {item.rewrite}")

    if content == "image":
        chosen = [pair for pair in pairs if pair.query and pair.query.media][:count]
    else:
        chosen = mixed(list(pairs), count)
    if content == "text":
        chosen = [
            replace(pair, query=words_only(pair.query), target=words_only(pair.target)) for pair in chosen
        ]
    for row in (2, 3):
        chosen[row] = replace(chosen[row], target=replace(chosen[row].target, rewrite=None))
    twin = replace(chosen[0].target, content_id=chosen[-1].target.content_id)
    return [replace(chosen[0], target=twin), *chosen[1:]]


def stage_module(
    stage: str,
    backbone: Backbone,
    micro_batches: MicroBatchSettings = MicroBatchSettings(),
    **settings: float,
) -> RimeModule:
    """A stage that logs nowhere."""
    module = STAGES[stage](backbone.config, micro_batches=micro_batches, **settings)  # type: ignore[arg-type]
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[assignment]
    return module


def set_dropout(model: nn.Module, share: float) -> None:
    """LoRA's dropout, in a backbone that was built with one."""
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert found
    for module in found:
        module.p = share


def loss_and_gradients(module: RimeModule, batch: Batch, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """One step from a given random state; gradients are cleared before and cut off after."""
    module.zero_grad()
    torch.manual_seed(seed)
    loss = module.training_step(batch, 0)
    module.backward(loss)
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    module.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def worst_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over the tensors: norm of the difference over norm."""
    assert got.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name}: a zero gradient proves nothing"
    return max(float((got[n] - g).norm() / g.norm()) for n, g in expected.items())


def make_batch(processor: RimeProcessor, pairs: Sequence[Pair], content: Content, count: int = 8) -> Batch:
    return processor.training_batch(pairs_of(content, pairs, count))
