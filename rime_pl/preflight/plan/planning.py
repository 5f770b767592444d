"""From a run's settings to its plan: the batch of a step, each stage's peak, hours, and what to change.

Called by `rime plan`. The stages themselves are simulated (predict.py); nothing here repeats what they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rime_pl.datamodules.corpora import Corpora
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.datamodules.ranks import local_batch_size
from rime_pl.datamodules.remote import is_remote
from rime_pl.datamodules.sampling import sample_tasks
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.predict import (
    TRAINED_BYTES,
    StagePlan,
    longest,
    num_tokens,
    predict_stage,
    rows_of,
    without_values,
)
from rime_pl.preflight.plan.weightless import read_architecture, read_processor
from rime_pl.processing import RimeProcessor
from rime_pl.run_settings import RunSettings
from rime_pl.scaling.sharding import check_sharding
from rime_pl.types import Batch, Completions, Prompts, Rows

GIB = 2**30
#: Share of the peak matrix throughput that a step is assumed to reach; it is not measured.
UTILISATION = 0.25
#: GPU -> GiB of memory, dense bfloat16 TFLOP/s with float32 accumulation, from the makers' data sheets.
GPUS: dict[str, tuple[int, float]] = {
    "RTX 3090": (24, 71.0),
    "RTX 4090": (24, 165.2),
    "L4": (24, 121.0),
    "A10": (24, 125.0),
    "L40S": (48, 362.0),
    "A100 40GB": (40, 312.0),
    "A100 80GB": (80, 312.0),
    "H100 SXM": (80, 989.0),
    "H200": (141, 989.0),
}
#: Class of hours -> its upper end; a prediction of minutes would claim too much.
CLASSES = {"< 1 h": 1, "1-3 h": 3, "3-10 h": 10, "10-30 h": 30, "30-100 h": 100, "> 100 h": math.inf}
#: Planned together, from the settings of either.
CONTRASTIVE: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}
#: Pairs of each task that are read for the time, and as many with the most pictures and text for the memory.
SAMPLE = 16
#: Word tokens of an item, chat layout included, where no corpus is at hand.
PROMPT_TOKENS = 64
#: Parts that FSDP2 splits among processes; the scales of 4-bit weights are no parameters and stay whole.
SHARDED = ("4-bit weights", "vision tower weights", "trained weights", "optimiser states")


def make_plan(
    settings: RunSettings, memory: float | None, steps: int | None, assumed: tuple[int, int | None]
) -> dict[str, Any]:
    """Return the plan of a run as plain data, as `rime plan --json` prints it. Its options are the arguments.

    ``assumed`` holds the visual tokens of an item and the tokens of a rewrite, where no corpus is at hand.
    """
    if settings.stage == "refine_rl" and settings.strategy == "fsdp":
        raise RimeError("trainer.strategy: Refine-RL runs on one process or with DDP, not with FSDP2.")
    check_sharding(settings.backbone, settings.strategy == "fsdp")
    architecture = read_architecture(settings.backbone.name_or_path)
    processor = read_processor(settings.backbone, architecture)
    paths = Corpora.of(settings.values.data.path).weights
    built = all(is_remote(path) or Path(path).exists() for path in paths)
    if data := settings.data(processor) if built else None:
        data.plan_training()
    batch, usual, share, source = read_lengths(settings, architecture, processor, data, assumed)
    kinds = CONTRASTIVE if settings.stage in CONTRASTIVE else {settings.stage: settings.module_class}
    stages = {stage: predict(settings, kind, architecture, batch) for stage, kind in kinds.items()}
    own = stages[settings.stage]
    timed = own if usual is batch else predict(settings, settings.module_class, architecture, usual)
    flops, num_steps = timed.flops * share, steps or count_steps(settings, data)
    size = settings.values.data.batch_size
    return {
        "stage": settings.stage,
        "checkpoint": settings.backbone.name_or_path,
        "parameters": own.parameters,
        "trained_parameters": own.trained,
        "processes": settings.num_processes,
        "strategy": settings.strategy,
        **{"batch_size": size, "negatives_per_query": size - 1 if settings.stage in CONTRASTIVE else None},
        "tokens_per_batch": round(num_tokens(usual) * share) * settings.num_processes,
        "longest_row": max(int(side.lengths().sum(1).max()) for side in batch.sides),
        "lengths": source,
        "steps": num_steps,
        "flops_per_step": flops,
        "disk_bytes": checkpoint_bytes(own.trained, settings.stage),
        "memory_gib": memory,
        "stages": [asdict(stage) | {"peak_bytes": stage.peak} for stage in stages.values()],
        "hours": hours(flops, own.peak, num_steps),
        # settings that bring the peak down; the first ones cost no quality
        "changes": [
            {
                "setting": typed,
                "peak_bytes": predict(settings, settings.module_class, architecture, rows, new).peak,
            }
            for typed, rows, new in variants(settings, batch)
            if memory is not None and not fits(own.peak, memory)
        ],
    }


def read_lengths(
    settings: RunSettings,
    architecture: PretrainedConfig,
    processor: RimeProcessor,
    data: RimeDataModule | None,
    assumed: tuple[int, int | None],
) -> tuple[Batch, Batch, float, str]:
    """Return a process's longest batch, a usual one, the tokens of a mean batch as a share of it, and why."""
    path, budget = Corpora.of(settings.values.data.path).first, settings.backbone.prompt.budget(assumed[1])
    rows = local_batch_size(settings.values.data.batch_size, settings.num_processes)
    if data and isinstance(processor, RimeProcessor):
        source = f"read from {path}: memory for the longest pairs, time for a mean of {SAMPLE} of each task"
        return *measured(data, rows), source
    side = assumed_rows(processor, architecture, rows, assumed[0], budget)
    batch = Batch(side, side, torch.arange(rows), torch.arange(rows), "assumed")
    why = f"{settings.backbone.name_or_path} has no tokenizer here" if data else f"there is no {path} yet"
    sizes = f"{PROMPT_TOKENS} words, {assumed[0]} visual tokens, {budget} of rewrite"
    return batch, batch, 1.0, f"assumed, because {why}, on each side: {sizes}"


