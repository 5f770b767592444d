"""A base model, a corpus and a backbone so small that a test suite can build them; see conftest.py.

Also imported by the processes that tests/distributed starts, which see no fixtures.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.miniature.tiny import TinyConfig, make_base
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import (
    AdvantageSettings,
    OptimizerSettings,
    PolicySettings,
    RewardSettings,
    RolloutSettings,
)
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch, Completions, Pair, Prompts

#: Every width is a multiple of 64, the block of NF4.
MICRO = TinyConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    vision_hidden_size=64,
    vision_layers=1,
    vision_heads=2,
    vision_intermediate_size=128,
    vocab_size=600,
    vision_steps=2,
    vision_batch_size=4,
    copy_steps=2,
    num_steps=2,
    batch_size=4,
)
PROMPT = PromptConfig(rewrite_instruction="Rewrite.", max_rewrite_tokens=32)


#: What the pictures of the micro corpus look like, by turns: width, height, and how the file holds them.
RAGGED = ((48, 48, "RGB"), (64, 40, "L"), (40, 56, "turned"), (33, 71, "RGBA"), (80, 32, "RGB"))


def build_corpus(folder: Path) -> Path:
    """Scenes of 32 to 80 pixels in several modes: 8 training pairs of each task, some with two pictures."""
    plain = folder.with_name(f"{folder.name}-plain")
    scenes.build(
        plain,
        size=48,
        train_per_task=8,
        val_per_task=2,
        test_per_task=3,
        captions=6,
        val_contents=12,
        test_contents=16,
    )
    splits = {split: read_pairs(plain, split) for split in read_corpus(plain)["splits"]}
    write_corpus(
        folder,
        "scenes",
        "Apache-2.0",
        {split: [ragged(pair, n) for n, pair in enumerate(pairs)] for split, pairs in splits.items()},
        {split: len(pairs) for split, pairs in splits.items()},
        seed=0,
    )
    return folder


def ragged(pair: Pair, number: int) -> Pair:
    """The pair with pictures as RAGGED says; every third query with a picture shows it twice."""
    query, target = pair.query, pair.target
    if query is not None:
        shown = query.media * (2 if number % 3 == 2 else 1)
        query = replace(
            query, media=tuple(as_photographed(image, number + n) for n, image in enumerate(shown))
        )
    images = tuple(as_photographed(image, number + 2) for image in target.media)
    return replace(pair, key=pair.key.partition("/")[2], query=query, target=replace(target, media=images))


def as_photographed(image: Image.Image, number: int) -> Image.Image:
    """The picture in another size and mode; "turned" is an undecoded JPEG that is to be turned when shown."""
    width, height, mode = RAGGED[number % len(RAGGED)]
    image = image.resize((width, height))
    if mode != "turned":
        return image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.rotate(90, expand=True).save(buffer, "JPEG", exif=exif)
    return Image.open(buffer)


def read_pairs(corpus: Path, split: str) -> list[Pair]:
    """All samples of a split, decoded."""
    reader = ShardReader(read_split(corpus, split))
    return [reader.read(number) for number in range(len(reader))]


def mixed(pairs: list[Pair], count: int) -> list[Pair]:
    """``count`` pairs, by turns with a text alone as the query and with a picture, whatever the tasks are."""
    texts = [pair for pair in pairs if pair.query and not pair.query.media]
    pictures = [pair for pair in pairs if pair.query and pair.query.media]
    return [pair for both in zip(texts, pictures, strict=False) for pair in both][:count]


def words(pairs: list[Pair]) -> list[str]:
    """What the tokenizer is trained on."""
    items = [item for pair in pairs for item in (pair.query, pair.target) if item]
    return [f"{item.instruction} {item.text}\n{item.rewrite or ''}" for item in items]


def build_base(folder: Path, corpus: Path, seed: int = 0) -> Path:
    """An ordinary Hugging Face folder of a Qwen3-VL with 0.4 million parameters."""
    captions = read_pairs(corpus, "captions")
    samples = [(pair.query.media[0], pair.target.text.split("\n")) for pair in captions if pair.query]
    texts = words([*captions, *read_pairs(corpus, "train")])
    make_base(folder, samples, texts, MICRO, seed, lambda step, loss: None)
    return folder


def micro_config(base: Path, **changes: Any) -> BackboneConfig:
    """4-bit base weights, everything else float32."""
    settings = {"dtype": "float32", "lora_r": 4, "lora_alpha": 8, "prompt": PROMPT, **changes}
    return BackboneConfig(str(base), **settings)


def build_backbone(config: BackboneConfig) -> Backbone:
    """LoRA's random start is the same each time."""
    torch.manual_seed(0)
    return Backbone(config, RimeProcessor.from_pretrained(config.name_or_path, config.prompt))


