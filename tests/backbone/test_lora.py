"""LoRA in fewer passes gives what PEFT gives, forward and backward; merged weights give the same, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rime_pl.backbone import lora
from rime_pl.backbone.adapters import adapter_values, trained_values
from rime_pl.backbone.lora import add_in_place, merged
from rime_pl.backbone.mllm import Backbone
from rime_pl.preflight.plan.tracking import LiveBytes
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


def words(tied: bool) -> Any:
    """A language model of a table and a head, in which the tokens 5 and 999 train."""

    class Words(PreTrainedModel):
        config_class = PretrainedConfig
        _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"} if tied else {}

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.embed_tokens = nn.Embedding(1000, 8)
            self.between = nn.Linear(8, 8)  # PEFT asks for a layer with LoRA
            self.lm_head = nn.Linear(8, 1000, bias=False)
            self.post_init()

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.lm_head(self.between(self.embed_tokens(input_ids)))
            return logits

    torch.manual_seed(0)
    rows = {"embed_tokens": [5, 999]} | ({} if tied else {"lm_head": [5, 999]})
    config = LoraConfig(r=2, target_modules=["between"], trainable_token_indices=rows)
    model: Any = get_peft_model(Words(PretrainedConfig(tie_word_embeddings=tied)), config)
    for name, parameter in model.named_parameters():
        if "delta" in name:
            nn.init.normal_(parameter)
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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_rows_are_those_of_peft_without_a_copy_of_the_table(
    tied: bool, dtype: torch.dtype, peft_calls: list[Any]
) -> None:
    """Embedding and head; the gradient, too, takes no memory of the table's size."""
    model = words(tied).to(dtype)
    x = torch.tensor([[1, 5, 900, 5], [0, 999, 3, 1]])

    def values() -> list[Tensor]:
        output = model(x)
        mask = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad((output * mask).sum(), trained)]

    trained = [p for name, p in model.named_parameters() if "delta" in name]
    expected = values()
    add_in_place(model)
    with LiveBytes(model.parameters()) as live:
        found = values()
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted)
    assert len(trained) == (1 if tied else 2)
    assert not any(isinstance(layer, TrainableTokensLayer) for layer, *_ in peft_calls)
    table = 1000 * 8 * found[0].element_size()
    assert live.peak.total() < 3 * (found[0].nbytes + 4 * found[0].numel()) + table / 2
    with model.disable_adapter():
        assert not model(x).equal(found[0])
    assert isinstance(peft_calls[-1][0], TrainableTokensLayer)


def whole_weights(backbone: Backbone) -> list[bool]:
    """Whether each layer with LoRA is merged."""
    found = [m.whole_weight is not None for m in backbone.modules() if isinstance(m, LoraLayer)]
    assert found
    return found


# -- merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
def test_merged_weights_give_the_same(load_in_4bit: bool, make_backbone: MakeBackbone, batch: Batch) -> None:
    """Afterwards everything is as before."""
    backbone = make_backbone(load_in_4bit=load_in_4bit).eval()
    randomise_adapter(backbone.peft)
    rows = batch.query

    def everything() -> list[Tensor]:
        out = backbone(rows.prompts, rows.completions, rows.labels)
        return [out.disc, out.gen, out.logprobs]

    before = everything()
    zeros = {name: torch.zeros_like(value) for name, value in trained_values(backbone).items()}
    with torch.no_grad(), adapter_values(backbone, zeros):
        assert not torch.allclose(before[0], everything()[0], atol=1e-2), "the adapter must do something"
    with merged(backbone):
        inside = everything()
        with merged(backbone):
            again = everything()
        assert everything()[0].equal(inside[0]), "the inner one must not end the outer one"
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
    assert not any(whole_weights(backbone))


@torch.no_grad()
def test_a_bfloat16_layer_is_not_rounded_again(make_backbone: MakeBackbone, batch: Batch) -> None:
    """The sum would lose what is smaller than half a step of its weight."""
    for load_in_4bit in (True, False):
        backbone = make_backbone(dtype="bfloat16", load_in_4bit=load_in_4bit).eval()
        randomise_adapter(backbone.peft, scale=0.01)
        expected = backbone(batch.query.prompts, batch.query.completions).gen
        with merged(backbone):
            assert backbone(batch.query.prompts, batch.query.completions).gen.equal(expected)
            assert not any(whole_weights(backbone))
