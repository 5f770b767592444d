"""The tiny base model: its tokenizer loses nothing, and it learns captions only."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from rime_pl.miniature.tiny import SPECIAL_TOKENS, caption_batch, train_tokenizer
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
    """It replaces a downloaded model, so it may hold nothing of the stages."""
    assert AutoConfig.from_pretrained(micro_base).model_type == "qwen3_vl"
    assert type(AutoProcessor.from_pretrained(micro_base)).__name__ == "Qwen3VLProcessor"
    added = json.loads((micro_base / "tokenizer.json").read_text())["added_tokens"]
    assert not {"<disc_emb>", "<gen_emb>"} & {token["content"] for token in added}


def test_there_is_a_loss_on_captions_and_none_on_prompts(processor: RimeProcessor) -> None:
    """The prompt holds a picture or one of its captions; the answer is a caption of the same picture."""
    samples = [
        (Image.new("RGB", (48, 48), "red"), ["this shows a red square", "a square, red"]),
        (Image.new("RGB", (31, 77), "blue"), ["counted by colour: 1 blue", "this shows blue"]),  # odd sizes
    ] * 8
    inputs, labels = caption_batch(processor.processor, samples, random.Random(0))
    tokenizer, given = processor.tokenizer, []
    for row, (_, captions) in enumerate(samples):
        ids, mask, learned = (
            inputs["input_ids"][row],
            inputs["attention_mask"][row].bool(),
            labels[row] != -100,
        )
        answers = [f"{caption}<|im_end|>" for caption in captions]
        assert ids[learned].equal(labels[row][learned]) and tokenizer.decode(ids[learned]) in answers
        prompt = tokenizer.decode(ids[mask & ~learned])
        assert prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_start|>assistant\n")
        given.append(prompt.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0])
        assert "<|image_pad|>" in given[-1] or given[-1] in captions
    with_picture = sum("<|image_pad|>" in words for words in given)
    assert 0 < with_picture < len(samples) and len(inputs["image_grid_thw"]) == with_picture
    assert inputs["mm_token_type_ids"].sum() == inputs["image_grid_thw"].prod(-1).sum() // 4


def test_a_batch_without_any_picture(processor: RimeProcessor) -> None:
    sample = (Image.new("RGB", (48, 48)), ["black"])
    batches = [caption_batch(processor.processor, [sample], random.Random(seed))[0] for seed in range(20)]
    without = [inputs for inputs in batches if "pixel_values" not in inputs]
    assert 0 < len(without) < len(batches)
    assert not any(inputs["mm_token_type_ids"].any() for inputs in without)
