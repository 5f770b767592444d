"""One attention call for all pictures of a size gives the same numbers as one call per picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rime_pl.backbone.vision_attention import BY_SIZE, attend_by_size
from rime_pl.types import Batch
from tests.conftest import MakeBackbone


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """What transformers does without a flash kernel."""
    parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*part, scale=0.3).transpose(1, 2) for part in parts], dim=1
    )


def test_values_and_gradients_are_those_of_one_call_per_picture() -> None:
    for lengths in ([4, 4, 4], [4, 6, 4, 2, 6], [5]):
        torch.manual_seed(0)
        inputs = [torch.randn(1, 2, sum(lengths), 8, requires_grad=True) for _ in range(3)]
        borders = torch.tensor([0, *lengths]).cumsum(0)
        seen, weights = attend_by_size(None, *inputs, None, scaling=0.3, cu_seq_lens_q=borders, dropout=0.0)
        expected = one_by_one(*inputs, lengths)
        assert weights is None and seen.shape == (1, sum(lengths), 2, 8)
        torch.testing.assert_close(seen, expected)
        mask = torch.randn_like(seen)
        for got, wanted in zip(
            torch.autograd.grad((seen * mask).sum(), inputs),
            torch.autograd.grad((expected * mask).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


def test_the_backbone_uses_it_unless_another_kernel_is_set(make_backbone: MakeBackbone, batch: Batch) -> None:
    together = make_backbone()
    assert together.language_model.model.visual.config._attn_implementation == BY_SIZE
    eager = make_backbone(attn_implementation="eager")
    assert eager.language_model.model.visual.config._attn_implementation == "eager"
    prompts = batch.target.prompts if batch.target.prompts.pixel_values is not None else batch.query.prompts
    with torch.no_grad():
        torch.testing.assert_close(together(prompts).disc, eager(prompts).disc, rtol=1e-4, atol=1e-5)
