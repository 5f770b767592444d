"""The small models with random weights and the batches that the benchmarks use.

`PROPORTIONED` is a Qwen2-VL, like the model of configs/*.yaml, so a benchmark shows what its vision tower
costs. A shallow model cannot have all ratios of a deep one; these are kept:

| ratio | Qwen2-VL-2B | here |
|---|---|---|
| MLP width / hidden width | 5.8 | 5.9 |
| vocabulary / (layers x hidden width): the head next to the decoder | 3.5 | 3.5 |
| width of the tower / hidden width | 0.83 | 0.88 |
| products of the tower / of the decoder, for a visual token | 1.9 | 1.8 |
| rank of LoRA / hidden width | 1 / 96 | 1 / 64 |

The vocabulary is only 14 times the hidden width (99 times in the 2B model), so logits at all positions take
less memory here, next to the activations of one layer, than they would take there.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.miniature.random_checkpoint import PATCH, Shape, save_checkpoint
from rime_pl.miniature.tiny import TinyConfig, build_model, build_processor, train_tokenizer
from rime_pl.modules.base import RimeModule
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Item, Pair

Stage = TypeVar("Stage", bound=RimeModule)
PROPORTIONED = Shape(128, 4, 4, 1, 752, (4, 6, 6), 1809, 4, 112, 4, image_size=224, num_words=40)
RANK = 2
VOCABULARY = 1843  # of the other models
IMAGE_SIZE = 64  # of the other models: 4 visual tokens
#: 64 visual tokens with about 30 of text and rewrite, similar to 256 with 64 and 100 in a 2B model.
PICTURE_SIZE = PROPORTIONED.image_size
#: Visual tokens of the pictures among texts: a quarter of the 100 to 1,300 of small and large photos.
MIXED_TOKENS = (25, 325)
PROMPT = PromptConfig(rewrite_instruction="Rewrite.", max_rewrite_tokens=400)
_RNG = random.Random(0)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "".join(_RNG.choice(_LETTERS) for _ in range(_RNG.randint(3, 7))) for _ in range(200)
]  # one token each


def make_proportioned(folder: Path) -> Path:
    """Write the checkpoint folder of a Qwen2-VL in the proportions of the 2B model."""
    large = replace(PROPORTIONED, image_size=round(MIXED_TOKENS[1] ** 0.5 * 2 * PATCH))  # no picture shrinks
    save_checkpoint(folder, large, torch.device("cpu"), [" ".join(WORDS)] * 3, num_tokens=900)
    return folder


def make_base(
    folder: Path, config: TinyConfig, vocabulary: int, image_size: int = IMAGE_SIZE, seed: int = 0
) -> Path:
    """Write the folder of an untrained tiny base model with exactly ``vocabulary`` embedding rows."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 900)
    model = build_model(tokenizer, config, image_size)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    build_processor(tokenizer, config, image_size).save_pretrained(folder)
    return folder


def make_backbone(
    base: Path,
    load_in_4bit: bool,
    gradient_checkpointing: bool = False,
    lora_dropout: float = 0.05,
    lora_r: int = 16,
) -> Backbone:
    """Return the backbone in float32."""
    config = BackboneConfig(
        str(base),
        lora_r=lora_r,
        lora_alpha=2 * lora_r,
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
    """Return pairs of a picture and a text in turn, both of many sizes.

    Texts have 5 to 80 words, rewrites 6 to 40. Pictures are wide or tall, as often small as large.
    """
    rng = random.Random(seed)

    def item(name: str, pictured: bool) -> Item:
        if not pictured:
            return _text(name, rng, 80)
        low, high = MIXED_TOKENS
        area = low * (high / low) ** rng.random() * (2 * PATCH) ** 2  # pixels
        width = (area * rng.uniform(0.6, 1.6)) ** 0.5
        return _picture(name, rng, round(width), round(area / width))

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
            *(_text(f"query {n}", rng, 12), _picture(f"target {n}", rng, side, side)),
        )
        for n in range(count)
    ]


def _words(rng: random.Random, low: int, high: int) -> str:
    length = low + int((high - low) * rng.random() ** 3)
    return " ".join(rng.choice(WORDS) for _ in range(length))


def _text(name: str, rng: random.Random, most: int) -> Item:
    return Item(_words(rng, 5, most), (), name, "Find it.", rewrite=_words(rng, 6, 40))


def _picture(name: str, rng: random.Random, width: int, height: int) -> Item:
    image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    return Item(_words(rng, 2, 12), (image,), name, "Find it.", rewrite=_words(rng, 6, 40))
