"""Which layers are 4-bit, that the packed bytes never change, and the table of what trains."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import describe, linear_4bit_modules, packed_weights_hash
from rime_pl.errors import RimeError
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import MICRO

DECODER_LINEARS = 7 * MICRO.num_layers  # q k v o, gate up down


def test_all_decoder_layers_and_nothing_else_are_4bit(shared_backbone: Backbone) -> None:
    names = linear_4bit_modules(shared_backbone)
    assert len(names) == DECODER_LINEARS
    assert all("language_model.layers" in name for name in names)
    model = shared_backbone.language_model
    outside = [*model.model.visual.modules(), model.lm_head, model.get_input_embeddings()]
    assert not any(isinstance(module, Linear4bit) for module in outside)
    assert {p.dtype for p in model.model.visual.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_bytes_are_stored_in_the_type_of_all_others(dtype: str, make_backbone: MakeBackbone) -> None:
    """FSDP shards parameters of one type together; a cast of packed bytes would change bits."""
    backbone = make_backbone(dtype=dtype)
    for name, module in linear_4bit_modules(backbone).items():
        assert module.weight.dtype == getattr(torch, dtype), name
        assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested, name
        assert module.support_avx512bf16_for_cpu is False, (
            "otherwise a forward in eval mode repacks the weights"
        )


def test_packed_hash_survives_training_and_evaluation(make_backbone: MakeBackbone, batch: Batch) -> None:
    backbone = make_backbone()
    before = packed_weights_hash(backbone)
    for mode in (True, False, True):
        backbone.train(mode)
        out = backbone(batch.query.prompts, batch.query.completions, batch.query.labels)
        if mode:
            out.logprobs.sum().backward()
        assert packed_weights_hash(backbone) == before
    with torch.no_grad():
        weight = next(iter(linear_4bit_modules(backbone).values())).weight
        weight.view(torch.uint8)[0] ^= 1
    assert packed_weights_hash(backbone) != before, "one flipped bit must change the hash"


def table(backbone: Backbone) -> dict[str, list[int]]:
    """Part -> 4-bit layers, LoRA layers, trained, parameters."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in describe(backbone).splitlines()[1:]]
    return {name: [int(number.replace(",", "")) for number in numbers] for name, *numbers in lines}


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_table_counts_right(load_in_4bit: bool, make_backbone: MakeBackbone) -> None:
    """The numbers equal the sizes written out here; packed weights count as weights, not as bytes."""
    backbone = make_backbone(load_in_4bit=load_in_4bit)
    width, inner, heads, kv = 64, 128, 64, 32  # hidden, intermediate, 4 x 16, 2 x 16
    layers, rank = MICRO.num_layers, 4
    attention = [(width, heads), (width, kv), (width, kv), (heads, width)]
    mlp = [(width, inner), (width, inner), (inner, width)]

    def part(shapes: list[tuple[int, int]], extra: int) -> list[int]:
        lora = layers * sum(rank * (a + b) for a, b in shapes)
        dense = layers * (sum(a * b for a, b in shapes) + extra)
        return [layers * len(shapes) * load_in_4bit, layers * len(shapes), lora, dense + lora]

    rows = table(backbone)
    assert rows["attention"] == part(attention, extra=2 * 16)  # norms of query and key heads
    assert rows["mlp"] == part(mlp, extra=0)
    vocabulary = backbone.language_model.config.text_config.vocab_size
    assert rows["embed_tokens"] == [0, 0, 2 * width, (vocabulary + 2) * width]
    assert rows["other"] == [0, 0, 0, (2 * layers + 1) * width]
    vision = sum(p.numel() for p in backbone.language_model.model.visual.parameters())
    assert rows["vision tower"] == [0, 0, 0, vision]
    total = rows.pop("total")
    assert total == [sum(column) for column in zip(*rows.values(), strict=True)]


def test_without_4bit_nothing_is_packed(make_backbone: MakeBackbone, batch: Batch) -> None:
    backbone = make_backbone(load_in_4bit=False)
    assert not linear_4bit_modules(backbone)
    assert backbone(batch.query.prompts).disc.isfinite().all()


def test_4bit_without_bitsandbytes_is_an_error(
    make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(RimeError, match=r"model.backbone.load_in_4bit=true needs bitsandbytes.*pip install"):
        make_backbone()
    assert not linear_4bit_modules(make_backbone(load_in_4bit=False))