def measured(data: RimeDataModule, rows: int) -> tuple[Batch, Batch, float]:
    """Return batches of the task with the longest pairs; a pair stands in them several times if need be."""
    found: list[tuple[int, Batch, Batch]] = []
    for sample in sample_tasks(data, SAMPLE):
        with torch.device("meta"):  # thousands of pictures take no memory
            query, target = map(without_values, sample.batch.sides)
        batch = replace(sample.batch, query=query, target=target)
        long, usual = longest(batch, len(batch)), rows_of(batch, torch.arange(rows) % sample.num_drawn)
        found.append((sample.num_pairs, rows_of(long, torch.arange(rows) % len(long)), usual))
    _, long, usual = max(found, key=lambda one: num_tokens(one[1]))
    mean = sum(pairs * num_tokens(one) for pairs, _, one in found) / sum(pairs for pairs, *_ in found)
    return long, usual, mean / num_tokens(usual)


def assumed_rows(
    processor: RimeProcessor, architecture: PretrainedConfig, rows: int, image_tokens: int, words: int
) -> Rows:
    """Return rows with a picture, some words and a rewrite of full length each."""
    vision, word = architecture.vision_config, processor.pad_id + 1
    ids = torch.full((rows, PROMPT_TOKENS + image_tokens), word)
    ids[:, :image_tokens] = processor.image_id
    ids[:, -2] = processor.disc_id
    pixels = grid = None
    if image_tokens:
        merge = vision.spatial_merge_size
        grid = torch.tensor([[1, merge, merge * image_tokens]]).repeat(rows, 1)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(rows * image_tokens * merge**2, width, dtype=torch.uint8, device="meta")
    media = torch.full((rows,), int(image_tokens > 0))
    seconds = torch.zeros(rows, dtype=torch.float64) if image_tokens else None
    prompts = Prompts(ids, torch.ones_like(ids), pixels, grid, media, seconds)
    written = torch.full((rows, words + 2), word)
    written[:, -2], written[:, -1] = processor.gen_id, processor.turn_end_id
    completions = Completions(written, torch.ones_like(written))
    return Rows(prompts, completions, torch.ones(rows, dtype=torch.bool))


def count_steps(settings: RunSettings, data: RimeDataModule | None) -> int | None:
    """Return the number of batches that the run trains on, where settings or corpus say it."""
    values, trainer = settings.values, settings.values.trainer
    per_epoch = len(data.train_dataloader()) if data else values.data.steps_per_epoch
    ends = []
    if per_epoch and (trainer.max_epochs or 0) > 0:
        limit = trainer.limit_train_batches  # a number, or a share; the parser may read 25 as 25.0
        share = isinstance(limit, float) and limit <= 1
        most = per_epoch if limit is None else int(per_epoch * limit if share else limit)
        ends.append(min(per_epoch, most) * trainer.max_epochs)
    if (trainer.max_steps or 0) > 0:  # Lightning counts updates
        updates = values.model.policy.num_updates if settings.stage == "refine_rl" else 1
        ends.append(math.ceil(trainer.max_steps * (trainer.accumulate_grad_batches or 1) / updates))
    return min(ends, default=None)


def fits(peak: int, gib: float) -> bool:
    """Return whether a peak fits in a GPU; 5 % of its memory are left to the driver and to fragmentation."""
    return peak <= 0.95 * gib * GIB


def hours(flops: float, peak: int, num_steps: int | None) -> list[dict[str, Any]]:
    """Return for each GPU whether one process fits, the seconds of its step, and the hours of the run."""
    rows = []
    for gpu, (gib, tflops) in GPUS.items():
        seconds = flops / (tflops * 1e12 * UTILISATION)
        run = next(name for name, end in CLASSES.items() if seconds * (num_steps or 0) < 3600 * end)
        row = {"gpu": gpu, "fits": fits(peak, gib), "seconds_per_step": seconds}
        rows.append(row | {"class": run if num_steps else "-"})
    return rows


