"""A checkpoint in the layout of UME-R1: its files tell tokens and system prompt, the rest is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText, AutoProcessor

import rime_pl
from rime_pl.errors import RimeError
from rime_pl.types import Item
from tests.families import noise, save_family

#: Its card names <gen_emb> in the words that ask for the text.
ASK = "Represent the above input. \nFinally, use the <gen_emb> tag to represent the entire input."
#: The part of Qwen2-VL's own template that such checkpoints keep.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole weights, and mode tokens that were added as ordinary tokens, <gen_emb> first."""
    folder = save_family("qwen2_vl", tmp_path_factory.mktemp("released") / "ume-tiny")
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<gen_emb>"])
    processor.tokenizer.add_tokens(["<disc_emb>"])
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(3)
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    ids = processor.tokenizer.convert_tokens_to_ids(["<gen_emb>", "<disc_emb>"])
    model.get_input_embeddings().weight.data[ids] = torch.randn(2, model.config.text_config.hidden_size)
    model.save_pretrained(folder)
    return folder


def as_its_card_does(folder: Path, ask: str) -> torch.Tensor:
    """The discriminative vector by transformers alone: its template, and the state at <disc_emb>."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = f"Represent the given image.\n<disc_emb>\n{ask}"
    content = [{"type": "image", "image": noise(1)}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0]
    place = inputs["input_ids"][0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<disc_emb>"))
    return normalize(hidden[place], dim=0)


def test_it_is_read_as_its_card_says(released: Path) -> None:
    model = rime_pl.load(released, prompt={"rewrite_instruction": ASK, "max_rewrite_tokens": 8})
    prompt, processor = model.backbone.processor.prompt, model.backbone.processor
    assert prompt.system_prompt == "You are a helpful assistant."
    assert processor.gen_id == processor.disc_id - 1 and not processor.new_tokens
    found = model.encode(Item("Represent the given image.", (noise(1),)))
    assert float(found @ as_its_card_does(released, ASK)) > 0.99999
    assert model.encode("a cat", "generative").isfinite().all() and not model.tasks


def test_it_can_be_exported(released: Path, tmp_path: Path) -> None:
    from rime_pl.export.exporting import Order, export

    prompt = {"rewrite_instruction": ASK, "max_rewrite_tokens": 8}
    export(Order("huggingface", released, tmp_path / "out"), lambda line: None, prompt)
    again = rime_pl.load(tmp_path / "out")
    assert torch.allclose(
        again.encode("a cat"), rime_pl.load(released, prompt=prompt).encode("a cat"), atol=1e-5
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, r"No file of it says with which words .* prompt=\{\"rewrite_instruction\": \"...\"\}"),
        (
            {"rewrite_instruction": "x", "instruction": "y"},
            "prompt must hold settings of a prompt, .* but holds 'instruction'",
        ),
        (
            {"rewrite_instruction": "x", "disc_token": "<emb>"},
            r"must have the token <emb>, .* does not. Give the name of its own as",
        ),
        ({"rewrite_instruction": "<disc_emb>"}, "must not contain '<disc_emb>'"),
        ({"rewrite_instruction": "x", "max_rewrite_tokens": "8"}, "'prompt.max_rewrite_tokens' must be int"),
        ({"rewrite_instruction": "x", "disc_token": ["a"]}, "must have the token"),
    ],
)
def test_what_cannot_be_known_is_asked_for(prompt: dict[str, Any] | None, said: str, released: Path) -> None:
    with pytest.raises(RimeError, match=said):
        rime_pl.load(released, prompt=prompt)


def test_a_base_model_and_other_checkpoints_are_refused(released: Path, tmp_path: Path) -> None:
    words = {"rewrite_instruction": "x"}
    base = save_family("qwen3_vl", tmp_path / "base")
    with pytest.raises(RimeError, match="a plain base model has none, and is no trained model"):
        rime_pl.load(base)
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(RimeError, match="has a quantization_config"):
        rime_pl.load(copy, prompt=words)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(RimeError, match=r"config\.json says 'llama'"):
        rime_pl.load(copy, prompt=words)


def test_a_template_that_says_no_system_prompt(released: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("Hello! {{ messages[0]['content'][0]['text'] }}")
    with pytest.raises(RimeError, match="Give the system prompt of the training"):
        rime_pl.load(copy, prompt={"rewrite_instruction": "x"})
    model = rime_pl.load(copy, prompt={"rewrite_instruction": "x", "system_prompt": ""})
    assert model.backbone.processor.prompt.system_prompt == ""
