"""`rime plan`: what a run will need, before it starts and without weights; what to change if too much.

rime plan --config configs/cma.yaml --config configs/data/openmoji/cma.yaml --memory 24 --data.batch_size 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rime_pl.backbone.config import BackboneConfig
from rime_pl.commands.settings import RunSettings, add_config_arguments, read_settings
from rime_pl.datamodules.batch_plan import plan_training
from rime_pl.datamodules.shards import CORPUS_FILE, ShardReader, read_split
from rime_pl.errors import RimeError
from rime_pl.preflight.plan.arithmetic import (
    GIB,
    Change,
    Plan,
    StagePlan,
    checkpoint_bytes,
    predict_hours,
    shard,
    step_flops,
)
from rime_pl.preflight.plan.predict import SHARDED, quick_peak, stage_plan, step_work
from rime_pl.preflight.plan.rehearsal import static_memory
from rime_pl.preflight.plan.shapes import RolloutShape, SideShape, StepShape, side_shape
from rime_pl.preflight.plan.skeleton import build_skeleton, read_architecture
from rime_pl.preflight.plan.tables import print_plan
from rime_pl.processing import RimeProcessor
from rime_pl.scaling.micro_batches import MicroBatches

#: Planned together, from the settings of either.
CONTRASTIVE = ("sft", "cma")
#: Pairs of each task that are tokenised to learn the lengths.
SAMPLE = 32
#: Words of an item, and of the chat layout around it, where no corpus is at hand.
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Lengths:
    """Sizes of one process's batch and where they are known from."""

    query: SideShape
    target: SideShape
    source: str
    num_tokens: int | None  # of the tokenizer
    num_steps: int | None  # of the run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--memory", type=float, help="GiB of a GPU: say what to change if the run does not fit"
    )
    parser.add_argument(
        "--steps", type=int, help="optimiser steps of the run, for the hours (default: from the data)"
    )
    parser.add_argument(
        "--image_tokens", type=int, default=256, help="of an item, without a corpus (%(default)s)"
    )
    parser.add_argument(
        "--rewrite_tokens",
        type=int,
        help="without a corpus (default: prompt.max_rewrite_tokens); Refine-RL takes its own budget",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args.config, args.stage, args.settings)
    plan = make_plan(settings, args)
    if args.json:
        print(json.dumps(to_json(plan), indent=1))
    else:
        print_plan(to_json(plan))
    return 0


def make_plan(settings: RunSettings, args: argparse.Namespace) -> Plan:
    """Rehearse each stage with these settings; a minute for a model of 2 billion parameters."""
    config = settings.backbone
    architecture = read_architecture(config.name_or_path)
    lengths = read_lengths(settings, architecture, args)
    skeleton = build_skeleton(config, architecture, lengths.num_tokens)
    static = static_memory(skeleton)
    shapes = step_shapes(settings, lengths)
    stages = [
        distributed(stage_plan(skeleton, shape), settings, architecture.text_config.num_hidden_layers)
        for shape in shapes.values()
    ]
    own = next(stage for stage in stages if stage.stage == settings.stage)
    work = step_work(skeleton, shapes[settings.stage])
    flops = step_flops(work)
    if settings.stage == "refine_rl":  # every further update scores once more, without the reference
        model, again = settings.values.model, dataclasses.replace(work, cached=False, patches=0)
        flops += (model.num_updates - 1) * step_flops(again)
        if model.embedder == "policy":  # reads the rewrites, too
            flops += step_flops(dataclasses.replace(again, cached=True)) - step_flops(again)
    num_steps = args.steps or lengths.num_steps
    facts = {
        "stage": settings.stage,
        "checkpoint": config.name_or_path,
        "parameters": static.parameters,
        "trained_parameters": static.trained,
        "processes": settings.num_processes,
        "strategy": settings.strategy,
        "batch_size": settings.values.data.batch_size,
        "negatives_per_query": None if settings.stage == "refine_rl" else settings.values.data.batch_size - 1,
        "tokens_per_step": work.tokens * settings.num_processes,
        "longest_row": work.row,
        "lengths": lengths.source,
        "steps": num_steps,
        "flops_per_step": flops,
        "disk_bytes": checkpoint_bytes(static.trained, settings.stage),
        "memory_gib": args.memory,
    }
    changes = what_to_change(settings, architecture, shapes[settings.stage], own, args.memory)
    return Plan(facts, stages, predict_hours(flops, own.peak, num_steps), changes)


# -- sizes ----------------------------------------------------------------------------------------------


def step_shapes(settings: RunSettings, lengths: Lengths) -> dict[str, StepShape]:
    """Each stage that is planned, and its step on one process."""
    query, target = lengths.query, lengths.target
    if settings.stage == "refine_rl":
        if settings.strategy == "fsdp":
            raise RimeError("trainer.strategy: Refine-RL runs on one process or under DDP, not under FSDP2.")
        return {"refine_rl": StepShape("refine_rl", query, target, rollouts=rollout_shape(settings))}
    cached, wrong = micro_batches(settings), wrong_rows(settings, query.rows)
    return {
        stage: StepShape(stage, query, target, wrong if stage == "cma" else 0, cached)
        for stage in CONTRASTIVE
    }


