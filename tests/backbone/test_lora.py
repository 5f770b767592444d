"""LoRA in fewer passes gives what PEFT gives, forward and backward, and leaves to PEFT what is more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rime_pl.backbone import lora
from rime_pl.backbone.lora import add_in_place
from tests.conftest import MakeBackbone


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
