"""What a run will need, and what to change if that is too much: the plan that `rime plan` prints.

Called by rime_pl/commands/plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from rime_pl.errors import RimeError
from rime_pl.preflight.plan.arithmetic import (
    GIB,
    Change,
    Plan,
    StagePlan,
    checkpoint_bytes,
    predict_hours,
    shard,
)
from rime_pl.preflight.plan.batches import count_steps, num_tokens, planned_batch, take
from rime_pl.preflight.plan.predict import predict_stage
from rime_pl.preflight.plan.weightless import read_architecture
from rime_pl.preflight.settings import RunSettings
from rime_pl.types import Batch, Completions, Rows

#: Planned together, from the settings of either.
CONTRASTIVE = ("sft", "cma")
#: Parts that FSDP2 splits among processes; the scales of 4-bit weights are no parameters and stay whole.
SHARDED = ("4-bit weights", "trained weights", "optimiser states")


def make_plan(
    settings: RunSettings,
    memory: float | None = None,
    steps: int | None = None,
    image_tokens: int = 256,
    rewrite_tokens: int | None = None,
) -> Plan:
    """Predict memory, time and disk of a run.

    Args:
        settings: Of the run.
        memory: GiB of the GPU; None: nothing is to be changed.
        steps: Optimiser steps; None: those of settings and corpus.
        image_tokens, rewrite_tokens: See :func:`planned_batch`.
    """
    if settings.stage == "refine_rl" and settings.strategy == "fsdp":
        raise RimeError("trainer.strategy: Refine-RL runs on one process or under DDP, not under FSDP2.")
    architecture = read_architecture(settings.backbone.name_or_path)
    batch, source = planned_batch(settings, architecture, image_tokens, rewrite_tokens)
    contrastive = settings.stage in CONTRASTIVE
    stages = [
        plan_stage(settings, stage, architecture, batch)
        for stage in (CONTRASTIVE if contrastive else (settings.stage,))
    ]
    own = next(stage for stage in stages if stage.stage == settings.stage)
    num_steps = steps or count_steps(settings)
    size = settings.values.data.batch_size
    facts = {
        "stage": settings.stage,
        "checkpoint": settings.backbone.name_or_path,
        "parameters": own.parameters,
        "trained_parameters": own.trained,
        "processes": settings.num_processes,
        "strategy": settings.strategy,
        "batch_size": size,
        "negatives_per_query": size - 1 if contrastive else None,
        "tokens_per_step": num_tokens(batch) * settings.num_processes,
        "lengths": source,
        "steps": num_steps,
        "flops_per_step": own.flops,
        "disk_bytes": checkpoint_bytes(own.trained, settings.stage),
        "memory_gib": memory,
    }
    changes = []
    if memory is not None and own.peak > memory * GIB:
        changes = [
            Change(label, plan_stage(changed, changed.stage, architecture, other).peak)
            for label, changed, other in what_to_change(settings, batch)
        ]
    return Plan(facts, stages, predict_hours(own.flops, own.peak, num_steps), changes)


def plan_stage(settings: RunSettings, stage: str, architecture: PretrainedConfig, batch: Batch) -> StagePlan:
    """One process of several: FSDP2 splits the decoder, DDP adds a bucket for the gradients."""
    plan = predict_stage(settings.module(stage), architecture, batch)
    if settings.strategy == "fsdp":
        layers = architecture.text_config.num_hidden_layers
        return replace(plan, parts=shard(plan.parts, SHARDED, settings.num_processes, layers))
    if settings.strategy == "ddp":
        return replace(plan, parts=plan.parts | {"gradient buckets of DDP": plan.parts["trained weights"]})
    return plan


def what_to_change(settings: RunSettings, batch: Batch) -> Iterator[tuple[str, RunSettings, Batch]]:
    """Yield settings that bring the peak down, those that cost no quality first."""
    yield from _smaller_passes(settings, batch)
    for name in ("load_in_4bit", "gradient_checkpointing"):
        if not settings.values.model.backbone[name]:
            setting = f"model.backbone.{name}"
            yield f"--{setting} true", settings.change({setting: True}), batch
    yield from _shorter_rewrites(settings, batch)
    for fewer in (len(batch) // 2, len(batch) // 4):
        if fewer >= 2:
            size = fewer * settings.num_processes
            negatives = f" (negatives per query {size - 1})" if settings.stage in CONTRASTIVE else ""
            changed = settings.change({"data.batch_size": size})
            yield f"--data.batch_size {size}{negatives}", changed, take(batch, torch.arange(fewer))


def _smaller_passes(settings: RunSettings, batch: Batch) -> Iterator[tuple[str, RunSettings, Batch]]:
    model, rows = settings.values.model, len(batch)
    name, note, also = (
        "model.micro_batch_size",
        "gradient cache: same negatives, slower",
        {"model.gradient_cache": True},
    )
    sizes: tuple[int, ...] = (rows // 4, 1)
    if settings.stage == "refine_rl":
        rows = model.items_per_pass or rows
        name, note, also, sizes = "model.items_per_pass", "same result", {}, (rows // 2, 1)
    elif model.micro_batch_size or model.micro_batch_tokens:
        return
    for fewer in dict.fromkeys(sizes):
        if 1 <= fewer < rows:
            yield f"--{name} {fewer} ({note})", settings.change({name: fewer, **also}), batch


def _shorter_rewrites(settings: RunSettings, batch: Batch) -> Iterator[tuple[str, RunSettings, Batch]]:
    model, budget = settings.values.model, settings.backbone.prompt.max_rewrite_tokens
    if settings.stage == "refine_rl":
        name = "model.max_new_tokens"
        short = max(1, (model.max_new_tokens or budget) // 2)
        yield f"--{name} {short}", settings.change({name: short}), batch
        if model.num_generations >= 4:
            name, half = "model.num_generations", model.num_generations // 2
            yield f"--{name} {half}", settings.change({name: half}), batch
        return
    short = max(1, budget // 2)
    if max(side.completions.ids.shape[1] for side in (batch.query, batch.target)) > short + 2:
        query, target = (_cut(side, short + 2) for side in (batch.query, batch.target))
        yield f"rewrites of at most {short} tokens", settings, replace(batch, query=query, target=target)


def _cut(side: Rows, width: int) -> Rows:
    ids, mask = side.completions.ids, side.completions.mask
    return replace(side, completions=Completions(ids[:, :width], mask[:, :width]))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, derived numbers included."""
    return {
        **plan.facts,
        "stages": [asdict(stage) | {"peak": stage.peak} for stage in plan.stages],
        "hours": [asdict(row) | {"class": row.label} for row in plan.hours],
        "changes": [asdict(change) for change in plan.changes],
    }
