"""What the gradient cache costs in time, and whether a large batch fits into the memory of a micro-batch.

A part of `rime gpu-check`; docs/how-to/large-batches.md says what the cache is for.
"""

from __future__ import annotations

import torch

from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part
from rime_pl.preflight.gpu.watch import tensors_of
from rime_pl.types import Batch

NUM_MICRO_BATCHES = 8


def cache(bench: Bench, out: Part) -> None:
    """The same batch at once and in micro-batches; then one that is too large to be taken at once."""
    with out.attempt("cached and plain"):
        _overhead(bench, out)
    with out.attempt("large batch"):
        _large_batch(bench, out)


def _overhead(bench: Bench, out: Part) -> None:
    pairs = bench.amounts.cached_pairs
    batch = bench.batch(pairs)
    plain = bench.fit(SFTModule(bench.config(), warmup_steps=0), batch)
    out.add("pairs", "pairs of a step", pairs)
    out.add("plain_seconds", "a plain step of SFT", plain.seconds, "s")
    out.add("plain_peak_bytes", "peak of the plain step", plain.step_peak, "bytes")
    rows = pairs // NUM_MICRO_BATCHES
    cached = bench.fit(_module(bench, rows), batch)
    out.add("micro_batches", "micro-batches of a side", NUM_MICRO_BATCHES)
    out.add("cached_seconds", "a cached step", cached.seconds, "s")
    out.add("cached_peak_bytes", "peak of the cached step", cached.step_peak, "bytes")
    ratio = cached.seconds / plain.seconds if cached.seconds and plain.seconds else None
    out.add("cached_over_plain", "seconds, cached over plain", ratio, "ratio")
    difference = cached.losses[0] / plain.losses[0] - 1
    out.add(
        "loss_difference", "first loss, cached over plain, minus 1", difference, shown=f"{difference:.1e}"
    )


def _large_batch(bench: Bench, out: Part) -> None:
    rows, pairs = bench.amounts.large_rows, bench.amounts.large_pairs
    small_batch, large_batch = bench.batch(rows), bench.batch(pairs)
    small = bench.fit(_module(bench, rows), small_batch, num_steps=1)
    large = bench.fit(_module(bench, rows), large_batch, num_steps=1)
    out.add("large_pairs", "pairs of a large step", pairs)
    out.add("large_rows", "rows of its micro-batches", rows)
    out.add("large_seconds", "a large step, the first", large.seconds, "s")
    out.add("large_peak_bytes", "peak of a large step", large.step_peak, "bytes")
    out.add("small_peak_bytes", "peak of a step of one micro-batch", small.step_peak, "bytes")
    grows = growing_bytes(bench, large_batch)
    out.add("growing_bytes", "of the large peak: inputs, vision features, embeddings", grows, "bytes")
    growth = None
    if large.step_peak is not None and small.step_peak is not None:
        growth = (large.step_peak - grows) / (small.step_peak - growing_bytes(bench, small_batch))
    out.add("growth", "peaks without these, large over one micro-batch", growth, "ratio")


def _module(bench: Bench, rows: int) -> SFTModule:
    return SFTModule(bench.config(), warmup_steps=0, micro_batch_size=rows, reuse_vision=True)


def growing_bytes(bench: Bench, batch: Batch) -> int:
    """What has to grow with the batch: the batch itself, its vision features, embeddings and their gradients.

    Both embeddings of both sides are float32; features have the type of the backbone and the decoder's width.
    """
    width, itemsize = bench.shape.hidden_size, getattr(torch, bench.config().dtype).itemsize
    inputs = sum(tensor.nbytes for tensor in tensors_of(batch))
    ids = (batch.query.prompts.input_ids, batch.target.prompts.input_ids)
    visual_tokens = sum(int((rows == bench.processor.image_id).sum()) for rows in ids)
    embeddings = 2 * 4 * len(batch) * width * torch.float32.itemsize
    return inputs + visual_tokens * width * itemsize + embeddings
