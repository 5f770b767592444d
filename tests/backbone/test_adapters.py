"""LoRA and token rows: which layers get them, a round trip through the folder, folders that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from rime_pl.backbone.adapters import (
    WEIGHTS_FILE,
    adapter_state,
    load_adapter_weights,
    save_adapter,
    state_hash,
)
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone, load_backbone
from rime_pl.backbone.quantization import keep_packed_weights, packed_weights_hash, quantization_config
from rime_pl.errors import RimeError
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import CONTRACT_FILE, RimeProcessor
from rime_pl.types import Batch
from tests.conftest import MakeBackbone
from tests.micro import build_base, micro_config, randomise_adapter


def write(folder: Path, backbone: Backbone) -> Path:
    state = adapter_state(backbone.peft)
    save_adapter(folder, backbone.peft, state, backbone.processor, backbone.config, backbone.base_hash)
    return folder


@pytest.fixture(scope="module")
def trained(make_backbone: MakeBackbone) -> Backbone:
    """A backbone with random adapter values; tests only read it."""
    backbone = make_backbone()
    randomise_adapter(backbone.peft)
    return backbone.eval()


@pytest.fixture(scope="module")
def adapter(trained: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adapter"), trained)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return shutil.copytree(adapter, tmp_path / "adapter")


# -- where LoRA goes ------------------------------------------------------------------------------------


def test_only_the_language_model_and_two_token_rows_train(trained: Backbone) -> None:
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    rows = {name for name in names if "lora_" not in name}
    layers, linears = 2, 7
    assert len(names - rows) == layers * linears * 2
    assert all("language_model.layers." in name for name in names - rows)
    (row,) = rows
    shape = dict(trained.named_parameters())[row].shape
    assert "embed_tokens" in row and shape == (2, 64), "two rows, not the whole embedding"


def test_small_steps_on_a_bfloat16_base_are_not_rounded_away(
    make_backbone: MakeBackbone, batch: Batch
) -> None:
    """At the learning rate of configs/refine_rl.yaml, 90 % of bfloat16 weights would not change."""
    backbone = make_backbone(dtype="bfloat16")
    randomise_adapter(backbone.peft)
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-5, weight_decay=0.0)
    out = backbone(batch.query.prompts, batch.query.completions, batch.query.labels)
    (out.disc.sum() + out.gen.sum() + out.logprobs.sum()).backward()
    optimizer.step()
    for name, p in trained.items():
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert (p != before[name]).float().mean() > 0.95, name


@pytest.mark.parametrize("pattern", [r"transformer\.h\.\d+\.attn", r"q_proj", r".*language_model\.layers"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, make_backbone: MakeBackbone) -> None:
    with pytest.raises(
        RimeError, match=r"model.backbone.lora_targets must match .* but '.*' matches none"
    ) as error:
        make_backbone(lora_targets=pattern)
    assert "_proj" in str(error.value), "the message shows the name of a layer"


def test_a_pattern_that_reaches_the_vision_tower_is_refused(make_backbone: MakeBackbone) -> None:
    with pytest.raises(RimeError, match=r"matches 'model\.visual\..*', which is not in the language model"):
        make_backbone(lora_targets=r".*(qkv|q_proj)")


def test_one_step_changes_every_lora_b_and_nothing_of_the_base(
    make_backbone: MakeBackbone, batch: Batch
) -> None:
    backbone = make_backbone()
    stage = SFTModule(backbone.config)
    stage.backbone, stage.log = backbone, lambda *_, **__: None  # type: ignore[method-assign]
    trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in backbone.named_parameters() if not p.requires_grad}
    packed, before = packed_weights_hash(backbone), state_hash(frozen)
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        optimizer.zero_grad()
        stage.training_step(batch, step).backward()
        optimizer.step()
        if step == 0:  # B starts at 0, so A gets its first gradient in the second step
            unchanged = [n for n, p in trained.items() if "lora_A" not in n and torch.equal(p, start[n])]
            assert not unchanged
    assert not [n for n, p in trained.items() if torch.equal(p, start[n])]
    assert packed_weights_hash(backbone) == packed and state_hash(frozen) == before


# -- round trip -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip_gives_the_same_embeddings(trained: Backbone, adapter: Path, batch: Batch) -> None:
    loaded = load_backbone(adapter)
    assert not loaded.training and loaded.processor.prompt == trained.processor.prompt
    rows = batch.query
    for got, expected in zip(
        (loaded(rows.prompts, rows.completions).disc, loaded(rows.prompts, rows.completions).gen),
        (trained(rows.prompts, rows.completions).disc, trained(rows.prompts, rows.completions).gen),
        strict=True,
    ):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_peft_loads_the_folder(trained: Backbone, adapter: Path, micro_base: Path, batch: Batch) -> None:
    """Only PEFT, the base model and our processor are needed to compute the embeddings.

    The tiny base model has spare rows for the mode tokens, as large checkpoints have.
    """
    base = AutoModelForImageTextToText.from_pretrained(
        micro_base, dtype=torch.float32, quantization_config=quantization_config(trained.config)
    )
    processor = RimeProcessor.from_adapter(adapter)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    keep_packed_weights(model)  # otherwise CPUs with AVX512-BF16 compute in bfloat16
    rows = batch.query
    expected = trained(rows.prompts, rows.completions)
    ids = torch.cat([rows.prompts.input_ids, rows.completions.ids], dim=1)
    hidden = model.get_base_model().model(
        input_ids=ids,
        attention_mask=torch.cat([rows.prompts.attention_mask, rows.completions.mask], dim=1),
        pixel_values=trained.pixels(rows.prompts),
        image_grid_thw=rows.prompts.grid_thw,
        mm_token_type_ids=(ids == processor.image_id).int(),
    )
    for token, vectors in ((processor.disc_id, expected.disc), (processor.gen_id, expected.gen)):
        picked = torch.nn.functional.normalize(hidden.last_hidden_state[ids == token], dim=-1)
        torch.testing.assert_close(picked, vectors, atol=1e-5, rtol=0)


def test_folder_is_small_and_holds_what_encoding_needs(adapter: Path) -> None:
    assert sum(file.stat().st_size for file in adapter.iterdir()) < 5_000_000
    state = load_file(adapter / WEIGHTS_FILE)
    assert not [name for name in state if "embed_tokens.weight" in name], "not the whole embedding table"
    contract = json.loads((adapter / CONTRACT_FILE).read_text())
    assert contract["prompt"]["disc_token"] == "<disc_emb>"
    assert contract["backbone"]["load_in_4bit"] is True and "prompt" not in contract["backbone"]


def test_four_bit_adapter_fits_the_unquantised_base(adapter: Path, micro_base: Path) -> None:
    config = micro_config(micro_base, load_in_4bit=False)
    processor = RimeProcessor.from_adapter(adapter)
    backbone = Backbone(config, processor)
    load_adapter_weights(backbone.peft, adapter, processor, backbone.base_hash)
    assert state_hash(adapter_state(backbone.peft)) == state_hash(load_file(adapter / WEIGHTS_FILE))


def test_a_later_stage_may_raise_the_budget_of_a_rewrite(
    adapter: Path, backbone_config: BackboneConfig
) -> None:
    for budget, fits in ((33, True), (31, False)):
        prompt = replace(backbone_config.prompt, max_rewrite_tokens=budget)
        config = replace(backbone_config, prompt=prompt)
        if fits:
            load_into_new(adapter, config)
        else:
            with pytest.raises(
                RimeError, match=r"prompt must be that of this run.*only max_rewrite_tokens may"
            ):
                load_into_new(adapter, config)


# -- folders that do not fit ------------------------------------------------------------------------------


def load_into_new(folder: Path, config: BackboneConfig) -> None:
    processor = RimeProcessor.from_pretrained(config.name_or_path, config.prompt)
    backbone = Backbone(config, processor)
    load_adapter_weights(backbone.peft, folder, processor, backbone.base_hash)


def test_adapter_of_another_base_names_it(
    adapter: Path, scenes_corpus: Path, micro_base: Path, tmp_path: Path
) -> None:
    other = build_base(tmp_path / "other", scenes_corpus, seed=1)
    with pytest.raises(
        RimeError,
        match=r"model.backbone.name_or_path must give the base model that this adapter was trained on",
    ) as e:
        load_into_new(adapter, micro_config(other))
    assert str(micro_base) in str(e.value) and str(adapter) in str(e.value)


def test_damaged_weights_are_refused(copy: Path, backbone_config: BackboneConfig) -> None:
    path = copy / WEIGHTS_FILE
    state = load_file(path)
    name = next(n for n in state if "lora_B" in n)
    state[name][0, 0] += 1e-3
    save_file(state, path)
    with pytest.raises(RimeError, match=rf"{WEIGHTS_FILE} is damaged"):
        load_into_new(copy, backbone_config)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RimeError, match=rf"{WEIGHTS_FILE} is damaged"):
        load_into_new(copy, backbone_config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_though_their_hash_fits(
    value: float, copy: Path, backbone_config: BackboneConfig
) -> None:
    state = load_file(copy / WEIGHTS_FILE)
    name = next(n for n in state if "lora_B" in n)
    state[name][0, 0] = value
    save_file(state, copy / WEIGHTS_FILE)
    contract = json.loads((copy / CONTRACT_FILE).read_text())
    (copy / CONTRACT_FILE).write_text(json.dumps(contract | {"weights_hash": state_hash(state)}))
    with pytest.raises(RimeError, match=rf"{WEIGHTS_FILE}: tensor {name} must hold finite numbers"):
        load_into_new(copy, backbone_config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_type_are_refused_though_their_hash_fits(
    dtype: torch.dtype, copy: Path, backbone_config: BackboneConfig
) -> None:
    state = load_file(copy / WEIGHTS_FILE)
    name = next(n for n in state if "lora_B" in n)
    state[name] = state[name].to(dtype)
    save_file(state, copy / WEIGHTS_FILE)
    contract = json.loads((copy / CONTRACT_FILE).read_text())
    (copy / CONTRACT_FILE).write_text(json.dumps(contract | {"weights_hash": state_hash(state)}))
    with pytest.raises(
        RimeError, match=rf"{WEIGHTS_FILE}: tensor {name} must be torch.float32, .* is {dtype}"
    ):
        load_into_new(copy, backbone_config)


def test_a_tokenizer_that_is_not_complete_is_refused(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(RimeError, match=r"the tokenizer must have .* but lacks .*: copy the folder again"):
        RimeProcessor.from_adapter(copy)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"base": "x"}'])
def test_a_damaged_contract_is_refused(text: str, copy: Path, backbone_config: BackboneConfig) -> None:
    (copy / CONTRACT_FILE).write_text(text)
    with pytest.raises(RimeError, match=r"rime.json is damaged: .* Copy it again"):
        load_into_new(copy, backbone_config)


def test_another_prompt_contract_is_refused(adapter: Path, backbone_config: BackboneConfig) -> None:
    other = replace(backbone_config, prompt=replace(backbone_config.prompt, rewrite_instruction="Describe."))
    with pytest.raises(RimeError, match=r"rime.json: prompt must be that of this run.*Describe\..*Rewrite\."):
        load_into_new(adapter, other)


def test_an_adapter_of_an_earlier_version_is_compared_by_the_earlier_rule(
    copy: Path, backbone_config: BackboneConfig, trained: Backbone
) -> None:
    contract = json.loads((copy / CONTRACT_FILE).read_text())

    def load(base_hash: str) -> None:
        (copy / CONTRACT_FILE).write_text(json.dumps(contract | {"base_hash": base_hash}))
        backbone = Backbone(backbone_config, trained.processor)
        hashes = (backbone.base_hash, backbone.old_base_hash)
        load_adapter_weights(backbone.peft, copy, trained.processor, *hashes)

    with pytest.warns(UserWarning, match=r"earlier version, .* covers only the embedding table"):
        load(trained.old_base_hash)
    with pytest.raises(RimeError, match=r"must give the base model that this adapter was trained on"):
        load("0" * 64)


def test_another_rank_names_the_tensor(adapter: Path, backbone_config: BackboneConfig) -> None:
    with pytest.raises(
        RimeError, match=r"tensor .*lora_A.* must have the same shape .* has \(4, 128\) and \(8, 128\)"
    ):
        load_into_new(adapter, replace(backbone_config, lora_r=8))


def test_a_folder_that_is_no_adapter(copy: Path, backbone_config: BackboneConfig, tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"empty must hold an adapter"):
        load_into_new(tmp_path / "empty", backbone_config)
    with pytest.raises(RimeError, match=r"empty must be the adapter folder .* has no rime.json"):
        RimeProcessor.from_adapter(tmp_path / "empty")
    (copy / WEIGHTS_FILE).unlink()
    with pytest.raises(RimeError, match=r"must hold an adapter"):
        load_backbone(copy)
