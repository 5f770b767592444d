"""The tiny base model: its tokenizer loses nothing, and it learns to copy and to caption, nothing else."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from rime_pl.errors import DataError
from rime_pl.miniature import pretraining
from rime_pl.miniature.pretraining import (
    ShownMedia,
    caption_batches,
    content_words,
    copy_batches,
    visual_tokens,
)
from rime_pl.miniature.tiny import (
    SPECIAL_TOKENS,
    TinyConfig,
    build_model,
    build_processor,
    train_tokenizer,
)
from rime_pl.processing import RimeProcessor
from rime_pl.types import Clip, Page

TEXTS = [
    "a woman cook with dark skin",
    "  two  spaces,\n\nnew lines\tand a tab ",
    "Ünïcödé, 中文, العربية, 🤷🏽‍♀️",
    "numbers 1234567890 and it's <b>marked</b> & escaped \\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips_but_for_case_and_space_around_lines(
    text: str, processor: RimeProcessor
) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    lines = [[line.strip() for line in one.strip().splitlines()] for one in (decoded, text.lower())]
    assert lines[0] == lines[1]


def test_a_word_is_the_same_token_wherever_it_stands() -> None:
    """Whoever types "Pizza" asks for what training called "a slice of pizza"."""
    tokenizer = train_tokenizer(["a slice of pizza"] * 50, vocab_size=400)
    (token,) = tokenizer("pizza")["input_ids"]
    for text in ("Find it.\npizza", "Pizza", "PIZZA", "<|im_start|>pizza"):
        assert tokenizer(text)["input_ids"][-1] == token, text


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


SAMPLES = [
    (Image.new("RGB", (48, 48), "red"), ["this shows a red square", "a square, red"]),
    (Image.new("RGB", (31, 77), "blue"), ["counted by colour: 1 blue", "this shows blue"]),  # odd sizes
] * 8


def rows(batch: tuple[dict[str, Tensor], Tensor]) -> list[tuple[list[int], list[int]]]:
    """The tokens of prompt and answer of each row, without padding."""
    inputs, labels = batch
    found = []
    for ids, mask, wanted in zip(inputs["input_ids"], inputs["attention_mask"].bool(), labels, strict=True):
        learned = wanted != -100
        assert ids[learned].equal(wanted[learned])
        found.append((ids[mask & ~learned].tolist(), ids[learned].tolist()))
    return found


def content(processor: RimeProcessor) -> list[int]:
    return [*content_words(processor.processor, SAMPLES)]


def batch_of(
    processor: RimeProcessor, samples: list[tuple[Image.Image, list[str]]], seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    size, words = max(max(image.size) for image, _ in samples), content(processor)
    model = build_model(processor.tokenizer, TinyConfig(), size)
    pictures = ShownMedia(processor.processor, [image for image, _ in samples])
    rng = random.Random(seed)
    return next(caption_batches(model, processor.processor, pictures, samples, words, len(samples), rng))


def test_there_is_a_loss_on_captions_and_none_on_prompts(
    processor: RimeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt holds a picture or one of its captions; the answer is a caption of the same picture."""
    monkeypatch.setattr(pretraining, "_RENAMED", 0.0)
    batch = batch_of(processor, SAMPLES, 0)
    tokenizer, with_picture = processor.tokenizer, 0
    for prompt, answer in rows(batch):
        words = tokenizer.decode(prompt).replace(" \n", "\n").replace("> ", ">")  # lines begin with a space
        assert words.startswith("<|im_start|>user\n") and words.endswith("<|im_start|>assistant\n")
        given = words.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0].strip()
        caption = tokenizer.decode(answer).removesuffix("<|im_end|>").strip()
        (captions,) = [captions for _, captions in SAMPLES[:2] if caption in captions]
        assert "<|image_pad|>" in given or given in captions
        with_picture += "<|image_pad|>" in given
    inputs = batch[0]
    assert 0 < with_picture < len(SAMPLES) and len(inputs["image_grid_thw"]) == with_picture
    assert inputs["mm_token_type_ids"].sum() == inputs["image_grid_thw"].prod(-1).sum() // 4


def test_each_picture_has_its_own_captions(processor: RimeProcessor) -> None:
    """Pictures of other sizes have other numbers of tokens: a picture in the wrong row would show."""
    batch = batch_of(processor, SAMPLES, 1)
    pads = {"red": 0, "blue": 0}
    for name, image in (("red", SAMPLES[0][0]), ("blue", SAMPLES[1][0])):
        grid = processor.processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
        pads[name] = int(grid.prod()) // 4
    assert pads["red"] != pads["blue"]
    for prompt, answer in rows(batch):
        if shown := prompt.count(processor.processor.image_token_id):
            assert shown == pads["red" if "red" in processor.tokenizer.decode(answer) else "blue"]


