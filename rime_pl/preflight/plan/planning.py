"""From a run's settings to its plan: the batch of a step, each stage's peak, hours, and what to change.

Called by `rime plan`. The stages themselves are simulated (predict.py); nothing here repeats what they do.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rime_pl.backbone.config import BackboneConfig
from rime_pl.datamodules.batch_plan import choose_pairs, local_batch_size, plan_training
from rime_pl.datamodules.shards import CORPUS_FILE, ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.predict import TRAINED_BYTES, StagePlan, predict_stage, rows_of, without_values
from rime_pl.preflight.plan.weightless import read_architecture, read_processor
from rime_pl.processing import RimeProcessor
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
#: Pairs of each task that are read to learn the lengths.
SAMPLE = 32
#: Word tokens of an item, chat layout included, where no corpus is at hand.
PROMPT_TOKENS = 64
#: Parts that FSDP2 splits among processes; the scales of 4-bit weights are no parameters and stay whole.
SHARDED = ("4-bit weights", "trained weights", "optimiser states")


@dataclass(frozen=True)
class RunSettings:
    """The settings of a stage's run."""

    stage: str
    module_class: type[RimeModule]
    values: Any  # the namespace of the stage's parser
    backbone: BackboneConfig
    num_processes: int
    strategy: str  # "single", "ddp" or "fsdp"

    def module(self, kind: type[RimeModule], changes: Mapping[str, dict[str, Any]] = {}) -> RimeModule:
        """Return a stage with these settings, changed by group -> name -> value; of another stage, too."""
        types = typing.get_type_hints(kind.__init__)
        chosen = {name: value for name, value in self.values.model.as_dict().items() if name in types}
        for name, value in chosen.items():
            if name != "backbone" and is_dataclass(types[name]):
                chosen[name] = types[name](**value | changes.get(name, {}))
        return kind(**chosen | {"backbone": replace(self.backbone, **changes.get("backbone", {}))})


def make_plan(
    settings: RunSettings, memory: float | None, steps: int | None, assumed: tuple[int, int | None]
) -> dict[str, Any]:
    """Return the plan of a run as plain data, as `rime plan --json` prints it. Its options are the arguments.

    ``assumed`` holds the visual tokens of an item and the tokens of a rewrite, where no corpus is at hand.
    """
    if settings.stage == "refine_rl" and settings.strategy == "fsdp":
        raise RimeError("trainer.strategy: Refine-RL runs on one process or with DDP, not with FSDP2.")
    architecture = read_architecture(settings.backbone.name_or_path)
    batch, lengths = read_batch(settings, architecture, assumed)
    kinds = CONTRASTIVE if settings.stage in CONTRASTIVE else {settings.stage: settings.module_class}
    stages = {stage: predict(settings, kind, architecture, batch) for stage, kind in kinds.items()}
    own = stages[settings.stage]
    tokens = [side.prompts.input_ids.shape[1] + side.completions.ids.shape[1] for side in batch.sides]
    batch_size, num_steps = settings.values.data.batch_size, steps or count_steps(settings)
    return {
        "stage": settings.stage,
        "checkpoint": settings.backbone.name_or_path,
        "parameters": own.parameters,
        "trained_parameters": own.trained,
        "processes": settings.num_processes,
        "strategy": settings.strategy,
        "batch_size": batch_size,
        "negatives_per_query": batch_size - 1 if settings.stage in CONTRASTIVE else None,
        "tokens_per_batch": sum(tokens) * len(batch) * settings.num_processes,
        "longest_row": max(tokens),
        "lengths": lengths,
        "steps": num_steps,
        "flops_per_step": own.flops,
        "disk_bytes": checkpoint_bytes(own.trained, settings.stage),
        "memory_gib": memory,
        "stages": [asdict(stage) | {"peak": stage.peak} for stage in stages.values()],
        "hours": hours(own.flops, own.peak, num_steps),
        # settings that bring the peak down; the first ones cost no quality
        "changes": [
            {"setting": typed, "peak": predict(settings, settings.module_class, architecture, rows, new).peak}
            for typed, rows, new in variants(settings, batch)
            if memory is not None and not fits(own.peak, memory)
        ],
    }


