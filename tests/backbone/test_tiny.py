"""The base that is made here: its tokenizer loses nothing, its captions are learned at the right places."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from rime_pl.backbone.tiny import SPECIAL_TOKENS, caption_batch, train_tokenizer
from rime_pl.processing import RimeProcessor

TEXTS = [
    "a woman cook with dark skin",
    "  two  spaces,\n\nnew lines\tand a tab ",
    "Ünïcödé, 中文, العربية, 🤷🏽‍♀️",
    "numbers 1234567890 and it's <b>marked</b> & escaped \\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(text: str, processor: RimeProcessor) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_are_one_token_each(processor: RimeProcessor) -> None:
    for token in (*SPECIAL_TOKENS, "<disc_emb>", "<gen_emb>"):
        (one,) = processor.tokenizer(token, add_special_tokens=False)["input_ids"]
        assert one in processor.special_ids


def test_vocabulary_is_learned_from_the_texts() -> None:
    tokenizer = train_tokenizer(["marmalade marmalade marmalade"] * 5, vocab_size=400)
    assert len(tokenizer(" marmalade")["input_ids"]) == 1
    assert len(tokenizer(" armadillo")["input_ids"]) > 1


def test_folder_is_an_ordinary_checkpoint_without_our_tokens(micro_base: Path) -> None:
    """It stands for a downloaded model: nothing of the stages may be in it."""
    assert AutoConfig.from_pretrained(micro_base).model_type == "qwen3_vl"
    assert type(AutoProcessor.from_pretrained(micro_base)).__name__ == "Qwen3VLProcessor"
    added = json.loads((micro_base / "tokenizer.json").read_text())["added_tokens"]
    assert not {"<disc_emb>", "<gen_emb>"} & {token["content"] for token in added}


def test_every_word_of_a_captioned_picture_is_learned(processor: RimeProcessor) -> None:
    """Question and caption, as in the pre-training of a real checkpoint; neither pictures nor padding."""
    samples = [
        (Image.new("RGB", (48, 48), "red"), ["this shows a red square"]),
        (Image.new("RGB", (24, 24), "blue"), ["counted by colour: 1 blue", "this shows blue"]),
    ]
    inputs, labels = caption_batch(processor.processor, samples, random.Random(0))
    tokenizer = processor.tokenizer
    for row, (_, captions) in enumerate(samples):
        ids, learned = inputs["input_ids"][row], labels[row] != -100
        assert learned.equal(inputs["attention_mask"][row].bool() & (ids != processor.image_id))
        assert ids[learned].equal(labels[row][learned])
        text = tokenizer.decode(ids[inputs["attention_mask"][row].bool()])
        assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
        assert any(text.endswith(f"<|im_start|>assistant\n{caption}<|im_end|>") for caption in captions)
    assert inputs["mm_token_type_ids"].sum() == inputs["image_grid_thw"].prod(-1).sum() // 4