def checkpoint_bytes(trained: int, stage: str) -> dict[str, int]:
    """Return the disk space of a run's weights; processor files are not counted.

    "adapter" is used later; "checkpoint", to resume from, holds both moments of AdamW, too. Refine-RL may
    diverge, so it keeps the checkpoint before the last one as well.

    Example:
        >>> checkpoint_bytes(1000, "cma"), checkpoint_bytes(1000, "refine_rl")["checkpoint"]
        ({'adapter': 4000, 'checkpoint': 12000}, 24000)
    """
    kept = 2 if stage == "refine_rl" else 1
    return {"adapter": trained * TRAINED_BYTES, "checkpoint": kept * 3 * trained * TRAINED_BYTES}


def predict(
    settings: RunSettings,
    kind: type[RimeModule],
    architecture: PretrainedConfig,
    batch: Batch,
    changes: Mapping[str, dict[str, Any]] = {},
) -> StagePlan:
    """Return the plan of one of several processes: FSDP2 splits the decoder, DDP adds gradient buckets."""
    data = settings.values.data
    further = data.hard_negatives + data.positives if kind in CONTRASTIVE.values() else 0
    plan = predict_stage(settings.module(kind, changes), architecture, batch, further)
    layers = architecture.text_config.num_hidden_layers
    if settings.strategy == "fsdp":
        return replace(plan, parts=shard(plan.parts, settings.num_processes, layers))
    if settings.strategy == "ddp":
        return replace(plan, parts=plan.parts | {"gradient buckets of DDP": plan.parts["trained weights"]})
    return plan


def shard(parts: Mapping[str, int], processes: int, num_layers: int) -> dict[str, int]:
    """Return the bytes of each process under FSDP2; two layers at a time are whole on every process."""
    split = {name: -(-size // processes) if name in SHARDED else size for name, size in parts.items()}
    if processes > 1:
        whole = sum(parts[name] for name in SHARDED if name in parts)
        split["gathered layers"] = 2 * -(-whole // num_layers)
    return split


def variants(settings: RunSettings, batch: Batch) -> Iterator[tuple[str, Batch, dict[str, dict[str, Any]]]]:
    """Yield what can be changed against memory, each by itself: as it is typed, the batch, the settings.

    The first ones cost no quality.
    """
    model, rows, short = settings.values.model, len(batch), settings.backbone.prompt.max_rewrite_tokens // 2
    contrastive = settings.stage in CONTRASTIVE
    if contrastive:
        micro = model.micro_batches
        for size in _fewer(rows, rows // 4) if micro.size is None and micro.tokens is None else ():
            setting = f"--model.micro_batches.size {size} (gradient cache: same negatives, slower)"
            yield setting, batch, {"micro_batches": {"size": size, "gradient_cache": True}}
    else:
        items = model.rollouts.items_per_pass or rows
        for size in _fewer(items, items // 2):
            setting = f"--model.rollouts.items_per_pass {size} (same result up to rounding)"
            yield setting, batch, {"rollouts": {"items_per_pass": size}}
        if model.rollouts.passes_per_sampling is None:
            yield (
                "--model.rollouts.passes_per_sampling 1 (same result up to rounding, slower)",
                batch,
                {"rollouts": {"passes_per_sampling": 1}},
            )
    for name in ("load_in_4bit", "gradient_checkpointing"):
        if not getattr(settings.backbone, name):
            yield f"--model.backbone.{name} true", batch, {"backbone": {name: True}}
    if contrastive:
        yield f"rewrites of at most {short} tokens", _shorter(batch, short + 2), {}
    else:
        budget = settings.backbone.prompt.budget(model.rollouts.max_new_tokens)
        halves = {"max_new_tokens": max(1, budget // 2)}
        if model.rollouts.num_generations >= 4:
            halves["num_generations"] = model.rollouts.num_generations // 2
        for name, half in halves.items():
            yield f"--model.rollouts.{name} {half}", batch, {"rollouts": {name: half}}
    for fewer in (rows // 2, rows // 4):
        if fewer >= 2:
            size = fewer * settings.num_processes
            negatives = f" (negatives per query {size - 1})" if contrastive else ""
            yield f"--data.batch_size {size}{negatives}", rows_of(batch, torch.arange(fewer)), {}


def _fewer(now: int, first: int) -> list[int]:
    return [size for size in dict.fromkeys((first, 1)) if 1 <= size < now]


def _shorter(batch: Batch, tokens: int) -> Batch:
    """The same batch with completions cut to ``tokens``, <gen_emb> and end of turn kept."""

    def cut(side: Rows) -> Rows:
        ids, mask = side.completions.ids[:, -tokens:], side.completions.mask[:, -tokens:]
        return replace(side, completions=Completions(ids, mask))

    return replace(batch, query=cut(batch.query), target=cut(batch.target))