def read_batch(
    settings: RunSettings, architecture: PretrainedConfig, assumed: tuple[int, int | None]
) -> tuple[Batch, str]:
    """Return one process's batch, and where its lengths are known from."""
    rows = local_batch_size(settings.values.data.batch_size, settings.num_processes)
    processor = read_processor(settings.backbone, architecture)
    if _corpus_is_there(settings) and isinstance(processor, RimeProcessor):
        source = f"read from {settings.values.data.path}, {SAMPLE} pairs of each task, the longest task"
        return measured_batch(settings, processor, rows), source
    image_tokens, words = assumed[0], settings.backbone.prompt.budget(assumed[1])
    side = assumed_rows(processor, architecture, rows, image_tokens, words)
    contents = torch.arange(rows)
    why = "no tokenizer here" if _corpus_is_there(settings) else "no corpus here"
    sizes = f"{PROMPT_TOKENS} words, {image_tokens} visual tokens, {words} of rewrite"
    return Batch(side, side, contents, contents, "assumed"), f"assumed ({why}) on each side: {sizes}"


def measured_batch(settings: RunSettings, processor: RimeProcessor, rows: int) -> Batch:
    """Return a batch of the task with the longest pairs; pairs stand in it several times if need be."""
    data = settings.values.data
    used = choose_pairs(read_split(data.path, "train", data.tasks), data.annotated_share, data.rewrites)
    entries, reader = used.entries, ShardReader(used.entries, completion=data.completion, hidden=used.hidden)
    batches: list[Batch] = []
    for task in sorted({entry.dataset for entry in entries}):
        places = [n for n, entry in enumerate(entries) if entry.dataset == task]
        chosen = places[:: max(1, len(places) // SAMPLE)][:SAMPLE]
        pairs = [processor.check(reader.read(n), cut=True)[0] for n in chosen]
        batches.append(processor.training_batch(pairs))
    longest = max(batches, key=lambda one: sum(side.lengths().sum(1).float().mean() for side in one.sides))
    with torch.device("meta"):  # thousands of pictures take no memory
        query, target = map(without_values, longest.sides)
    return rows_of(replace(longest, query=query, target=target), torch.arange(rows) % len(longest))


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
        pixels = torch.empty(rows * image_tokens * merge**2, width, device="meta")
    images = torch.full((rows,), int(image_tokens > 0))
    prompts = Prompts(ids, torch.ones_like(ids), pixels, grid, images)
    written = torch.full((rows, words + 2), word)
    written[:, -2], written[:, -1] = processor.gen_id, processor.turn_end_id
    completions = Completions(written, torch.ones_like(written))
    return Rows(prompts, completions, torch.ones(rows, dtype=torch.bool))


def count_steps(settings: RunSettings) -> int | None:
    """Return the optimizer steps of the run, where settings or corpus say it."""
    trainer, data = settings.values.trainer, settings.values.data
    if trainer.max_steps and trainer.max_steps > 0:
        return int(trainer.max_steps)  # updates: with policy.num_updates above 1, hours are too high
    length = data.steps_per_epoch
    if length is None and _corpus_is_there(settings):
        entries = read_split(data.path, "train", data.tasks)
        shares = (data.annotated_share, data.annotated_batch_share, data.rewrites)
        length = len(plan_training(entries, data.batch_size, 0, *shares)[1])
    return int(length * trainer.max_epochs) if length and (trainer.max_epochs or 0) > 0 else None


def _corpus_is_there(settings: RunSettings) -> bool:
    return (Path(settings.values.data.path) / CORPUS_FILE).is_file()


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
    plan = predict_stage(settings.module(kind, changes), architecture, batch)
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
            setting = f"--model.rollouts.items_per_pass {size} (same result)"
            yield setting, batch, {"rollouts": {"items_per_pass": size}}
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
