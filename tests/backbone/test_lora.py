"""LoRA in fewer passes gives what PEFT gives, forward and backward; merged weights give the same, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from rime_pl.backbone import lora
from rime_pl.backbone.adapters import adapter_values, trained_values
from rime_pl.backbone.lora import add_in_place, merged
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import randomise_adapter


def layer(dtype: torch.dtype = torch.float32, dropout: float = 0.0, **more: Any) -> Any:
    """A model of one linear layer with an adapter that does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], **more)
    base: Any = nn.Sequential(nn.Linear(16, 24)).to(dtype)
    model: Any = get_peft_model(base, config)
    nn.init.normal_(model.base_model.model[0].lora_B.default.weight)
    return model


def results(model: Any, x: Tensor) -> list[Tensor]:
    """The output and the gradients of input and trained weights; equal seeds give equal dropout."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    output = model(x)
    mask = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [output, *torch.autograd.grad((output * mask).sum(), [x, *trained])]


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that are left to PEFT."""
    calls: list[Any] = []
    usual = lora._as_peft_does
    monkeypatch.setattr(lora, "_as_peft_does", lambda *a, **k: calls.append(a) or usual(*a, **k))
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_values_and_gradients_are_those_of_peft(dropout: float, peft_calls: list[Any]) -> None:
    x, model = torch.randn(2, 5, 16), layer(dropout=dropout)
    expected = results(model, x)
    add_in_place(model)
    for found, wanted in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not peft_calls


def test_what_is_more_is_left_to_peft(peft_calls: list[Any]) -> None:
    x, model = torch.randn(3, 16), layer()
    add_in_place(model)
    with_adapter = model(x)
    assert not peft_calls
    with model.disable_adapter():
        assert not model(x).allclose(with_adapter)
    model.merge_adapter()
    torch.testing.assert_close(model(x), with_adapter)
    model.unmerge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert len(peft_calls) == 3
    for other in (layer(torch.bfloat16), layer(use_dora=True)):
        expected = other(x.to(other.base_model.model[0].base_layer.weight.dtype))
        add_in_place(other)
        torch.testing.assert_close(other(x.to(expected.dtype)), expected)
    assert len(peft_calls) == 5


def test_the_backbone_uses_it(make_backbone: MakeBackbone) -> None:
    layers = [m for m in make_backbone().modules() if hasattr(m, "lora_A")]
    assert layers and all(m.forward.func is lora.forward_in_place for m in layers)


# -- merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
def test_merged_weights_give_the_same(
    load_in_4bit: bool, make_backbone: MakeBackbone, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layers, table and tied head, each computed once; afterwards everything is as before."""
    backbone = make_backbone(load_in_4bit=load_in_4bit).eval()
    randomise_adapter(backbone.peft)
    rows = batch.query

    def everything() -> list[Tensor]:
        out = backbone(rows.prompts, rows.completions, rows.annotated)
        return [out.disc, out.gen, out.logits]

    before = everything()
    zeros = {name: torch.zeros_like(value) for name, value in trained_values(backbone).items()}
    with torch.no_grad(), adapter_values(backbone, zeros):
        assert not torch.allclose(before[0], everything()[0], atol=1e-2), "the adapter must do something"
    copies: list[int] = []
    usual = TrainableTokensLayer.get_merged_weights
    monkeypatch.setattr(
        TrainableTokensLayer, "get_merged_weights", lambda *args: copies.append(1) or usual(*args)
    )
    with merged(backbone):
        inside = everything()
        with merged(backbone):
            again = everything()
        assert everything()[0].equal(inside[0]), "the inner one must not end the outer one"
    assert len(copies) == 1
    for found, twice, expected in zip(inside, again, before, strict=True):
        assert not found.requires_grad and found.equal(twice)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    after = everything()
    assert after[0].requires_grad and all(map(torch.equal, after, before))


@torch.no_grad()
def test_merged_weights_are_those_of_the_values_at_that_time(
    make_backbone: MakeBackbone, batch: Batch
) -> None:
    backbone = make_backbone().eval()
    first = trained_values(backbone)
    randomise_adapter(backbone.peft)
    with adapter_values(backbone, first):
        expected = backbone(batch.query.prompts).disc
        with merged(backbone):
            torch.testing.assert_close(backbone(batch.query.prompts).disc, expected, atol=2e-5, rtol=0)
    with merged(backbone):
        assert not torch.allclose(backbone(batch.query.prompts).disc, expected, atol=1e-2)


def test_an_error_inside_ends_the_merging(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    with pytest.raises(KeyboardInterrupt), merged(backbone):
        raise KeyboardInterrupt
    assert all(layer.whole_weight is None for layer in lora._adapted(backbone))


@torch.no_grad()
def test_a_bfloat16_layer_is_not_rounded_again(make_backbone: MakeBackbone, batch: Batch) -> None:
    """The sum would lose what is smaller than half a step of its weight; the table is copied exactly."""
    for load_in_4bit in (True, False):
        backbone = make_backbone(dtype="bfloat16", load_in_4bit=load_in_4bit).eval()
        randomise_adapter(backbone.peft, scale=0.01)
        expected = backbone(batch.query.prompts, batch.query.completions).gen
        with merged(backbone):
            assert backbone(batch.query.prompts, batch.query.completions).gen.equal(expected)
            kept = [layer for layer in lora._adapted(backbone) if layer.whole_weight is not None]
            assert all(isinstance(layer, TrainableTokensLayer) for layer in kept) and kept