def rollout_shape(settings: RunSettings) -> RolloutShape:
    """What Refine-RL draws with these settings."""
    model = settings.values.model
    budget = settings.backbone.prompt.budget(model.max_new_tokens)
    return RolloutShape(model.num_generations, budget, model.items_per_pass, model.sides == "both")


def local_rows(settings: RunSettings) -> int:
    """Pairs of a batch on one process."""
    total, processes = settings.values.data.batch_size, settings.num_processes
    if total < processes or total % processes:
        raise RimeError(
            f"data.batch_size={total} cannot be divided among {processes} processes; give a multiple."
        )
    return total // processes


def wrong_rows(settings: RunSettings, rows: int) -> int:
    """Queries that CMA encodes once more; with SFT's settings, the defaults of CMA."""
    model = settings.values.model
    if settings.stage == "cma" and not model.lambda_dec:
        return 0
    share = model.wrong_share if settings.stage == "cma" else 1.0
    return max(1, round(share * rows))


def micro_batches(settings: RunSettings) -> MicroBatches | None:
    """Those of the gradient cache. Without the cache they keep their activations: as one forward, at most."""
    model = settings.values.model
    if not model.gradient_cache or (model.micro_batch_size is None and model.micro_batch_tokens is None):
        return None
    return MicroBatches(model.micro_batch_size, model.micro_batch_tokens, model.reuse_vision)


def read_lengths(settings: RunSettings, architecture: Any, args: argparse.Namespace) -> Lengths:
    """From the corpus and the checkpoint's processor where both are here, else from the options."""
    corpus = Path(settings.values.data.path)
    if (corpus / CORPUS_FILE).is_file():
        try:
            processor = RimeProcessor.from_pretrained(
                settings.backbone.name_or_path, settings.backbone.prompt
            )
        except RimeError:  # a shape without a tokenizer: lengths are assumed, steps are known
            return assumed_lengths(settings, architecture, args, count_steps(settings))
        return measured_lengths(settings, processor)
    return assumed_lengths(settings, architecture, args, count_steps(settings))


