"""The patch embedding as a product gives what the convolution gives, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rime_pl.backbone.patch_embedding import embed_patch
from rime_pl.types import Batch
from tests.conftest import MakeBackbone


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    proj = nn.Conv3d(3, 16, (2, 6, 6), stride=(2, 6, 6), bias=bias)
    patches = torch.randn(7, 3 * 2 * 6 * 6, requires_grad=True)
    mask = torch.randn(7, 16)
    found = embed_patch(proj, patches)
    expected = proj(patches.view(-1, 3, 2, 6, 6)).view(-1, 16)
    torch.testing.assert_close(found, expected)
    inputs = [patches, *proj.parameters()]
    gradients = zip(
        torch.autograd.grad((found * mask).sum(), inputs),
        torch.autograd.grad((expected * mask).sum(), inputs),
        strict=True,
    )
    for got, wanted in gradients:
        torch.testing.assert_close(got, wanted)


def test_the_backbone_uses_it_under_the_same_names(make_backbone: MakeBackbone, batch: Batch) -> None:
    backbone = make_backbone()
    embedding = backbone.language_model.model.visual.patch_embed
    called: list[int] = []
    embedding.proj.register_forward_hook(lambda *_: called.append(1))
    prompts = batch.target.prompts if batch.target.prompts.pixel_values is not None else batch.query.prompts
    with torch.no_grad():
        product = backbone(prompts).disc
        assert not called
        del embedding.forward  # the convolution of transformers again
        torch.testing.assert_close(product, backbone(prompts).disc, rtol=1e-4, atol=1e-5)
    assert called and "proj.weight" in embedding.state_dict()
