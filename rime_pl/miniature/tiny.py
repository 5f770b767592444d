"""Make the tiny base model, a real Qwen3-VL of 2 to 4 million parameters, in place of a downloaded one.

Called by `rime base`. It trains a tokenizer, then the vision tower on the words of captions, then the decoder
on copying words, then the decoder on captions. The model sees no mode token, no task of the stages and no
rewrite. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rime_pl.backbone.patch_embedding import multiply_patches
from rime_pl.backbone.vision_attention import attend_pictures_together
from rime_pl.miniature.pretraining import (
    ShownMedia,
    caption_batches,
    copy_batches,
    names,
    pretrain,
    pretrain_vision,
)
from rime_pl.types import Medium, frames_of

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

#: Rows of the embedding table behind those of the tokens: one for each mode token.
SPARE_ROWS = 2
#: Frames of a clip that are never made smaller than pictures.
SMALL_CLIP = 8


@dataclass
class TinyConfig:
    """Size of the tiny base model and length of its pre-training.

    Args:
        hidden_size, num_layers, num_heads, num_key_value_heads, head_dim, intermediate_size: Decoder.
        vision_hidden_size, vision_layers, vision_heads, vision_intermediate_size: Vision tower.
        patch_size: Pixels of each side of a patch; 2 x 2 patches make one visual token.
        vocab_size: Maximum size of the vocabulary.
        vision_steps, vision_batch_size: Training of the vision tower, on the words of the captions.
        copy_steps: Training of the decoder, on copying words.
        num_steps: Training of the decoder, on captions.
        batch_size: Rows of a step of the decoder.
        learning_rate: Peak learning rate of all three.
    """

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_key_value_heads: int = 1
    head_dim: int = 32
    intermediate_size: int = 448
    vision_hidden_size: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_intermediate_size: int = 384
    patch_size: int = 12
    vocab_size: int = 4000
    vision_steps: int = 500
    vision_batch_size: int = 64
    copy_steps: int = 800
    num_steps: int = 700
    batch_size: int = 32
    learning_rate: float = 2e-3


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``, with the special tokens of Qwen."""
    bpe = Tokenizer(models.BPE())
    # A word is the same token wherever it stands: each line begins with a space, and case does not count. A
    # large model has seen so many texts that it knows "Pizza" and " pizza" as one word. The few texts here
    # would not teach that.
    bpe.normalizer = normalizers.Lowercase()
    lines = pre_tokenizers.Split(pattern=Regex(r"[\r\n]+"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # the words of the chat layout, so often that each becomes one token as in the vocabulary of Qwen
    bpe.train_from_iterator(itertools.chain(texts, ["user\n assistant\n system\n"] * 1000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, image_size: int, num_frames: int = SMALL_CLIP
) -> Qwen3VLProcessor:
    """Return the ordinary Qwen3-VL processor with a small patch.

    Args:
        tokenizer: Its tokenizer.
        config: Size of a patch.
        image_size: Pixels of each side of the largest picture or frame.
        num_frames: Frames of the longest clip that keeps this size: Qwen3-VL bounds the pixels of all frames.
    """
    smallest, largest = (2 * config.patch_size) ** 2, image_size**2
    settings: dict[str, Any] = {
        **{"patch_size": config.patch_size, "merge_size": 2, "temporal_patch_size": 2},
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    images = Qwen2VLImageProcessor(**settings, size={"shortest_edge": smallest, "longest_edge": largest})
    of_clip = {"shortest_edge": smallest, "longest_edge": largest * num_frames}
    videos = Qwen3VLVideoProcessor(**settings, size=of_clip)
    return Qwen3VLProcessor(images, tokenizer, videos)


def build_model(
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, image_size: int
) -> Qwen3VLForConditionalGeneration:
    """Return a Qwen3-VL with random weights."""
    known = tokenizer.get_vocab()
    ids = {name: known[f"<|{name}|>"] for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    side = image_size // config.patch_size
    rotary = config.head_dim // 2
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "head_dim": config.head_dim,
                "max_position_embeddings": 2048,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3],
                    "mrope_interleaved": True,
                },
                "pad_token_id": tokenizer.pad_token_id,
                "tie_word_embeddings": True,
                "initializer_range": config.hidden_size**-0.5,
            },
            vision_config={
                "depth": config.vision_layers,
                "hidden_size": config.vision_hidden_size,
                "intermediate_size": config.vision_intermediate_size,
                "num_heads": config.vision_heads,
                "patch_size": config.patch_size,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": config.hidden_size,
                "num_position_embeddings": side**2,
                "deepstack_visual_indexes": [0],
                # 0.02 suits widths of thousands; at this width the first layers would give too small outputs
                "initializer_range": config.vision_hidden_size**-0.5,
            },
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
            tie_word_embeddings=True,
        )
    )


def make_base(
    output: Path,
    samples: Sequence[tuple[Medium, list[str]]],
    texts: Iterable[str],
    config: TinyConfig,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train tokenizer and model, and write an ordinary Hugging Face folder.

    Args:
        output: Folder to write.
        samples: Pictures, clips and pages of training, with their captions.
        texts: Texts for the vocabulary of the tokenizer.
        config: Size of the model and length of its training.
        seed: Seed of the weights and of the order.
        on_step: Called with the number and the loss of each step, for the progress bar.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"base {seed}")
    image_size = max(max(frames_of(medium)[0].size) for medium, _ in samples)
    num_frames = max(SMALL_CLIP, *(len(frames_of(medium)) for medium, _ in samples))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    processor = build_processor(tokenizer, config, image_size, num_frames)
    model = build_model(tokenizer, config, image_size)
    attend_pictures_together(model)
    multiply_patches(model)
    rate, vision_rng = config.learning_rate, random.Random(f"vision {seed}")
    shown = ShownMedia(processor, (medium for medium, _ in samples))
    steps, size = config.vision_steps, config.vision_batch_size
    pretrain_vision(model, processor, shown, samples, steps, size, rate, vision_rng, on_step)
    words, done = names(processor, samples), config.vision_steps
    copies = copy_batches(processor, words, config.batch_size, rng)
    captions = caption_batches(model, processor, shown, samples, words, config.batch_size, rng)
    for batches, steps in ((copies, config.copy_steps), (captions, config.num_steps)):
        pretrain(model, batches, steps, rate, partial(_count_on, on_step, done))
        done += steps
    # as large checkpoints have them: else PEFT alone finds no rows for the mode tokens of an adapter
    model.resize_token_embeddings(len(tokenizer) + SPARE_ROWS, mean_resizing=False)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def _count_on(on_step: Callable[[int, float], None], done: int, step: int, loss: float) -> None:
    on_step(done + step, loss)
