"""LoRA in the vision tower: which layers train, gradients as by transformers, what a text-only row does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from rime_pl.backbone.adapters import adapter_state, attach_adapters, load_adapter_weights, save_adapter
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone, load_backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Item, Page, Rows
from tests.families import FAMILIES, clip, noise, save_family, tower_calls
from tests.micro import build_backbone, micro_config, randomise_adapter

TOLERANCE = 1e-5
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def trained(base: Path, tower: str = "all", **changes: Any) -> Backbone:
    """A backbone with random adapter values, not quantised unless that is asked for."""
    backbone = build_backbone(micro_config(base, lora_tower=tower, **{"load_in_4bit": False, **changes}))
    randomise_adapter(backbone.peft, scale=0.05)
    return backbone


def mixed_rows(processor: RimeProcessor) -> Rows:
    """A clip and a picture, a text, a page."""
    items = [
        Item("a cat", (clip(3, 56, 28), noise(1, 84, 40)), "a", rewrite="a red cat"),
        Item("an old boat", (), "b", rewrite="a boat"),
        Item("", (Page(noise(2, 28, 84)),), "c", rewrite="a house left"),
    ]
    return processor.rows(items, ["a", "b", "c"])


def of_texts(rows: Rows) -> Rows:
    return rows.select(torch.tensor([1]))


def gradients_of(backbone: Backbone, value: Tensor) -> Gradients:
    backbone.zero_grad(set_to_none=True)
    value.backward()
    return {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad and p.grad is not None}


def value_of(backbone: Backbone, rows: Rows) -> Tensor:
    out = backbone(rows.prompts, rows.completions, rows.labels)
    weight = torch.linspace(-1, 1, out.disc.numel()).view_as(out.disc)
    return out.logprobs.sum() + (weight * out.disc).sum() + (weight * out.gen).sum()


def assert_equal(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        error = float((got[name] - gradient).norm() / gradient.norm())
        assert error < TOLERANCE, f"{name}: {error:.1e}"


# -- which layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["none", "merger", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_chosen_part_has_lora(
    family: str, tower: str, bases: dict[str, Path]
) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(bases[family])
    linears = {name for name, module in plain.model.visual.named_modules() if isinstance(module, nn.Linear)}
    mergers = {name for name in linears if not name.startswith("blocks.")}
    backbone = trained(bases[family], tower)
    names = {name for name, p in backbone.named_parameters() if p.requires_grad}
    found = {name.split(".visual.")[1].split(".lora_")[0] for name in names if ".visual." in name}
    assert found == {"none": set(), "merger": mergers, "all": linears}[tower]
    assert len(mergers) == (4 if family == "qwen3_vl" else 2), "Qwen3-VL has mergers of deeper layers"
    decoder = {name for name in names if ".visual." not in name}
    assert decoder == {
        name for name, p in trained(bases[family], "none").named_parameters() if p.requires_grad
    }


def test_a_tower_with_a_layer_of_another_name_is_refused(bases: dict[str, Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(bases["qwen2_vl"])
    model.model.visual.blocks[0].more = nn.Linear(2, 2)
    config = micro_config(bases["qwen2_vl"], lora_tower="all")
    with pytest.raises(RimeError, match=r"lora_tower=all must find .* know 'model.visual.blocks.0.more'"):
        attach_adapters(model, config, [1, 2])
    attach_adapters(model, replace(config, lora_tower="merger"), [1, 2])


def test_a_pattern_that_cannot_be_joined_with_the_towers_is_refused() -> None:
    BackboneConfig("base", lora_targets="(?i).*Q_PROJ")
    with pytest.raises(RimeError, match="lora_targets must be a regular expression"):
        BackboneConfig("base", lora_targets="(?i).*Q_PROJ", lora_tower="all")


def test_the_tower_of_a_4_bit_model_stays_as_it_is_and_its_lora_is_float32(bases: dict[str, Path]) -> None:
    backbone = trained(bases["qwen3_vl"], load_in_4bit=True, dtype="bfloat16")
    assert linear_4bit_modules(backbone) and not [n for n in linear_4bit_modules(backbone) if "visual" in n]
    tower = dict(backbone.language_model.model.visual.named_parameters())
    assert {p.dtype for p in tower.values() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in tower.values() if not p.requires_grad} == {torch.bfloat16}
    gradients = gradients_of(backbone, value_of(backbone, mixed_rows(backbone.processor)))
    assert all(gradients[n].norm() > 0 for n, p in backbone.named_parameters() if p.requires_grad)


# -- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str, bases: dict[str, Path]) -> None:
    """It gets pictures and clips apart, and so calls the tower twice."""
    backbone = trained(bases[family])
    rows = mixed_rows(backbone.processor)
    ids = torch.cat([rows.prompts.input_ids, rows.completions.ids], dim=1)
    pixels, grid, seconds = backbone.pixels(rows.prompts), rows.prompts.grid_thw, rows.prompts.seconds
    assert grid is not None and seconds is not None
    parts = list(zip(pixels.split(grid.prod(-1).tolist()), (seconds > 0).tolist(), strict=True))
    with tower_calls(backbone) as calls:
        logits = backbone.language_model(
            input_ids=ids,
            attention_mask=torch.cat([rows.prompts.attention_mask, rows.completions.mask], dim=1),
            pixel_values=torch.cat([part for part, is_clip in parts if not is_clip]),
            pixel_values_videos=torch.cat([part for part, is_clip in parts if is_clip]),
            **backbone.layout(rows.prompts, ids),
        ).logits
    assert len(calls) == 2
    labelled = rows.labels != -100
    logprobs = logits[:, rows.prompts.input_ids.shape[1] - 1 : -1].log_softmax(-1)[labelled]
    expected = gradients_of(backbone, logprobs.gather(1, rows.labels[labelled].unsqueeze(1)).sum())
    assert len([name for name in expected if ".visual." in name]) >= 16
    with tower_calls(backbone) as calls:
        ours = backbone(rows.prompts, rows.completions, rows.labels).logprobs.sum()
    assert len(calls) == 1
    assert_equal(gradients_of(backbone, ours), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, bases: dict[str, Path]) -> None:
    found = []
    for checkpointing in (False, True):
        backbone = trained(bases[family], gradient_checkpointing=checkpointing)
        found.append(gradients_of(backbone, value_of(backbone, mixed_rows(backbone.processor))))
    assert_equal(found[1], found[0])


# -- rows without media ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_gives_the_tower_a_gradient_of_zeros_and_no_value_changes(
    family: str, bases: dict[str, Path]
) -> None:
    backbone = trained(bases[family])
    texts = of_texts(mixed_rows(backbone.processor))
    with tower_calls(backbone) as calls:
        gradients = gradients_of(backbone, value_of(backbone, texts))
    assert calls == [4], "one picture of the smallest size"
    tower = {name for name, p in backbone.named_parameters() if p.requires_grad and ".visual." in name}
    assert tower and tower <= gradients.keys()
    assert all(gradients[name].eq(0).all() == (name in tower) for name in gradients)
    with tower_calls(backbone) as calls, torch.no_grad():
        value = value_of(backbone, texts)
        backbone.eval()
        assert value_of(backbone, texts).equal(value)
        assert backbone.encode_media(texts.prompts) is None
    assert calls == [4], "nobody waits for an evaluation"


def test_a_frozen_tower_does_not_run_for_a_text(bases: dict[str, Path]) -> None:
    backbone = trained(bases["qwen3_vl"], "none")
    texts = of_texts(mixed_rows(backbone.processor))
    with tower_calls(backbone) as calls:
        value_of(backbone, texts)
    assert calls == []


# -- the folder of the adapter --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Backbone, Path]]:
    found = {}
    for family in FAMILIES:
        backbone, folder = trained(bases[family]).eval(), tmp_path_factory.mktemp(family)
        state = adapter_state(backbone.peft)
        about = backbone.processor, backbone.config, backbone.base_hash
        save_adapter(folder, backbone.peft, state, *about)
        found[family] = backbone, folder
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_tower_sees_the_same(
    family: str, saved: dict[str, tuple[Backbone, Path]], bases: dict[str, Path]
) -> None:
    """Loaded here, and by PEFT alone."""
    backbone, folder = saved[family]
    rows = mixed_rows(backbone.processor)
    expected = backbone(rows.prompts).disc
    assert load_backbone(folder)(rows.prompts).disc.equal(expected)
    assert (trained(bases[family], "none").eval()(rows.prompts).disc - expected).norm() > 1e-2
    base = AutoModelForImageTextToText.from_pretrained(bases[family], dtype=torch.float32)
    base.resize_token_embeddings(len(backbone.processor.tokenizer), mean_resizing=False)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    media = backbone.pixels(rows.prompts)
    tower = loaded.get_base_model().model.visual(media, grid_thw=rows.prompts.grid_thw)
    ours = backbone.language_model.model.visual(media, grid_thw=rows.prompts.grid_thw)
    torch.testing.assert_close(tower.pooler_output, ours.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", ["none", "merger"])
def test_an_adapter_with_another_part_of_the_tower_is_refused(
    tower: str, saved: dict[str, tuple[Backbone, Path]], bases: dict[str, Path]
) -> None:
    other, (backbone, folder) = trained(bases["qwen2_vl"], tower), saved["qwen2_vl"]
    with pytest.raises(RimeError, match=r"tensor .*visual.* Use the .*lora_tower of the adapter"):
        load_adapter_weights(other.peft, folder, backbone.processor, backbone.base_hash)
