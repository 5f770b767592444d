"""`rime gpu-check`: does the real path run on this machine's GPU, and what does a step cost?

Random weights in the shape of Qwen2-VL-2B (no download) are saved, loaded in 4 bits through the very backbone
that training uses, and take a warm-up step and a measured step of SFT and of CMA under Lightning's trainer.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import bitsandbytes
import lightning as L
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.quantization import packed_weights_hash
from rime_pl.backbone.tiny import TinyConfig, build_processor, train_tokenizer
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch, Item, Pair, RimeError

STAGES: dict[str, type[RimeModule]] = {"SFT": SFTModule, "CMA": CMAModule}
WORDS = ("a", "red", "blue", "small", "large", "old", "cat", "dog", "boat", "tree", "house", "left", "right")
PATCH = 14
NUM_STEPS = 2  # the first warms up, the last is measured


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen2-VL and of the batch that it is given."""

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
    image_size: int  # pixels a side
    num_words: int  # of a rewrite


SHAPES = {
    # Qwen2-VL-2B-Instruct
    "2b": Shape(1536, 28, 12, 2, 8960, (16, 24, 24), 151936, 32, 1280, 16, image_size=448, num_words=60),
    # the same code in a second, for the tests
    "micro": Shape(64, 2, 4, 2, 128, (2, 3, 3), 512, 2, 64, 2, image_size=56, num_words=8),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2b", help="dimensions (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step (%(default)s)")
    parser.add_argument("--no_gradient_checkpointing", action="store_true", help="keep activations in memory")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked. `--shape micro --device cpu` runs this code on the CPU.")
        return 0
    if args.batch_size < 2:
        raise RimeError(f"--batch_size={args.batch_size} must be 2 or more; one pair has no negatives.")
    shape, device = SHAPES[args.shape], torch.device(args.device)
    with tempfile.TemporaryDirectory(prefix="rime-gpu-check-") as folder:
        report = check(Path(folder), shape, device, args.batch_size, not args.no_gradient_checkpointing)
    report.lines["shape"] = f"{args.shape}: Qwen2-VL, random weights"
    print(report.table())
    if not report.intact:
        raise RimeError("the packed 4-bit weights changed while training; see docs/reference/gpu.md.")
    return 0


@dataclass
class Report:
    """What was seen, in the order of the table."""

    lines: dict[str, str] = field(default_factory=dict)
    intact: bool = True

    def table(self) -> str:
        """As Markdown, ready for docs/reference/gpu.md."""
        rows = [f"| {name} | {value} |" for name, value in self.lines.items()]
        return "\n".join(["", "| what | seen |", "|---|---|", *rows])


def check(folder: Path, shape: Shape, device: torch.device, batch_size: int, checkpointing: bool) -> Report:
    """Make the checkpoint, load it in 4 bits, take the steps of both stages.

    Args:
        folder: Empty; the checkpoint goes there (4.4 GB for the 2b shape).
        shape: Dimensions.
        device: Of weights and training.
        batch_size: Pairs a step.
        checkpointing: Recompute activations in the backward pass.
    """
    report = Report(environment(device))
    print(f"writing random weights to {folder} ...", flush=True)
    save_checkpoint(folder, shape, device)
    # float32 on CPU: bfloat16 is emulated there
    config = BackboneConfig(
        str(folder),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        gradient_checkpointing=checkpointing,
        prompt=PromptConfig(max_rewrite_tokens=8 * shape.num_words),
    )
    processor = RimeProcessor.from_pretrained(str(folder), config.prompt)
    batch = processor.training_batch(synthetic_pairs(batch_size, shape))
    for stage, module_class in STAGES.items():
        seen = train(module_class(config, warmup_steps=0), batch, device)
        report.lines[f"{stage}: load in 4 bits"] = f"{seen.load_seconds:.1f} s, {seen.load_peak}"
        step = f"{seen.step_seconds[-1]:.2f} s, {seen.step_peak}"
        report.lines[f"{stage}: a step of {batch_size} pairs"] = step
        report.lines[f"{stage}: loss"] = ", ".join(f"{loss:.3f}" for loss in seen.losses)
        report.lines[f"{stage}: packed 4-bit weights"] = "unchanged" if seen.intact else "CHANGED"
        report.intact &= seen.intact
    rows = batch.query.prompts.input_ids.shape[1] + batch.query.completions.ids.shape[1]
    report.lines["tokens of a query"] = str(rows)
    return report


# -- training -------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Seconds, memory, losses and packed bytes of one stage's run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.load_seconds = 0.0
        self.load_peak = self.step_peak = ""
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self.intact = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before ``configure_model``, where the backbone is built."""
        _reset_peak(self.device)
        self._start = _now(self.device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.load_seconds = _now(self.device) - self._start
        self.load_peak = _peak(self.device)
        self._packed = packed_weights_hash(pl_module)
        _reset_peak(self.device)

    def on_train_batch_start(self, *_: object) -> None:
        self._start = _now(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        self.step_seconds.append(_now(self.device) - self._start)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_peak = _peak(self.device)
        self.intact = packed_weights_hash(pl_module) == self._packed


def train(module: RimeModule, batch: Batch, device: torch.device) -> Watch:
    """``NUM_STEPS`` optimiser steps on the same batch, through Lightning.

    Args:
        module: The stage; its backbone is loaded on the way.
        batch: On CPU; Lightning moves it.
    """
    watch = Watch(device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="32-true",  # Lightning casts nothing: the backbone has its types from the loader
        max_steps=NUM_STEPS,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * NUM_STEPS, batch_size=None))  # type: ignore[arg-type]
    if not all(math.isfinite(loss) for loss in watch.losses):
        raise RimeError(f"{type(module).__name__}: the loss is {watch.losses}, not finite.")
    return watch


# -- the checkpoint and the data --------------------------------------------------------------------------


def save_checkpoint(folder: Path, shape: Shape, device: torch.device) -> None:
    """An ordinary Qwen2-VL folder: processor, tokenizer trained on the spot, random bfloat16 weights."""
    tokenizer = train_tokenizer([text for pair in synthetic_pairs(64, shape) for text in _texts(pair)], 400)
    images = build_processor(tokenizer, TinyConfig(patch_size=PATCH), shape.image_size).image_processor
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    Qwen2VLProcessor(images, tokenizer, videos).save_pretrained(folder)
    torch.manual_seed(0)
    with device:  # 2 billion random numbers take a GPU no time
        model = Qwen2VLForConditionalGeneration(_config(shape, tokenizer)).bfloat16()
    model.save_pretrained(folder)


def _config(shape: Shape, tokenizer: transformers.PreTrainedTokenizerFast) -> Qwen2VLConfig:
    known = tokenizer.get_vocab()
    ids = {name: known[f"<|{name}|>"] for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    return Qwen2VLConfig(
        text_config={
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
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_embed_dim,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.vision_heads,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )


def synthetic_pairs(count: int, shape: Shape) -> list[Pair]:
    """Random words and noise, as long as a real batch: a query with a picture and a text, a picture."""
    rng = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(num_words))

    def item(name: str, words: str) -> Item:
        pixels = rng.randbytes(shape.image_size**2 * 3)
        image = Image.frombytes("RGB", (shape.image_size, shape.image_size), pixels)
        return Item(words, (image,), name, "Find the picture.", rewrite=text(shape.num_words))

    return [
        Pair(f"pair-{n}", "synthetic", "pictures", item(f"query {n}", text(12)), item(f"target {n}", ""))
        for n in range(count)
    ]


def _texts(pair: Pair) -> list[str]:
    return [f"{item.instruction} {item.text}\n{item.rewrite}" for item in (pair.query, pair.target) if item]


# -- measuring --------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, str]:
    """Machine and versions, the head of the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    versions = {
        **{"torch": torch.__version__, "transformers": transformers.__version__},
        **{"bitsandbytes": bitsandbytes.__version__, "lightning": L.__version__},
    }
    return {
        "device": name,
        "date": date.today().isoformat(),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return "memory not measured on a CPU"
    return f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
