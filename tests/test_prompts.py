"""The chat layout is that of Qwen: `apply_chat_template` gives the same tokens for the same turn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import Qwen2VLImageProcessor

from rime_pl.errors import DataError, RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig, chat_prompt, completion
from rime_pl.types import Item, Pair
from rime_pl.visual_inputs import MediaProcessor
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
    assert [shown.size for shown in batch.items[0].media] == [(148, 99)]
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
        assert prompts.pixel_values is not None and prompts.grid_thw is not None
        assert prompts.pixel_values.dtype == torch.uint8
        assert ours.media.normalised(prompts.pixel_values).equal(expected["pixel_values"])
        assert prompts.grid_thw.equal(expected["image_grid_thw"])


@pytest.mark.parametrize(
    "changes", [{"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.1, 0.4, 0.5]}]
)
def test_pixels_are_normalised_as_the_image_processor_would(
    changes: dict[str, Any], processor: RimeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = processor.processor.image_processor
    for name, value in changes.items():
        monkeypatch.setattr(images, name, value)
    item = Item("", (picture(48, 24), picture(24, 70)), "c")
    pixels = processor.prompts([item]).pixel_values
    assert pixels is not None and pixels.dtype == torch.uint8
    expected = images(images=list(item.media), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.media.normalised(pixels), expected.float(), rtol=1e-6, atol=1e-6)


def test_pixels_stay_on_the_host(processor: RimeProcessor) -> None:
    """A batch moves to the device without them; the tower gets those of one part."""
    prompts = processor.prompts([Item("", (picture(48, 24),), "c")])
    moved = prompts.to("meta")
    assert moved.input_ids.is_meta and moved.grid_thw is not None and moved.grid_thw.is_meta
    assert moved.pixel_values is prompts.pixel_values


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


# -- one pair at a time --------------------------------------------------------------------------------

WORDS = "a red ring and a blue star on a small table "


def test_a_pair_is_checked_before_it_can_spoil_a_batch(processor: RimeProcessor) -> None:
    """Whatever ``check`` lets through fits into a batch, and what it refuses has a name."""
    good = Pair("tar/x", "task", "all", Item("a", (), "c", rewrite="b"), Item("d", (), "e"))
    assert processor.check(good) == (good, [])
    for side, changes, message in (
        ("target", {"text": "a <|im_end|>"}, r"tar/x \(target\): field 'text' must not contain '<|im_end|>'"),
        (
            "query",
            {"rewrite": " red" * 33},
            r"tar/x \(query\): field 'rewrite' must have at most 32 tokens, but",
        ),
        ("query", {"instruction": "<gen_emb>"}, r"tar/x \(query\): field 'instruction' must not contain"),
    ):
        bad = replace(good, **{side: replace(getattr(good, side), **changes)})
        with pytest.raises(DataError, match=message):
            processor.check(bad)
        other = "target" if side == "query" else "query"
        assert processor.check(bad, [other]) == (bad, []), "the other side is not at fault"
    with pytest.raises(DataError, match=r"tar/x: field 'query' must not be null here"):
        processor.check(replace(good, query=None))


def test_texts_and_rewrites_are_cut_at_the_end_of_a_word(processor: RimeProcessor) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, max_text_tokens=20, max_rewrite_tokens=10))
    pair = Pair("x", "task", "all", Item(WORDS * 9, (), "c", "Find it.", WORDS * 9), Item("d", (), "e"))
    with pytest.raises(
        DataError, match=r"must have at most 20 tokens, .* raise .*max_text_tokens, or set data"
    ):
        ours.check(pair)
    fitting, cut = ours.check(pair, cut=True)
    assert cut == ["x (query): text", "x (query): rewrite"] and fitting.query and pair.query
    for text, limit in ((fitting.query.text, 20), (fitting.query.rewrite or "", 10)):
        length = len(ours.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert limit - 4 <= length <= limit
        assert (WORDS * 9).startswith(f"{text} "), "no word is cut"
    ours.training_batch([fitting])
    assert fitting.query.instruction == pair.query.instruction
    assert ours.check(fitting) == (fitting, [])


@pytest.mark.parametrize(
    "text",
    ["\u4e00" * 400, "\u0958" * 400, "e\u0301" * 400, "x" * 400, "\U0001f9d1" * 99],
    ids=["Chinese", "Devanagari", "accents", "one word", "emoji"],
)
def test_a_text_without_spaces_is_cut_too(text: str, processor: RimeProcessor) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, max_text_tokens=20))
    pair = Pair("x", "task", "all", None, Item(text, (), "c"))
    short = ours.check(pair, ["target"], cut=True)[0].target.text
    assert short and text.startswith(short)
    assert 15 <= len(ours.tokenizer(short, add_special_tokens=False)["input_ids"]) <= 20


def test_an_instruction_is_never_cut(processor: RimeProcessor) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, max_text_tokens=20))
    item = Item("d", (), "c", WORDS * 9)
    with pytest.raises(
        DataError, match=r"field 'instruction' must have at most 20 tokens, .*max_text_tokens.$"
    ):
        ours.check(Pair("x", "task", "all", None, item), ["target"], cut=True)
    with pytest.raises(DataError, match=r"row 0: field 'instruction' must have at most 20 tokens"):
        ours.prompts([item])


def test_search_cuts_what_training_would_never_have_seen(processor: RimeProcessor) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, max_text_tokens=20))
    pair = ours.check(Pair("x", "task", "all", None, Item(WORDS * 9, (), "c")), ["target"], cut=True)[0]
    with pytest.warns(UserWarning, match=r"row 0: the text has more than 20 tokens and is cut there"):
        prompts = ours.prompts([Item(WORDS * 9, (), "c")])
    assert prompts.input_ids.equal(ours.prompts([pair.target]).input_ids)


# -- the size of pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4000, 3000), (600, 3), (1, 1), (48, 48)])
def test_pictures_are_bounded_by_the_contract(size: tuple[int, int], processor: RimeProcessor) -> None:
    side = processor.processor.image_processor.patch_size * processor.processor.image_processor.merge_size
    bounds = {"max_pixels": 16 * side**2, "min_pixels": 4 * side**2}
    ours = RimeProcessor(processor.processor, replace(PROMPT, **bounds))
    grid = ours.prompts([Item("", (picture(*size),), "c")]).grid_thw
    assert grid is not None and 4 <= grid.prod() // 4 <= (16 if size != (600, 3) else 60)
    again = RimeProcessor(processor.processor, PROMPT)  # the settings of one do not leak into another
    assert again.media.picture_size is None and again.contract()["prompt"].keys().isdisjoint(bounds)
    assert ours.contract()["prompt"].items() >= bounds.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_pixels": 10},
            r"max_pixels must be at least 576, the 24 x 24 pixels of one visual token, but is 10",
        ),
        ({"min_pixels": 0}, r"min_pixels must be 1 or more, but is 0"),
        ({"min_pixels": 900, "max_pixels": 600}, r"min_pixels must be at most the 600 pixels .* but is 900"),
        ({"max_text_tokens": 0}, r"max_text_tokens must be 1 or more, but is 0"),
        ({"max_rewrite_tokens": -1}, r"max_rewrite_tokens must be 1 or more, but is -1"),
        ({"max_media": 0}, r"max_media must be 1 or more, but is 0"),
        ({"system_prompt": "a \ud800"}, r"system_prompt must be text, but holds half a character"),
        (
            {"disc_token": "<gen_emb>"},
            r"disc_token must be a token of its own",
        ),
    ],
)
def test_bounds_that_leave_nothing_are_refused(
    changes: dict[str, Any], message: str, processor: RimeProcessor
) -> None:
    with pytest.raises(RimeError, match=rf"model.backbone.prompt.{message}"):
        RimeProcessor(processor.processor, replace(PROMPT, **changes))


def test_an_item_with_too_many_pictures_is_named(processor: RimeProcessor) -> None:
    ours = RimeProcessor(processor.processor, replace(PROMPT, max_media=2))
    two, three = (Item("", (picture(24, 24),) * count, "c") for count in (2, 3))
    assert ours.check(Pair("k", "task", "all", two, two)) == (Pair("k", "task", "all", two, two), [])
    for query, target, side in ((three, two, "query"), (two, three, "target")):
        with pytest.raises(
            DataError,
            match=rf"k \({side}\) must have at most 2 pictures, clips and pages, but has 3. Use fewer",
        ):
            ours.check(Pair("k", "task", "all", query, target), cut=True)
    with pytest.raises(DataError, match=r"row 1 must have at most 2 pictures, clips and pages, but has 3"):
        ours.prompts([two, three])
    many = Item("", (picture(24, 24),) * 17, "c")
    with pytest.raises(DataError, match=r"row 0 must have at most 16 pictures, clips and pages, but has 17"):
        processor.prompts([many])


def test_an_adapter_from_before_the_bounds_still_fits(processor: RimeProcessor) -> None:
    before = {
        name: getattr(PROMPT, name)
        for name in ("disc_token", "gen_token", "rewrite_instruction", "system_prompt", "max_rewrite_tokens")
    }
    assert processor.contract()["prompt"] == before and PromptConfig(**before) == PROMPT


@pytest.mark.parametrize("stage", ["sft", "cma", "refine_rl"])
def test_the_2b_recipes_give_a_picture_256_visual_tokens(stage: str) -> None:
    """Qwen2-VL: patches of 14 pixels, 2 x 2 of them a token."""
    recipe = yaml.safe_load((Path(__file__).parents[1] / f"configs/{stage}.yaml").read_text())
    prompt = PromptConfig(**recipe["model"]["backbone"]["prompt"])
    images = Qwen2VLImageProcessor()
    size = MediaProcessor(SimpleNamespace(image_processor=images), prompt).picture_size
    grid = images(images=[picture(4000, 3000)], size=size, return_tensors="pt")["image_grid_thw"]
    assert 220 <= grid.prod() // images.merge_size**2 <= 256
