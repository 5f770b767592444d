"""Make a checkpoint with random weights in the shape of a real one, and pairs to train it on, offline.

Used by tests/gpu, `rime plan`, and by benchmarks and tests that need a Qwen2-VL of a given size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rime_pl.miniature.tiny import TinyConfig, build_processor, train_tokenizer
from rime_pl.types import Item, Pair

WORDS = ("a", "red", "blue", "small", "large", "old", "cat", "dog", "boat", "tree", "house", "left", "right")
PATCH = 14


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen2-VL and of its input."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    mrope_section: tuple[int, int, int]
    vocab_size: int
    vision_depth: int
    vision_embed_dim: int
    vision_heads: int
    image_size: int  # pixels of each side
    num_words: int  # words of a rewrite


SHAPES = {
    # Qwen2-VL-2B-Instruct
    "2b": Shape(1536, 28, 12, 2, 8960, (16, 24, 24), 151936, 32, 1280, 16, image_size=448, num_words=60),
    # runs the same code within a second, for tests
    "micro": Shape(64, 2, 4, 2, 128, (2, 3, 3), 512, 2, 64, 2, image_size=56, num_words=8),
}


def save_checkpoint(
    folder: Path,
    shape: Shape,
    device: torch.device,
    texts: Sequence[str] | None = None,
    num_tokens: int = 400,
) -> None:
    """Write a Qwen2-VL folder: processor, tokenizer and random bfloat16 weights.

    Args:
        folder: Where it goes.
        shape: Dimensions of the model.
        device: Where the random numbers are made.
        texts: What the tokenizer is trained on (default: synthetic pairs).
        num_tokens: Maximum size of the tokenizer; more rows of the embedding table are spare.
    """
    if texts is None:
        texts = [text for pair in synthetic_pairs(64, shape) for text in _texts(pair)]
    tokenizer = train_tokenizer(texts, num_tokens)
    images = build_processor(tokenizer, TinyConfig(patch_size=PATCH), shape.image_size).image_processor
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    Qwen2VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    torch.manual_seed(0)
    with device:  # a GPU makes 2 billion random numbers at once
        model = Qwen2VLForConditionalGeneration(model_config(shape, tokenizer)).bfloat16()
    model.save_pretrained(folder)


def model_config(shape: Shape, tokenizer: PreTrainedTokenizerFast | None = None) -> Qwen2VLConfig:
    """Return the config of a Qwen2-VL of these dimensions; without a tokenizer with Qwen2-VL's own ids."""
    text: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": list(shape.mrope_section),
        },
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": shape.vision_depth,
        "embed_dim": shape.vision_embed_dim,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.vision_heads,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        known = tokenizer.get_vocab()
        text |= {"bos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
        text |= {"eos_token_id": tokenizer.eos_token_id}
        names = {
            "image_pad": "image",
            "video_pad": "video",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }
        ids = {f"{name}_token_id": known[f"<|{token}|>"] for token, name in names.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def synthetic_pairs(count: int, shape: Shape, visual_tokens: tuple[int, int] | None = None) -> list[Pair]:
    """Return pairs of random words and noise, as long as real ones: picture and text, and a picture.

    Args:
        count: Number of pairs.
        shape: Size of the pictures and number of words of a rewrite.
        visual_tokens: Fewest and most visual tokens of an item: it has 1 to 4 pictures of many sizes, and a
            rewrite of half to all of the words (default: one square picture, all words).
    """
    rng = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(num_words))

    def noise(width: int, height: int) -> Image.Image:
        return Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))

    def item(name: str, words: str) -> Item:
        images, num_words = [noise(shape.image_size, shape.image_size)], shape.num_words
        if visual_tokens is not None:
            low, high = visual_tokens
            number, num_words = rng.randint(1, 4), rng.randint(num_words // 2, num_words)
            area = low * (high / low) ** rng.random() * (2 * PATCH) ** 2 / number  # pixels of a picture
            widths = [(area * rng.uniform(0.6, 1.6)) ** 0.5 for _ in range(number)]
            images = [noise(round(width), round(area / width)) for width in widths]
        return Item(words, tuple(images), name, "Find the picture.", rewrite=text(num_words))

    return [
        Pair(f"pair-{n}", "synthetic", "pictures", item(f"query {n}", text(12)), item(f"target {n}", ""))
        for n in range(count)
    ]


def _texts(pair: Pair) -> list[str]:
    return [f"{item.instruction} {item.text}\n{item.rewrite}" for item in (pair.query, pair.target) if item]