def plain_logits(backbone: Backbone, prompts: Prompts, completions: Completions) -> Tensor:
    """All logits (R, C, V) for the tokens of one completion of each prompt, by the Hugging Face model."""
    ids = torch.cat([prompts.input_ids, completions.ids], dim=1)
    mask = torch.cat([prompts.attention_mask, completions.mask], dim=1)
    media = backbone.media_inputs(prompts) | backbone.layout(prompts, ids)
    logits = backbone.language_model(input_ids=ids, attention_mask=mask, **media).logits
    return logits[:, prompts.input_ids.shape[1] - 1 : -1]  # a token is predicted one position earlier


def randomise_adapter(model: PeftModel, seed: int = 1, scale: float = 0.1) -> None:
    """LoRA starts with B = 0, where it does nothing and A has no gradient: move every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


class RewardPairs:
    """What Refine-RL asks of the data module, from a list of pairs of one task."""

    seed = 0

    def __init__(self, processor: RimeProcessor, pairs: list[Pair]) -> None:
        self.processor, self.pairs = processor, pairs

    def anchor_batches(self, num_anchors: int) -> list[Batch]:
        return [self.processor.training_batch(self.pairs[:5]), self.processor.training_batch(self.pairs[5:])]

    def sample_batches(self, num_samples: int) -> list[Batch]:
        return [self.processor.training_batch(self.pairs[2:5])]

    @staticmethod
    def sample_keys(before: list[Any]) -> list[str]:
        return [key for batch, *_ in before for key in batch.keys]


def rl_settings(**groups: dict[str, Any]) -> dict[str, Any]:
    """Return small settings of Refine-RL, changed by what is given for each group."""
    rollouts = {"num_generations": 4, "max_new_tokens": 8, **groups.get("rollouts", {})}
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 5, **groups.get("optimizer", {})}
    return {
        "rollouts": RolloutSettings(**rollouts),
        "reward": RewardSettings(**groups.get("reward", {})),
        "advantages": AdvantageSettings(**groups.get("advantages", {})),
        "policy": PolicySettings(**groups.get("policy", {})),
        "optimizer": OptimizerSettings(**optimizer),
    }


def refine_rl_module(backbone: Backbone, **groups: dict[str, Any]) -> RefineRLModule:
    """Refine-RL without a trainer, on a model that ends a rewrite now and then; AdamW steps are real."""
    bias = torch.zeros(backbone.language_model.get_output_embeddings().weight.shape[0])
    bias[[backbone.processor.gen_id, backbone.processor.turn_end_id]] = torch.tensor([5.0, 3.0])
    backbone.language_model.lm_head.token_adapter.base_layer.bias = torch.nn.Parameter(
        bias, requires_grad=False
    )
    randomise_adapter(backbone.peft, scale=0.05)
    module: Any = RefineRLModule(backbone.config, **rl_settings(**groups))
    module.backbone, module.reference = backbone, trained_values(backbone)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=module.optimizer_settings.learning_rate, weight_decay=0.0)
    module.logged_values = {}
    module.log = lambda key, value, **_: module.logged_values.update({key: float(value)})
    module.backward_part = lambda loss, last: loss.backward()
    module.optimizers = lambda: optimizer
    module.lr_schedulers = lambda: SimpleNamespace(step=lambda: None)
    return module
