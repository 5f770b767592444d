"""From a run's settings to its plan: the batch of a step, each stage's peak, hours, and what to change.

Called by `rime plan`. The stages themselves are simulated (predict.py); nothing here repeats what they do.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from rime_pl.backbone.config import BackboneConfig
from rime_pl.datamodules.batch_plan import local_batch_size, plan_training
from rime_pl.datamodules.shards import CORPUS_FILE, ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.arithmetic import GIB, StagePlan, checkpoint_bytes, hours, shard
from rime_pl.preflight.plan.predict import predict_stage, rows_of, without_values
from rime_pl.preflight.plan.weightless import read_architecture, read_processor
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Completions, Prompts, Rows

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
    stages = {
        stage: predict(settings, settings.module(kind), architecture, batch) for stage, kind in kinds.items()
    }
    own = stages[settings.stage]
    tokens = [side.prompts.input_ids.shape[1] + side.completions.ids.shape[1] for side in sides(batch)]
    batch_size, num_steps = settings.values.data.batch_size, steps or count_steps(settings)
    fits = memory is None or own.peak <= memory * GIB
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
        "changes": [] if fits else what_to_change(settings, architecture, batch),
    }


def sides(batch: Batch) -> tuple[Rows, Rows]:
    """Return both sides of a batch."""
    return batch.query, batch.target


# -- the batch ------------------------------------------------------------------------------------------


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
    sizes = f"{PROMPT_TOKENS} words, {image_tokens} visual tokens, {words} of rewrite"
    return Batch(side, side, contents, contents, "assumed"), f"assumed on each side: {sizes}"


def measured_batch(settings: RunSettings, processor: RimeProcessor, rows: int) -> Batch:
    """Return a batch of the task with the longest pairs; pairs stand in it several times if need be."""
    data = settings.values.data
    entries = read_split(data.path, "train", data.tasks)
    reader = ShardReader(entries, data.require_rewrites, completion=data.completion)
    batches: list[Batch] = []
    for task in sorted({entry.dataset for entry in entries}):
        places = [n for n, entry in enumerate(entries) if entry.dataset == task]
        chosen = places[:: max(1, len(places) // SAMPLE)][:SAMPLE]
        batches.append(processor.training_batch([reader.read(place) for place in chosen]))
    longest = max(batches, key=lambda one: sum(side.lengths().sum(1).float().mean() for side in sides(one)))
    with torch.device("meta"):  # thousands of pictures take no memory
        query, target = map(without_values, sides(longest))
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
        return int(trainer.max_steps)
    if not trainer.max_epochs or trainer.max_epochs < 0:
        return None
    length = data.steps_per_epoch
    if length is None and _corpus_is_there(settings):
        entries = read_split(data.path, "train", data.tasks)
        shares = (data.annotated_share, data.annotated_batch_share, data.rewrites)
        length = len(plan_training(entries, data.batch_size, 0, *shares)[1])
    return None if length is None else int(length * trainer.max_epochs)


def _corpus_is_there(settings: RunSettings) -> bool:
    return (Path(settings.values.data.path) / CORPUS_FILE).is_file()


# -- several processes, and what to change ---------------------------------------------------------------


def predict(
    settings: RunSettings, module: RimeModule, architecture: PretrainedConfig, batch: Batch
) -> StagePlan:
    """Return the plan of one of several processes: FSDP2 splits the decoder, DDP adds gradient buckets."""
    plan, layers = predict_stage(module, architecture, batch), architecture.text_config.num_hidden_layers
    if settings.strategy == "fsdp":
        return replace(plan, parts=shard(plan.parts, SHARDED, settings.num_processes, layers))
    if settings.strategy == "ddp":
        return replace(plan, parts=plan.parts | {"gradient buckets of DDP": plan.parts["trained weights"]})
    return plan


def what_to_change(
    settings: RunSettings, architecture: PretrainedConfig, batch: Batch
) -> list[dict[str, Any]]:
    """Return settings that bring the peak down, each with its peak; the first ones cost no quality."""
    changes = []
    for setting, groups, smaller in variants(settings, batch):
        module = settings.module(settings.module_class, groups)
        changes.append({"setting": setting, "peak": predict(settings, module, architecture, smaller).peak})
    return changes


def variants(settings: RunSettings, batch: Batch) -> Iterator[tuple[str, dict[str, dict[str, Any]], Batch]]:
    """Yield what can be changed against memory, each by itself: as it is typed, as settings, the batch."""
    model, rows, short = settings.values.model, len(batch), settings.backbone.prompt.max_rewrite_tokens // 2
    contrastive = settings.stage in CONTRASTIVE
    if contrastive:
        micro = model.micro_batches
        for size in _fewer(rows, rows // 4) if micro.size is None and micro.tokens is None else ():
            setting = f"--model.micro_batches.size {size} (gradient cache: same negatives, slower)"
            yield setting, {"micro_batches": {"size": size, "gradient_cache": True}}, batch
    else:
        items = model.rollouts.items_per_pass or rows
        for size in _fewer(items, items // 2):
            setting = f"--model.rollouts.items_per_pass {size} (same result)"
            yield setting, {"rollouts": {"items_per_pass": size}}, batch
    for name in ("load_in_4bit", "gradient_checkpointing"):
        if not getattr(settings.backbone, name):
            yield f"--model.backbone.{name} true", {"backbone": {name: True}}, batch
    if contrastive:
        yield f"rewrites of at most {short} tokens", {}, _shorter(batch, short + 2)
    else:
        budget = settings.backbone.prompt.budget(model.rollouts.max_new_tokens)
        halves = {"max_new_tokens": max(1, budget // 2)}
        if model.rollouts.num_generations >= 4:
            halves["num_generations"] = model.rollouts.num_generations // 2
        for name, half in halves.items():
            yield f"--model.rollouts.{name} {half}", {"rollouts": {name: half}}, batch
    for fewer in (rows // 2, rows // 4):
        if fewer >= 2:
            size = fewer * settings.num_processes
            negatives = f" (negatives per query {size - 1})" if contrastive else ""
            yield f"--data.batch_size {size}{negatives}", {}, rows_of(batch, torch.arange(fewer))


def _fewer(now: int, first: int) -> list[int]:
    return [size for size in dict.fromkeys((first, 1)) if 1 <= size < now]


def _shorter(batch: Batch, tokens: int) -> Batch:
    """The same batch with completions cut to ``tokens``, <gen_emb> and end of turn kept."""

    def cut(side: Rows) -> Rows:
        ids, mask = side.completions.ids[:, -tokens:], side.completions.mask[:, -tokens:]
        return replace(side, completions=Completions(ids, mask))

    return replace(batch, query=cut(batch.query), target=cut(batch.target))
