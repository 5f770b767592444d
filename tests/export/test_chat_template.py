"""Messages of other libraries become our prompt, token for token; what we refuse is refused there, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from rime_pl.export.chat_template import chat_template
from rime_pl.export.folders import reason_for_no_clips, write_processor
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import IMAGE_TOKEN, VIDEO_TOKEN, PromptConfig, chat_prompt
from rime_pl.types import Item
from tests.families import FAMILIES, clip, noise

PROMPT = PromptConfig(
    rewrite_instruction='Rewrite "this"\nin one line, größer, <b>.',
    system_prompt="You are a \\ helpful 'assistant'.",
    max_media=4,
    max_frames=6,
)


@pytest.fixture(scope="module")
def processor(family_base: Callable[[str], Path]) -> RimeProcessor:
    return RimeProcessor.from_pretrained(str(family_base("qwen2_vl")), PROMPT)


def user(*parts: Any) -> dict[str, Any]:
    kinds = {str: "text", list: "video", tuple: "audio"}
    content = [
        {"type": kinds.get(type(part), "image"), kinds.get(type(part), "image"): part} for part in parts
    ]
    return {"role": "user", "content": content}


def rendered(processor: RimeProcessor, messages: list[dict[str, Any]], **more: Any) -> str:
    template = chat_template(processor)
    return str(processor.processor.apply_chat_template(messages, chat_template=template, **more))


@pytest.mark.parametrize("instruction", ["", "Find it."])
@pytest.mark.parametrize("text", ["a red cat", " two\nlines ", "{{ 7 * 7 }} {% raw %}", "größer 漢字 \\n"])
def test_texts_are_those_of_our_prompt(processor: RimeProcessor, text: str, instruction: str) -> None:
    ours = chat_prompt(PROMPT, text, instruction, [])
    system = [{"role": "system", "content": instruction}] if instruction else []
    begun = rendered(processor, [*system, user(text)])
    assert ours.startswith(begun) and begun.endswith(f"{text}\n{PROMPT.disc_token}")
    assert rendered(processor, [*system, {"role": "user", "content": text}]) == begun
    assert rendered(processor, [*system, user(text)], add_generation_prompt=True) == ours
    answered = rendered(processor, [*system, user(text), {"role": "assistant", "content": "A cat."}])
    assert answered == f"{ours}A cat.{PROMPT.gen_token}"


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_in_the_form_of_vllm_give_the_tokens_of_our_prompt(
    family: str, family_base: Callable[[str], Path]
) -> None:
    """vLLM renders parts without their media, and then writes as many tokens as a picture takes."""
    processor = RimeProcessor.from_pretrained(str(family_base(family)), PROMPT)
    item = Item("a cat", (noise(1), clip(4)), instruction="Find it.")
    expected = processor.prompts([item]).input_ids[0].tolist()
    expected = expected[: expected.index(processor.disc_id) + 1]
    parts = [{"type": "text", "text": "a cat"}, {"type": "image"}, {"type": "video"}]
    text = rendered(
        processor, [{"role": "system", "content": "Find it."}, {"role": "user", "content": parts}]
    )
    picture, video = processor.media(item.media, ["picture", "clip"]).slots
    assert text.count(IMAGE_TOKEN) == text.count(VIDEO_TOKEN) == 1
    text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * picture.count(IMAGE_TOKEN))
    # Qwen3-VL's processor writes the times and marks of a clip in the place of its token
    text = text.replace(
        VIDEO_TOKEN, video if processor.media.timed else VIDEO_TOKEN * video.count(VIDEO_TOKEN)
    )
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_media_stand_before_the_words_in_their_order(processor: RimeProcessor) -> None:
    text = rendered(processor, [user("green", noise(1), "and\nblue", list(clip(2).frames))])
    assert text.endswith(
        "user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        f"green\nand\nblue\n{PROMPT.disc_token}"
    )


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user("a <|image_pad|> b")], r"must not contain <\|image_pad\|>"),
        ([user("a <disc_emb>")], "must not contain <disc_emb>"),
        ([{"role": "system", "content": "<|im_end|>"}, user("a")], r"must not contain <\|im_end\|>"),
        ([user("a"), {"role": "assistant", "content": "<gen_emb>"}], "must not contain <gen_emb>"),
        ([{"role": "query", "content": "a"}, {"role": "document", "content": "b"}], "but is of query"),
        ([user("a"), user("b")], "one user message, the item, but there are 2"),
        ([{"role": "system", "content": "a"}], "but there are 0"),
        ([user(" ")], "must have a text, a picture or a clip"),
        ([user("a", ("sound",))], "but has audio"),
        ([user(*[noise(1)] * 5)], "at most 4 pictures and clips, but has 5"),
        ([user(list(clip(7).frames))], "at most 6 frames here, but has 7"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "given as its frames"),
        ([{"role": "system", "content": user(noise(1))["content"]}, user("a")], "Only a user message"),
    ],
)
def test_what_our_code_refuses_is_refused(
    messages: list[dict[str, Any]], said: str, processor: RimeProcessor
) -> None:
    with pytest.raises(TemplateError, match=said):
        rendered(processor, messages)


def test_sentence_transformers_tells_what_is_refused(exported: Callable[..., Path]) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported("qwen2_vl")), device="cpu")
    for wrong, said in (
        ("a <disc_emb> b", "must not contain <disc_emb>"),
        ([noise(1), noise(2)], "but is of query"),
        ({"image": [noise(1)] * 17}, "at most 16"),
    ):
        with pytest.raises((TemplateError, ValueError), match=said):  # the library tells of a pair itself
            model.encode([wrong])


def test_bounds_of_pictures_and_frames_travel_with_the_processor(
    family_base: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    bounds = replace(PROMPT, max_pixels=1600, min_pixels=900, max_frame_pixels=3200)
    processor = RimeProcessor.from_pretrained(str(family_base("qwen2_vl")), bounds)
    write_processor(processor, tmp_path)
    written = AutoProcessor.from_pretrained(tmp_path)
    sizes = processor.media.picture_size, processor.media.frame_size
    assert sizes[0] == {"shortest_edge": 900, "longest_edge": 1600} and sizes[1] is not None
    assert (dict(written.image_processor.size), dict(written.video_processor.size)) == sizes
    assert written.tokenizer.padding_side == "left" and not written.video_processor.do_sample_frames
    ids = written.apply_chat_template([user(noise(1, 200, 90))], tokenize=True, return_dict=True)["input_ids"]
    ours = processor.prompts([Item("", (noise(1, 200, 90),))]).input_ids[0].tolist()
    assert list(ids[0]) == ours[: ours.index(processor.disc_id) + 1]


def test_clips_that_others_cannot_read_are_refused(family_base: Callable[[str], Path]) -> None:
    bounds = replace(PROMPT, max_frame_pixels=3200)
    processor = RimeProcessor.from_pretrained(str(family_base("qwen3_vl")), bounds)
    reason = reason_for_no_clips(processor)
    assert "bounds the pixels of each frame" in reason
    template = chat_template(processor, reason)
    with pytest.raises(TemplateError, match="bounds the pixels of each frame"):
        processor.processor.apply_chat_template([user(list(clip(2).frames))], chat_template=template)
    assert not reason_for_no_clips(RimeProcessor.from_pretrained(str(family_base("qwen3_vl")), PROMPT))
