"""Pairs and tokens a second of each stage, and milliseconds of an embedding; a part of `rime gpu-check`.

The stages' seconds are those of their own parts, which run here if they have not run before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part
from rime_pl.preflight.gpu.stages import STAGES, run_stage
from rime_pl.preflight.gpu.watch import now
from rime_pl.types import Batch

NUM_REPEATS = 3


def throughput(bench: Bench, out: Part) -> None:
    """Training, then embedding."""
    tokens = num_tokens(bench.batch(bench.num_pairs))
    for stage in STAGES:
        with out.attempt(stage):
            seconds = run_stage(bench, stage).step_seconds[-1]
            _rates(out, stage, bench.num_pairs / seconds, "tokens", tokens / seconds)
    with out.attempt("refine_rl"):
        seen, amounts = run_stage(bench, "refine_rl"), bench.amounts
        rewrites = 2 * amounts.rl_pairs * amounts.num_generations  # of both sides
        written = rewrites * seen.logged["train/rewrite_length"]
        seconds = seen.step_seconds[-1]
        _rates(out, "refine_rl", amounts.rl_pairs / seconds, "written tokens", written / seconds)
    with out.attempt("embedding"):
        _embedding(bench, out)


def _rates(out: Part, stage: str, pairs: float, words: str, tokens: float) -> None:
    out.add(f"{stage}_pairs_per_second", f"{stage}: pairs a second", pairs, "per second")
    out.add(f"{stage}_tokens_per_second", f"{stage}: {words} a second", tokens, "per second")


def num_tokens(batch: Batch) -> int:
    """Of both sides, prompts and rewrites, visual tokens included and padding left out."""
    return sum(int(side.lengths().sum()) for side in (batch.query, batch.target))


@torch.no_grad()
def _embedding(bench: Bench, out: Part) -> None:
    """Queries with a picture, from tokens and patches on the device; as in ``RimeModule.evaluate``."""
    backbone = Backbone(bench.config(), bench.processor, bench.device).eval()
    prompts = bench.batch(bench.num_pairs).query.prompts.to(bench.device)
    lengths: list[Tensor] = []

    def discriminative() -> None:
        backbone(prompts)

    def generative() -> None:
        written = write_rewrites(backbone, prompts, bench.amounts.new_tokens)
        backbone(prompts, written.completions)
        lengths.append(written.lengths)

    items = len(prompts)
    out.add("items", "items embedded together", items)
    each = 1000 / items
    out.add("disc_ms", "discriminative: an embedding", each * _median(discriminative, bench.device), "ms")
    out.add(
        "gen_ms", "generative, writing included: an embedding", each * _median(generative, bench.device), "ms"
    )
    mean = float(torch.cat(lengths).float().mean())
    out.add("gen_tokens", "tokens written for it, mean", mean, "ratio")


def _median(work: Callable[[], None], device: torch.device) -> float:
    """Seconds; once before to warm up."""
    work()
    seconds = []
    for _ in range(NUM_REPEATS):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return statistics.median(seconds)
