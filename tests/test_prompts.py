"""The chat layout is that of Qwen: `apply_chat_template` gives the same tokens for the same turn."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image

from rime_pl.errors import DataError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig, chat_prompt, completion
from rime_pl.types import Item, Pair
from tests.micro import PROMPT

# Qwen's ChatML with images. Qwen2-VL begins with a system turn, Qwen3-VL does not.
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "You are a helpful assistant."
QWEN2_VL = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{TURNS}"


def test_evaluation_keeps_small_pictures_for_its_reports(processor: RimeProcessor) -> None:
    """Full ones would go through the pipe of the workers; the model sees the full ones."""
    item = Item("", (picture(600, 400),), "photo")
    batch = processor.eval_batch("target", [Pair("k", "task", "all", None, item)])
    assert [shown.size for shown in batch.items[0].images] == [(148, 99)]
    pixels = batch.prompts.pixel_values
    assert pixels is not None and pixels.equal(processor.prompts([item]).pixel_values)


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.mark.parametrize(("template", "system"), [(TURNS, ""), (QWEN2_VL, SYSTEM)])
@pytest.mark.parametrize("sizes", [[], [(48, 48)], [(48, 24), (24, 48)]])
def test_layout_is_that_of_the_checkpoint(
    template: str, system: str, sizes: list[tuple[int, int]], processor: RimeProcessor
) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, system_prompt=system))
    images = tuple(picture(*size) for size in sizes)
    prompts = ours.prompts([Item("a red ring", images, "c", "Find the picture.")])
    text = f"Find the picture.\na red ring\n{PROMPT.disc_token}\n{PROMPT.rewrite_instruction}"
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    expected = processor.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert prompts.input_ids.tolist() == expected["input_ids"].tolist()
    if images:
        assert prompts.pixel_values is not None and prompts.image_grid_thw is not None
        assert prompts.pixel_values.equal(expected["pixel_values"])
        assert prompts.image_grid_thw.equal(expected["image_grid_thw"])


def test_a_missing_text_or_instruction_leaves_no_empty_line() -> None:
    config = PromptConfig(rewrite_instruction="Rewrite.")
    turn = "<|im_start|>user\n{}\n<disc_emb>\nRewrite.<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt(config, "a cat", "", []) == turn.format("a cat")
    assert chat_prompt(config, "", "Find it.", []) == turn.format("Find it.")


def test_token_names_come_from_the_config(processor: RimeProcessor) -> None:
    config = PromptConfig(disc_token="<emb_d>", gen_token="<emb_g>")
    assert "<emb_d>" in chat_prompt(config, "a", "", []) and "<disc_emb>" not in chat_prompt(
        config, "a", "", []
    )
    assert completion(config, "A cat.") == "A cat.<emb_g><|im_end|>"


def test_the_budget_of_a_rewrite_is_that_of_the_prompt_unless_another_is_given() -> None:
    assert (PROMPT.budget(), PROMPT.budget(None), PROMPT.budget(7)) == (PROMPT.max_rewrite_tokens,) * 2 + (7,)


def test_prompts_pad_left_and_completions_right(processor: RimeProcessor) -> None:
    prompts = processor.prompts([Item("a", (), "c"), Item("a much longer text of several words", (), "c")])
    assert prompts.attention_mask[0, 0] == 0 and prompts.attention_mask[:, -1].all()
    assert (prompts.input_ids[prompts.attention_mask == 0] == processor.pad_id).all()
    completions = processor.completions(["a", "much longer words here", None])
    assert completions.mask[:, 0].all() and completions.mask[0, -1] == 0
    assert processor.decode(completions) == ["a", "much longer words here", ""]
    assert completions.mask.sum(1).tolist()[2] == 2, "the empty rewrite: <gen_emb> and end of turn"


def test_a_rewrite_longer_than_the_budget_names_key_field_and_setting(processor: RimeProcessor) -> None:
    budget = PROMPT.max_rewrite_tokens
    fitting, longer = " red" * budget, " red" * (budget + 1)
    length = len(processor.tokenizer(fitting, add_special_tokens=False)["input_ids"])
    assert length == budget, "the words of this test must be one token each"
    processor.completions([fitting])
    message = (
        rf"train-000000.tar/x: field 'rewrite' must have at most {budget} tokens, but has {budget + 1}. "
        r"Shorten it or raise model.backbone.prompt.max_rewrite_tokens"
    )
    with pytest.raises(DataError, match=message):
        processor.completions([" red", longer], ["train-000000.tar/w", "train-000000.tar/x"])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", PROMPT.disc_token, PROMPT.gen_token])
@pytest.mark.parametrize("field", ["text", "instruction", "rewrite"])
def test_a_special_token_inside_a_text_names_key_and_field(
    field: str, token: str, processor: RimeProcessor
) -> None:
    """It would be read as another image or as another mode token."""
    good = Pair("train-000000.tar/w", "task", "all", Item("a", (), "c", rewrite="b"), Item("d", (), "e"))
    bad = replace(good, key="train-000000.tar/x", target=replace(good.target, **{field: f"a {token} b"}))
    processor.training_batch([good, good])
    message = rf"^train-000000.tar/x \(target\): field '{field}' must not contain '{re.escape(token)}'"
    with pytest.raises(DataError, match=message):
        processor.training_batch([good, bad])
    with pytest.raises(DataError, match=message):
        processor.eval_batch("target", [good, bad])
