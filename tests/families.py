"""A micro base model of each family of Qwen-VL (one tokenizer, random weights, float32), and media for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rime_pl.backbone.mllm import Backbone
from rime_pl.miniature.random_checkpoint import PATCH, SHAPES, WORDS, model_config
from rime_pl.miniature.tiny import build_model, build_processor, train_tokenizer
from rime_pl.types import Clip, Item, Medium, Page, Pair
from tests.micro import MICRO

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FPS = 2.0
_SIZE = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2}


def save_family(family: str, folder: Path) -> Path:
    """Write the folder of a base model; its tower takes pictures of up to 16 visual tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([" ".join(WORDS), "<0.5 seconds> 0123456789."] * 20, 400)
    if family == "qwen3_vl":
        model = build_model(tokenizer, MICRO, image_size=48)
        build_processor(tokenizer, MICRO, 48).save_pretrained(folder)
        model.save_pretrained(folder)
        return folder
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": PATCH, "size": _SIZE}
    images, videos = Qwen2VLImageProcessor(**mean), Qwen2VLVideoProcessor(**mean)
    config = model_config(SHAPES["micro"], tokenizer)
    config.text_config.vocab_size = len(tokenizer)
    if family == "qwen2_vl":
        Qwen2VLProcessor(images, tokenizer, videos).save_pretrained(folder)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
        return folder
    Qwen2_5_VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": config.text_config.hidden_size,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,  # as the published checkpoints say
    }
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    later = Qwen2_5_VLConfig(
        text_config=config.text_config.to_dict() | {"model_type": "qwen2_5_vl_text"},
        vision_config=vision,
        tie_word_embeddings=True,
        **ids,
    )
    Qwen2_5_VLForConditionalGeneration(later).save_pretrained(folder)
    return folder


def noise(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def clip(frames: int, width: int = 56, height: int = 56, seed: int = 0) -> Clip:
    pictures = tuple(noise(seed * 100 + number, width, height) for number in range(frames))
    return Clip(pictures, tuple(number / FPS for number in range(frames)))


def apart_pairs() -> list[Pair]:
    """6 pairs: the first half has only text, the second has pictures, pages and clips beside texts."""
    seen = [
        ((), ()),
        ((), ()),
        ((), ()),
        ((noise(1, 84, 40), clip(3, 28, 56, seed=1)), ()),
        ((), (clip(4, 56, 28, seed=2), Page(noise(3, 28, 84)))),
        ((clip(2, 28, 28, seed=3),), (noise(4),)),
    ]

    def item(number: int, side: int, media: tuple[Medium, ...]) -> Item:
        first, second = WORDS[(2 * number + side) % 13], WORDS[(5 * number + 7 * side + 3) % 13]
        # one target has no rewrite, so that the ranks hold different numbers of labels
        rewrite = None if (number, side) == (4, 1) else f"a {second} {first}"
        return Item(f"{first} {second}", media, f"{number} {side}", "", rewrite)

    return [
        Pair(f"t/{number}", "one", "all", item(number, 0, query), item(number, 1, target))
        for number, (query, target) in enumerate(seen)
    ]


@contextmanager
def tower_calls(backbone: Backbone) -> Iterator[list[int]]:
    """Collect the patches of each call of the tower, repeats of the backward pass not counted."""
    seen: list[int] = []
    visual = backbone.language_model.model.visual
    handle = visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()