def measured_lengths(settings: RunSettings, processor: RimeProcessor) -> Lengths:
    """Of the task with the longest batches, some pairs of each being tokenised."""
    rows = local_rows(settings)
    entries = _entries(settings)
    reader = ShardReader(entries, settings.values.data.require_rewrites, settings.values.data.completion)
    largest: tuple[int, SideShape, SideShape] | None = None
    for task in sorted({entry.dataset for entry in entries}):
        places = [n for n, entry in enumerate(entries) if entry.dataset == task]
        chosen = places[:: max(1, len(places) // SAMPLE)][:SAMPLE]
        batch = processor.training_batch([reader.read(place) for place in chosen])
        query, target = (side_shape(side).share(rows) for side in (batch.query, batch.target))
        tokens = sum(side.rows * (side.prompt_tokens + side.completion_tokens) for side in (query, target))
        if largest is None or tokens > largest[0]:
            largest = (tokens, query, target)
    assert largest is not None, "read_split refuses an empty split"
    source = f"read from {settings.values.data.path}, {SAMPLE} pairs a task, the longest task"
    return Lengths(largest[1], largest[2], source, len(processor.tokenizer), count_steps(settings))


def assumed_lengths(
    settings: RunSettings, architecture: Any, args: argparse.Namespace, num_steps: int | None
) -> Lengths:
    """A picture, some words and a rewrite of full length on either side."""
    rows = local_rows(settings)
    merged = architecture.vision_config.spatial_merge_size**2
    rewrite = settings.backbone.prompt.budget(args.rewrite_tokens)
    side = SideShape(
        rows=rows,
        prompt_tokens=PROMPT_TOKENS + args.image_tokens,
        completion_tokens=rewrite + 2,
        labels=rows * (rewrite + 2),
        images=rows if args.image_tokens else 0,
        patches=rows * args.image_tokens * merged,
    )
    sizes = f"{PROMPT_TOKENS} words, {args.image_tokens} visual tokens, {rewrite} of rewrite"
    return Lengths(side, side, f"assumed on each side: {sizes}", None, num_steps)


def count_steps(settings: RunSettings) -> int | None:
    """Optimiser steps of the run, where settings or corpus say it."""
    trainer, data = settings.values.trainer, settings.values.data
    if trainer.max_steps and trainer.max_steps > 0:
        return int(trainer.max_steps)
    if not trainer.max_epochs or trainer.max_epochs < 0:
        return None
    length = data.steps_per_epoch
    if length is None:
        if not (Path(data.path) / CORPUS_FILE).is_file():
            return None
        shares = (data.annotated_share, data.annotated_batch_share, data.rewrites)
        length = len(plan_training(_entries(settings), data.batch_size, 0, *shares)[1])
    return int(length * trainer.max_epochs)


def _entries(settings: RunSettings) -> list[Any]:
    data = settings.values.data
    entries = read_split(data.path, "train")
    return [entry for entry in entries if data.tasks is None or entry.dataset in data.tasks]


# -- several processes, and what to change ---------------------------------------------------------------


def distributed(plan: StagePlan, settings: RunSettings, num_layers: int) -> StagePlan:
    """On one of several processes: FSDP2 splits the decoder, DDP adds a bucket for the gradients."""
    if settings.strategy == "fsdp":
        parts = shard(plan.parts, SHARDED, settings.num_processes, num_layers)
    elif settings.strategy == "ddp":
        trained = plan.parts["LoRA matrices"] + plan.parts["token rows"]
        parts = plan.parts | {"gradient buckets of DDP": trained}
    else:
        return plan
    return dataclasses.replace(plan, parts=parts)


def what_to_change(
    settings: RunSettings, architecture: Any, shape: StepShape, plan: StagePlan, memory: float | None
) -> list[Change]:
    """Settings that bring the peak down, the first ones being those that cost no quality."""
    if memory is None or plan.peak <= memory * GIB:
        return []
    config = settings.backbone
    before = quick_peak(config, architecture, shape)
    changed: list[tuple[str, BackboneConfig, StepShape]] = []
    smaller = _smaller_passes(shape) if shape.rollouts else _smaller_micro_batches(settings, shape)
    changed += [(setting, config, other) for setting, other in smaller]
    if not config.load_in_4bit:
        packed = dataclasses.replace(config, load_in_4bit=True)
        changed.append(("--model.backbone.load_in_4bit true", packed, shape))
    if not config.gradient_checkpointing:
        recomputed = dataclasses.replace(config, gradient_checkpointing=True)
        changed.append(("--model.backbone.gradient_checkpointing true", recomputed, shape))
    changed += [(setting, config, other) for setting, other in _smaller_batches(settings, shape)]
    # as a difference, so that what several processes add stays in
    return [
        Change(setting, plan.peak + quick_peak(other, architecture, step) - before)
        for setting, other, step in changed
    ]


def _smaller_micro_batches(settings: RunSettings, shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    rows = shape.query.rows
    for fewer in dict.fromkeys((rows // 4, 1)) if shape.cached is None else ():
        if 1 <= fewer < rows:
            micro = MicroBatches(fewer, None, settings.values.model.reuse_vision)
            also = "" if settings.values.model.gradient_cache else " --model.gradient_cache true"
            setting = f"--model.micro_batch_size {fewer}{also} (gradient cache: same negatives, slower)"
            yield setting, dataclasses.replace(shape, cached=micro)


def _smaller_passes(shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    drawn = shape.rollouts
    assert drawn is not None, "only Refine-RL draws"
    items = drawn.items_per_pass or shape.query.rows
    for fewer in dict.fromkeys((items // 2, 1)):
        if 1 <= fewer < items:
            again = dataclasses.replace(drawn, items_per_pass=fewer)
            yield f"--model.items_per_pass {fewer} (same result)", dataclasses.replace(shape, rollouts=again)


def _smaller_batches(settings: RunSettings, shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    """Shorter rewrites, fewer of them, and fewer pairs."""
    query, target, rows = shape.query, shape.target, shape.query.rows
    short = max(1, settings.backbone.prompt.max_rewrite_tokens // 2)
    shorter = dataclasses.replace(shape, query=_shorter(query, short + 2), target=_shorter(target, short + 2))
    if shape.rollouts is not None:
        short = max(1, shape.rollouts.max_new_tokens // 2)
        drawn = dataclasses.replace(shape.rollouts, max_new_tokens=short)
        shorter = dataclasses.replace(shape, rollouts=drawn)
    if shorter != shape:
        yield f"rewrites of at most {short} tokens", shorter
    if shape.rollouts is not None and shape.rollouts.num_generations >= 4:
        drawn = dataclasses.replace(shape.rollouts, num_generations=shape.rollouts.num_generations // 2)
        setting = f"--model.num_generations {drawn.num_generations}"
        yield setting, dataclasses.replace(shape, rollouts=drawn)
    for fewer in (rows // 2, rows // 4):
        if fewer >= 2:
            batch = fewer * settings.num_processes
            negatives = "" if shape.rollouts else f" (negatives per query {batch - 1})"
            yield (
                f"--data.batch_size {batch}{negatives}",
                dataclasses.replace(
                    shape,
                    query=query.share(fewer),
                    target=target.share(fewer),
                    wrong_rows=round(shape.wrong_rows * fewer / rows),
                ),
            )


def _shorter(side: SideShape, completion: int) -> SideShape:
    if side.completion_tokens <= completion:
        return side
    labels = round(side.labels * completion / side.completion_tokens)
    return dataclasses.replace(side, completion_tokens=completion, labels=labels)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, derived numbers included."""
    return {
        **plan.facts,
        "stages": [asdict(stage) | {"peak": stage.peak} for stage in plan.stages],
        "hours": [asdict(row) | {"class": row.label} for row in plan.hours],
        "changes": [asdict(change) for change in plan.changes],
    }
