"""A merged checkpoint computes what 4-bit weights, LoRA and the trained rows compute together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from rime_pl.backbone.mllm import Backbone
from rime_pl.export.merging import merged_model
from tests.families import save_family
from tests.micro import build_backbone, micro_config, randomise_adapter


def trained(base: Path, **changes: object) -> Backbone:
    backbone = build_backbone(micro_config(base, **changes)).eval()
    randomise_adapter(backbone.peft, scale=0.2)
    return backbone


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen2_vl", tmp_path_factory.mktemp("base") / "base")


def test_each_weight_is_the_dequantised_one_with_lora(base: Path) -> None:
    backbone = trained(base)
    model = merged_model(backbone, "trained", torch.float32)
    name = "model.language_model.layers.1.mlp.down_proj"
    layer = backbone.language_model.get_submodule(name)
    packed = layer.base_layer.weight
    change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = dequantize_4bit(packed.data, packed.quant_state) + change
    assert torch.allclose(model.get_submodule(name).weight, expected, atol=1e-6)
    original = merged_model(backbone, "original", torch.float32).get_submodule(name).weight
    assert not torch.allclose(original, expected, atol=1e-3)
    tower = "model.visual.blocks.0.mlp.fc1"
    assert torch.equal(model.get_submodule(tower).weight, backbone.language_model.get_submodule(tower).weight)


def test_a_linear_layer_without_lora_is_dequantised_too(base: Path) -> None:
    backbone = trained(base, lora_targets=r".*language_model\.layers\.\d+\.self_attn\.[qv]_proj")
    name = "model.language_model.layers.0.mlp.up_proj"
    packed = backbone.language_model.get_submodule(name).weight
    model = merged_model(backbone, "trained", torch.float32)
    assert torch.equal(model.get_submodule(name).weight, dequantize_4bit(packed.data, packed.quant_state))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_are_in_the_table_and_in_a_head_of_its_own(
    tied: bool, base: Path, tmp_path: Path
) -> None:
    if not tied:
        model = merged_model(trained(base, load_in_4bit=False), "trained", torch.float32)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.save_pretrained(tmp_path / "untied")
        for file in base.glob("*token*"):
            (tmp_path / "untied" / file.name).write_bytes(file.read_bytes())
        processor = json.loads((base / "processor_config.json").read_text())
        (tmp_path / "untied" / "processor_config.json").write_text(json.dumps(processor))
        base = tmp_path / "untied"
    backbone = trained(base, load_in_4bit=False)
    assert backbone.language_model.config.tie_word_embeddings is tied
    ids = [backbone.processor.disc_id, backbone.processor.gen_id]
    model = merged_model(backbone, "trained", torch.float32)
    tables = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    layers = {"in": backbone.language_model.get_input_embeddings(), "out": backbone.language_model.lm_head}
    for side, table in tables.items():
        rows = layers["in" if tied else side].token_adapter.trainable_tokens_delta["default"]
        assert torch.equal(table[ids], rows)
    assert torch.equal(tables["in"][ids], tables["out"][ids]) is tied


def test_generation_is_ours(base: Path) -> None:
    backbone = trained(base)
    settings = merged_model(backbone, "trained", torch.float32).generation_config
    processor = backbone.processor
    assert settings.eos_token_id == [processor.gen_id, processor.turn_end_id]
    assert settings.max_new_tokens == processor.prompt.max_rewrite_tokens and not settings.do_sample
    assert processor.image_id in settings.suppress_tokens and processor.gen_id not in settings.suppress_tokens


def test_half_precision_rounds_the_sum_once(base: Path) -> None:
    backbone = trained(base)
    name = "model.language_model.layers.0.self_attn.q_proj"
    exact = merged_model(backbone, "trained", torch.float32).get_submodule(name).weight
    half = merged_model(backbone, "trained", torch.bfloat16).get_submodule(name).weight
    assert torch.equal(half, exact.bfloat16())
