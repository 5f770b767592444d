"""Make the tiny base model, a real Qwen3-VL of 2 to 4 million parameters, in place of a downloaded one.

Called by `rime base`. It trains a tokenizer, and then the model on captions of pictures only. The model sees
no mode token, no task of the stages and no rewrite. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    get_cosine_schedule_with_warmup,
)

from rime_pl.backbone.vision_attention import attend_pictures_together
from rime_pl.prompts import IMAGE_SLOT, IMAGE_TOKEN

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
#: How Qwen splits a text into words, numbers and punctuation.
WORDS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@dataclass
class TinyConfig:
    """Size of the tiny base model and length of its pre-training.

    Args:
        hidden_size, num_layers, num_heads, num_key_value_heads, head_dim, intermediate_size: Decoder.
        vision_hidden_size, vision_layers, vision_heads, vision_intermediate_size: Vision tower.
        patch_size: Pixels of each side of a patch; 2 x 2 patches make one visual token.
        vocab_size: Maximum size of the vocabulary.
        vision_steps, vision_batch_size: Training of the vision tower, on the words of the captions.
        num_steps, batch_size: Training of the whole model, on captions.
        learning_rate: Peak learning rate of both.
    """

    hidden_size: int = 160
    num_layers: int = 4
    num_heads: int = 5
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
    num_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 2e-3


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``, with the special tokens of Qwen."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, image_size: int
) -> Qwen3VLProcessor:
    """Return the ordinary Qwen3-VL processor with a small patch."""
    pixels = {"shortest_edge": (2 * config.patch_size) ** 2, "longest_edge": image_size**2}
    settings: dict[str, Any] = {
        "patch_size": config.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": pixels,
    }
    images = Qwen2VLImageProcessor(**settings, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    videos = Qwen3VLVideoProcessor(**settings, image_mean=[0.5] * 3, image_std=[0.5] * 3)
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


def pretrain_vision(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    samples: Sequence[tuple[Image, list[str]]],
    config: TinyConfig,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train only the vision tower to tell which words the captions of a picture hold.

    Real towers come pre-trained, too. Without this step, a few minutes of captioning teach colours, but no
    shapes. The score of a word is a log-sum-exp over the visual tokens of the picture, so one token that
    shows it is enough. A softmax over all words learns hundreds of rare ones; a word counts the more, the
    fewer pictures have it. The linear head is not kept.

    Source: caption words as classes, with inverse document frequency, arXiv 2411.03313.
    """
    rng = random.Random(f"vision {seed}")
    held = [set(processor.tokenizer("\n".join(captions))["input_ids"]) for _, captions in samples]
    counts = Counter(word for words in held for word in words)
    classes = sorted(word for word, count in counts.items() if count / len(samples) <= 0.5)
    vocabulary = {word: place for place, word in enumerate(classes)}
    rarity = torch.tensor([len(samples) / counts[word] for word in classes]).log()
    wanted = torch.zeros(len(samples), len(vocabulary))
    for row, known in enumerate(held):
        wanted[row, [vocabulary[word] for word in known if word in vocabulary]] = 1
    wanted = torch.nn.functional.normalize(wanted * rarity, p=1, dim=1)
    words = model.get_input_embeddings().weight  # tied to the output: a visual token comes to mean words
    rows_of = torch.tensor(classes)
    bias = torch.nn.Parameter(torch.zeros(len(classes)))
    parameters = [*model.model.visual.parameters(), words, bias]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, config.vision_steps // 10, config.vision_steps)
    prepared = [processor.image_processor(images=[image], return_tensors="pt") for image, _ in samples]
    for step in range(config.vision_steps):
        rows = [rng.randrange(len(samples)) for _ in range(config.vision_batch_size)]
        features = {name: torch.cat([prepared[row][name] for row in rows]) for name in prepared[0]}
        tokens = model.model.get_image_features(**features, return_dict=True).pooler_output
        table = words[rows_of]
        scores = torch.stack([(shown @ table.T + bias).logsumexp(0) for shown in tokens])
        loss = torch.nn.functional.cross_entropy(scores, wanted[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))


def pretrain(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    samples: Sequence[tuple[Image, list[str]]],
    config: TinyConfig,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the whole model to predict captions, from the picture or from another caption of the picture.

    Args:
        model, processor: The tiny base model.
        samples: Pictures with their captions.
        config: Length of the training.
        seed: Seed of the order.
        on_step: Called with the number and the loss of each step, for the progress bar.
    """
    rng = random.Random(f"base {seed}")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, config.num_steps // 20, config.num_steps)
    model.train()
    for step in range(config.num_steps):
        chosen = [samples[rng.randrange(len(samples))] for _ in range(config.batch_size)]
        inputs, labels = caption_batch(processor, chosen, rng)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step, float(loss.detach()))
    model.eval()


def caption_batch(
    processor: Qwen3VLProcessor, samples: Sequence[tuple[Image, list[str]]], rng: random.Random
) -> tuple[dict[str, Tensor], Tensor]:
    """Return model inputs and labels (-100 where there is no loss) for pictures with captions."""
    tokenizer = processor.tokenizer
    asked: list[Image | str] = []
    answers = []
    for image, captions in samples:
        other, answer = rng.choice(captions), rng.choice(captions)
        # sometimes another caption replaces the picture, so that the model also learns to read
        asked.append(image if rng.random() > 0.35 else other)
        answers.append(f"{answer}<|im_end|>")
    features: dict[str, Tensor] = {}
    if images := [given for given in asked if isinstance(given, Image)]:
        features = dict(processor.image_processor(images=images, return_tensors="pt"))
        tokens = iter(features["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2)
    rows = []
    for given in asked:
        words = given if isinstance(given, str) else IMAGE_SLOT.format(pads=IMAGE_TOKEN * int(next(tokens)))
        rows.append(f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n")
    prompts = tokenizer(rows, add_special_tokens=False)["input_ids"]
    completions = tokenizer(answers, add_special_tokens=False)["input_ids"]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == processor.image_token_id).int(),
        **features,
    }
    return inputs, labels


def make_base(
    output: Path,
    samples: Sequence[tuple[Image, list[str]]],
    texts: Iterable[str],
    config: TinyConfig,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train tokenizer and model, and write an ordinary Hugging Face folder.

    Args:
        output: Folder to write.
        samples: Training pictures with their captions.
        texts: Texts for the vocabulary of the tokenizer.
        config: Size of the model and length of its training.
        seed: Seed of the weights and of the order.
        on_step: Called with the number and the loss of each step, for the progress bar.
    """
    torch.manual_seed(seed)
    image_size = max(max(image.size) for image, _ in samples)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    processor = build_processor(tokenizer, config, image_size)
    model = build_model(tokenizer, config, image_size)
    attend_pictures_together(model)
    pretrain_vision(model, processor, samples, config, seed, on_step)
    pretrain(model, processor, samples, config, seed, lambda n, loss: on_step(config.vision_steps + n, loss))
    model.save_pretrained(output)
    processor.save_pretrained(output)
