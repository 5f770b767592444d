"""A training batch to plan for: the longest pairs of the corpus, or made-up tokens where there is none.

Called by planning.py and predict.py. Pixel values have a shape alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rime_pl.datamodules.batch_plan import plan_training
from rime_pl.datamodules.shards import CORPUS_FILE, Entry, ShardReader, read_split
from rime_pl.preflight.plan.weightless import read_processor
from rime_pl.preflight.settings import RunSettings
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Completions, Prompts, Rows

#: Pairs of each task that are tokenised to find the longest.
SAMPLE = 32
#: Words of an item, and of the chat layout around it, where no corpus is at hand.
PROMPT_TOKENS = 64


def take(batch: Batch, rows: Tensor) -> Batch:
    """Return the given pairs of a batch; repeats are allowed."""
    return Batch(
        query=batch.query.select(rows),
        target=batch.target.select(rows),
        query_content=batch.query_content[rows],
        target_content=batch.target_content[rows],
        dataset=batch.dataset,
    )


def longest_first(batch: Batch) -> Tensor:
    """Return the row numbers in order of tokens, both sides together."""
    return (batch.query.lengths() + batch.target.lengths()).sum(1).argsort(descending=True, stable=True)


def num_tokens(batch: Batch) -> int:
    """Return the tokens of both sides, padding counted."""
    sides = (batch.query, batch.target)
    return sum(side.prompts.input_ids.numel() + side.completions.ids.numel() for side in sides)


def without_pixels(batch: Batch) -> Batch:
    """Return the batch with the shapes of its pixel values, so that a large one takes no memory."""

    def drop(side: Rows) -> Rows:
        pixels = side.prompts.pixel_values
        empty = None if pixels is None else pixels.to("meta")
        return replace(side, prompts=replace(side.prompts, pixel_values=empty))

    return replace(batch, query=drop(batch.query), target=drop(batch.target))


def planned_batch(
    settings: RunSettings, architecture: PretrainedConfig, image_tokens: int, rewrite_tokens: int | None
) -> tuple[Batch, str]:
    """Return one process's batch, and in words where its lengths are from.

    Args:
        settings: Of the run.
        architecture: Of the checkpoint.
        image_tokens: Visual tokens of each item, where there is no corpus or no tokenizer.
        rewrite_tokens: Tokens of each rewrite, likewise; None: the budget.
    """
    processor = read_processor(settings.backbone, architecture)
    path = settings.values.data.path
    if isinstance(processor, RimeProcessor) and (Path(path) / CORPUS_FILE).is_file():
        source = f"read from {path}, the longest of {SAMPLE} pairs a task, the longest task"
        return corpus_batch(settings, processor), source
    rewrite = rewrite_tokens or settings.backbone.prompt.max_rewrite_tokens
    side = assumed_rows(processor, architecture, settings.local_rows, image_tokens, rewrite)
    sizes = f"{PROMPT_TOKENS} words, {image_tokens} visual tokens, {rewrite} of rewrite"
    contents = torch.arange(settings.local_rows)
    return Batch(side, side, contents, contents, "assumed"), f"assumed on each side: {sizes}"


def corpus_batch(settings: RunSettings, processor: RimeProcessor) -> Batch:
    """Return the longest pairs of the task whose batches are longest, some pairs of each being tokenised."""
    entries, data = training_entries(settings), settings.values.data
    reader = ShardReader(entries, data.require_rewrites, data.written)
    batches = []
    for task in sorted({entry.dataset for entry in entries}):
        places = [n for n, entry in enumerate(entries) if entry.dataset == task]
        chosen = places[:: max(1, len(places) // SAMPLE)][:SAMPLE]
        batch = without_pixels(processor.training_batch([reader.read(place) for place in chosen]))
        rows = longest_first(batch)[torch.arange(settings.local_rows) % len(batch)]
        batches.append(take(batch, rows))
    return max(batches, key=num_tokens)


def assumed_rows(
    processor: RimeProcessor, architecture: PretrainedConfig, rows: int, image_tokens: int, rewrite: int
) -> Rows:
    """Return one side of a batch: a picture, some words and a rewrite in each row; the first is shorter."""
    vision = architecture.vision_config
    ids = torch.zeros(rows, PROMPT_TOKENS + image_tokens, dtype=torch.int64)
    ids[:, -1] = processor.disc_id
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # so that there is a padding mask, as in any real batch
    pixels = grid = None
    if image_tokens:
        ids[:, 1 : 1 + image_tokens] = processor.image_id
        high = max(n for n in range(1, math.isqrt(image_tokens) + 1) if image_tokens % n == 0)
        merge = vision.spatial_merge_size
        grid = torch.tensor([[1, merge * high, merge * image_tokens // high]]).repeat(rows, 1)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(int(grid.prod(-1).sum()), width, device="meta")
    written = torch.zeros(rows, rewrite + 2, dtype=torch.int64)
    written[:, -2], written[:, -1] = processor.gen_id, processor.turn_end_id
    images = torch.full((rows,), int(image_tokens > 0))
    return Rows(
        Prompts(ids, mask, pixels, grid, images),
        Completions(written, torch.ones_like(written)),
        torch.ones(rows, dtype=torch.bool),
    )


def training_entries(settings: RunSettings) -> list[Entry]:
    """Return the training pairs that the run takes."""
    data = settings.values.data
    return [e for e in read_split(data.path, "train") if data.tasks is None or e.dataset in data.tasks]


def count_steps(settings: RunSettings) -> int | None:
    """Return the optimiser steps of the run, where settings or corpus say it."""
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
        length = len(plan_training(training_entries(settings), data.batch_size, 0, *shares)[1])
    return int(length * trainer.max_epochs)
