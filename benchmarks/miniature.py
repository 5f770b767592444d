"""The small model with random weights and the batches that the benchmarks use.

The proportions are those of Qwen2-VL-2B: vocabulary / (layers x MLP width) = 0.6, MLP width / hidden width =
5.8, and a vision tower that takes as long per visual token as the decoder, or a little longer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.miniature.tiny import TinyConfig, build_model, build_processor, train_tokenizer
from rime_pl.modules.base import RimeModule
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Item, Pair

Stage = TypeVar("Stage", bound=RimeModule)
#: 0.6 = 1843 / (4 x 768); Qwen2-VL-2B: 151936 / (28 x 8960).
PROPORTIONED = TinyConfig(
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=768,
    vision_hidden_size=128,
    vision_layers=3,
    vision_heads=2,
    vision_intermediate_size=512,
)
VOCABULARY = 1843
IMAGE_SIZE = 64  # 4 visual tokens
#: 64 visual tokens with about 30 of text and rewrite, similar to 256 with 64 and 100 in a 2B model.
PICTURE_SIZE = 192
PROMPT = PromptConfig(rewrite_instruction="Rewrite.", max_rewrite_tokens=400)
_RNG = random.Random(0)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "".join(_RNG.choice(_LETTERS) for _ in range(_RNG.randint(3, 7))) for _ in range(200)
]  # one token each


def make_base(
    folder: Path, config: TinyConfig, vocabulary: int, image_size: int = IMAGE_SIZE, seed: int = 0
) -> Path:
    """Write a checkpoint folder with random weights and exactly ``vocabulary`` embedding rows."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 900)
    model = build_model(tokenizer, config, image_size)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    build_processor(tokenizer, config, image_size).save_pretrained(folder)
    return folder


def make_backbone(
    base: Path, load_in_4bit: bool, gradient_checkpointing: bool = False, lora_dropout: float = 0.05
) -> Backbone:
    """Return the backbone in float32, with LoRA of rank 16."""
    config = BackboneConfig(
        str(base),
        load_in_4bit=load_in_4bit,
        dtype="float32",
        lora_dropout=lora_dropout,
        gradient_checkpointing=gradient_checkpointing,
        prompt=PROMPT,
    )
    torch.manual_seed(0)
    return Backbone(config, RimeProcessor.from_pretrained(str(base), PROMPT))


def silent(module: Stage, backbone: Backbone) -> Stage:
    """Return the stage ready to run without a trainer: it has a backbone and logs nothing."""
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[assignment]
    return module


def mixed_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Return pairs of a picture and a text in turn, with texts of 5 to 80 words, rewrites of 6 to 40."""
    rng = random.Random(seed)

    def item(name: str, pictured: bool) -> Item:
        return _picture(name, rng, IMAGE_SIZE) if pictured else _text(name, rng, 80)

    return [
        Pair(f"pair-{n}", "mixed", "all", item(f"query {n}", n % 2 == 0), item(f"target {n}", n % 2 == 1))
        for n in range(count)
    ]


def picture_pairs(count: int, seed: int = 0, side: int = PICTURE_SIZE) -> list[Pair]:
    """Return pairs in which a text of 5 to 12 words finds a picture, with rewrites of 6 to 40 words."""
    rng = random.Random(seed)
    return [
        Pair(
            *(f"pair-{n}", "pictures", "all"),
            *(_text(f"query {n}", rng, 12), _picture(f"target {n}", rng, side)),
        )
        for n in range(count)
    ]


def _words(rng: random.Random, low: int, high: int) -> str:
    length = low + int((high - low) * rng.random() ** 3)
    return " ".join(rng.choice(WORDS) for _ in range(length))


def _text(name: str, rng: random.Random, most: int) -> Item:
    return Item(_words(rng, 5, most), (), name, "Find it.", rewrite=_words(rng, 6, 40))


def _picture(name: str, rng: random.Random, side: int) -> Item:
    image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
    return Item(_words(rng, 2, 12), (image,), name, "Find it.", rewrite=_words(rng, 6, 40))