def test_what_the_tower_saw_is_kept_and_stands_for_the_picture(processor: RimeProcessor) -> None:
    """A picture that was seen before, with another one in between, gives what its pixels give."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, TinyConfig(), 84).eval()
    pictures = ShownMedia(processor.processor, [image for image, _ in SAMPLES[:2]])
    pictures.seen(model, [1])
    seen, pixels = pictures.seen(model, [0, 1, 0]), pictures.batch([0, 1, 0])
    pads = [[model.config.image_token_id] * len(one) for one in visual_tokens(model, pixels)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([50, *row, 51]) for row in pads], batch_first=True)
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
    with torch.no_grad():
        kept, new = (model.model(**inputs, **more).last_hidden_state for more in (seen, pixels))
    assert not kept[0].allclose(kept[1]) and kept.allclose(new, atol=1e-5)


def test_clips_and_pages_are_captioned_as_the_model_itself_reads_them(processor: RimeProcessor) -> None:
    """What was kept of a clip gives what its pixels give to the model of transformers."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer, TinyConfig(), 84).eval()
    frames = tuple(Image.new("RGB", (48, 48), (60 * n, 0, 0)) for n in range(4))
    media = [SAMPLES[0][0], Clip(frames, (0.0, 0.5, 1.0, 1.5)), Page(Image.new("L", (48, 72), 90))]
    shown, rows = ShownMedia(processor.processor, media), [1, 0, 2, 1]
    texts = [shown.slot(row) for row in rows]
    assert texts[0].count("seconds>") == 2 and texts[0].count("<|video_pad|>") == 8
    inputs = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids, images = inputs["input_ids"], processor.processor
    kinds = (ids == images.image_token_id).int() + 2 * (ids == images.video_token_id).int()
    inputs = {**inputs, "mm_token_type_ids": kinds}
    pictures, clips = shown.batch([0, 2]), shown.batch([1, 1])
    pixels = {
        **pictures,
        "pixel_values_videos": clips["pixel_values"],
        "video_grid_thw": clips["image_grid_thw"],
    }
    with torch.no_grad():
        kept, new = (
            model.model(**inputs, **more).last_hidden_state for more in (shown.seen(model, rows), pixels)
        )
    read = inputs["attention_mask"].bool()
    assert kept[read].allclose(new[read], atol=1e-5)
    assert clips["image_grid_thw"].tolist() == [[2, 4, 4]] * 2


def test_frames_of_a_clip_are_as_large_as_pictures(processor: RimeProcessor) -> None:
    """Qwen3-VL bounds the pixels of a whole clip: with the bound of a picture, frames would be tiny."""
    built = build_processor(processor.tokenizer, TinyConfig(), 72, num_frames=4)
    picture, clip = Image.new("RGB", (72, 72)), Clip((Image.new("RGB", (72, 72)),) * 4, (0.0, 1.0, 2.0, 3.0))
    grids = [ShownMedia(built, [one]).batch([0])["image_grid_thw"].tolist() for one in (picture, clip)]
    assert grids == [[[1, 6, 6]], [[2, 6, 6]]]


def test_a_batch_without_any_picture(processor: RimeProcessor) -> None:
    batches = [batch_of(processor, SAMPLES[:1], seed)[0] for seed in range(20)]
    without = [inputs for inputs in batches if "image_grid_thw" not in inputs]
    assert 0 < len(without) < len(batches)
    assert not any(inputs["mm_token_type_ids"].any() for inputs in without)


def test_two_captions_get_the_same_other_words(
    processor: RimeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "_RENAMED", 1.0)
    words, plain = set(content(processor)), processor.tokenizer(["a square, red"], add_special_tokens=False)
    changed = 0
    for prompt, answer in rows(batch_of(processor, SAMPLES[:1] * 64, 0)):
        if processor.processor.image_token_id in prompt:
            continue  # a picture keeps its words
        # what the answer shares with the prompt is found by copying
        shared = {word for word in answer if word in words and word in prompt}
        changed += not shared <= set(plain["input_ids"][0])
    assert changed > 5


def test_copying_asks_for_the_content_words_in_their_order(processor: RimeProcessor) -> None:
    words, seen = content(processor), Counter[int]()
    layout = ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"]
    start, stop = map(len, processor.tokenizer(layout, add_special_tokens=False)["input_ids"])
    batches = copy_batches(processor.processor, words, 8, random.Random(0))
    for batch in itertools.islice(batches, 30):
        assert not set(batch[0]) & {"mm_encoder_outputs", "image_grid_thw"}
        for prompt, answer in rows(batch):
            *copied, end = answer
            assert processor.tokenizer.decode([end]) == "<|im_end|>"
            assert [word for word in prompt[start:-stop] if word in words] == copied
            seen[len(copied)] += 1
    assert set(seen) == {1, 2, 3, 4}


def test_content_words_are_those_that_tell_pictures_apart(processor: RimeProcessor) -> None:
    words = content_words(processor.processor, SAMPLES)
    named = {processor.tokenizer.decode([word]).strip(): count for word, count in words.items()}
    assert "this" not in named  # in the captions of all pictures
    assert max(words.values()) <= len(SAMPLES) / 2


def test_captions_that_are_all_alike_are_refused(processor: RimeProcessor) -> None:
    with pytest.raises(DataError, match=r"no word .* tells"):
        content_words(processor.processor, [(SAMPLES[0][0], ["a square"])] * 4)
