"""Time and memory of a contrastive step: gradient cache, sentence-transformers and UME-R1, in the same run.

`make bench` runs it on one thread, in an environment that has the peers. The last line holds ratios of
seconds (medians over interleaved rounds) and of peak memory. `.._over_ours` above 1 means that ours is
faster.

- cached over plain: an SFT step whose texts find pictures, with 8 micro-batches per side and vision
  features kept, against one forward per side. Small tensors fit into the caches of a CPU, which favours
  our gradient cache. So the ratio to the same micro-batches in one graph is also printed: the cost of the
  second forward.
- sentence-transformers: its CachedMultipleNegativesRankingLoss with our backbone as its module. Both
  compute only the contrastive loss, on the same batch and micro-batch size, and run the vision tower
  twice.
- UME-R1 (arXiv 2511.00405): its SFT step, on pictures and texts of mixed lengths: one forward per side,
  padded to the longest row, with float32 logits at all positions. Ours is the SFT step with micro-batches
  of similar length in one graph (tokens without gradient cache). Both use gradient checkpointing, as with
  a 2B model. Also printed: the same without checkpointing, ours with one forward per side, UME-R1 with one
  per side *and* mode.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.miniature import (
    PICTURE_SIZE,
    PROPORTIONED,
    VOCABULARY,
    make_backbone,
    make_base,
    mixed_pairs,
    picture_pairs,
    silent,
)
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.losses.contrastive import info_nce
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.types import Batch, Pair, Prompts, Rows

TEMPERATURE = 0.02
CHUNKS = 8
MICRO_BATCH_TOKENS = 1024  # rows of similar length, in one graph
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64, help="Pairs in a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="Measured rounds (default: %(default)s)")
    parser.add_argument("--memory_of", choices=["ours", "plain", "ume_r1"], help="internal: step to measure")
    parser.add_argument("--keep_activations", action="store_true", help="internal: no gradient checkpointing")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(peak_of(args.memory_of, args.base, args.pairs, not args.keep_activations))
        return
    with tempfile.TemporaryDirectory(prefix="rime-bench-") as folder:
        base = make_base(Path(folder) / "mixed", PROPORTIONED, VOCABULARY)
        pictured = make_base(Path(folder) / "pictures", PROPORTIONED, VOCABULARY, PICTURE_SIZE)
        memory = {
            checkpointing: {
                name: in_a_process(name, base, args.pairs, checkpointing)
                for name in ("ours", "plain", "ume_r1")
            }
            for checkpointing in (True, False)
        }
        cached, ume_r1 = {}, {}
        for name, load_in_4bit in (("NF4", True), ("fp32", False)):
            backbone = make_backbone(pictured, load_in_4bit)
            cached[name] = measure(cached_steps, backbone, picture_pairs(args.pairs), args.rounds)
            for checkpointing in (True, False):
                backbone = make_backbone(base, load_in_4bit, checkpointing)
                pairs = mixed_pairs(args.pairs)
                ume_r1[name, checkpointing] = measure(ume_r1_steps, backbone, pairs, args.rounds)
    for name, seconds in cached.items():
        print(f"{name}: {in_words(seconds)}")
    for (name, checkpointing), seconds in ume_r1.items():
        print(f"{name}, {how(checkpointing)}: {in_words(seconds)}")
    for checkpointing, peaks in memory.items():
        words = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in peaks.items())
        print(f"peak above the imports, {how(checkpointing)}: {words}")
    for name, seconds in cached.items():
        ratio = seconds["cached"] / seconds["same micro-batches"]
        print(f"{name}: cached over the same micro-batches in one graph {ratio:.3f}")
        if "sentence-transformers" in seconds:
            ratio = seconds["sentence-transformers"] / seconds["contrastive, vision kept"]
            print(f"{name}: sentence-transformers over ours with the vision features kept {ratio:.3f}")
    for (name, checkpointing), seconds in ume_r1.items():
        ratio = seconds["ume_r1, per mode"] / seconds["ours"]
        print(f"{name}, {how(checkpointing)}: UME-R1 with a forward per side and mode over ours {ratio:.3f}")
    print("fp32: " + json.dumps(ratios(cached["fp32"], ume_r1["fp32", True], memory[True])))
    kept = ratios(cached["NF4"], ume_r1["NF4", False], memory[False])
    print(
        f"activations kept: UME-R1 over ours {kept['ume_r1_over_ours']}, memory {kept['memory_over_ume_r1']}"
    )
    print(json.dumps(ratios(cached["NF4"], ume_r1["NF4", True], memory[True])))


def how(checkpointing: bool) -> str:
    return "checkpointed" if checkpointing else "activations kept"


def in_words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{step} {value:.3f} s" for step, value in seconds.items())


def ratios(
    cached: dict[str, float], ume_r1: dict[str, float], memory: dict[str, int]
) -> dict[str, float | None]:
    peer = cached.get("sentence-transformers")
    return {
        "cached_over_plain": round(cached["cached"] / cached["plain"], 3),
        "sentence_transformers_over_ours": round(peer / cached["contrastive"], 3) if peer else None,
        "ume_r1_over_ours": round(ume_r1["ume_r1"] / ume_r1["ours"], 3),
        "memory_over_ume_r1": round(memory["ours"] / memory["ume_r1"], 3),
    }


def measure(
    make: Callable[[Backbone, Batch], dict[str, Step]],
    backbone: Backbone,
    pairs: list[Pair],
    rounds: int,
) -> dict[str, float]:
    """Return the median seconds of each step. Rounds are interleaved, so a busy machine slows all."""
    batch = backbone.processor.training_batch(pairs)
    steps = make(backbone, batch)
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            backbone.zero_grad(set_to_none=True)
            start = time.process_time()  # time of one thread, which other processes do not change
            step()
            if round_number:  # the first round only warms up
                seen[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


# -- ours -------------------------------------------------------------------------------------------------


def sft_step(backbone: Backbone, batch: Batch, micro: MicroBatchSettings = MicroBatchSettings()) -> Step:
    module = silent(SFTModule(backbone.config, micro_batches=micro), backbone)
    return lambda: module.backward(module.training_step(batch, 0))


def contrastive_step(backbone: Backbone, batch: Batch, reuse_vision: bool) -> Step:
    micro = MicroBatchSettings(size=len(batch) // CHUNKS, reuse_vision=reuse_vision)
    module = silent(SFTModule(backbone.config, micro_batches=micro), backbone)
    sides = [
        Rows(side.prompts, side.completions, torch.zeros_like(side.annotated))  # no labels
        for side in batch.sides
    ]

    def step() -> None:
        query, target = (module.encode(side) for side in sides)
        module.backward(info_nce(query.gen, target.gen, TEMPERATURE))

    return step


def cached_steps(backbone: Backbone, batch: Batch) -> dict[str, Step]:
    """Return the steps that show the cost of the gradient cache, ours and that of the peer."""
    rows = len(batch) // CHUNKS
    steps = {
        "plain": sft_step(backbone, batch),
        "same micro-batches": sft_step(backbone, batch, MicroBatchSettings(size=rows, gradient_cache=False)),
        "cached": sft_step(backbone, batch, MicroBatchSettings(size=rows)),
        "contrastive": contrastive_step(backbone, batch, reuse_vision=False),
        "contrastive, vision kept": contrastive_step(backbone, batch, reuse_vision=True),
    }
    if importlib.util.find_spec("sentence_transformers"):
        steps["sentence-transformers"] = sentence_transformers_step(backbone, batch)
    return steps


# -- sentence-transformers --------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Our backbone as a module of a SentenceTransformer: row numbers in, generative embeddings out."""

    def __init__(self, backbone: Backbone, sides: list[Rows]) -> None:
        super().__init__()
        self.backbone = backbone
        self.sides = sides

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        ids = features["input_ids"]  # (R, 2): side, row
        rows = self.sides[int(ids[0, 0])].select(ids[:, 1])
        embedding = self.backbone(rows.prompts, rows.completions).gen
        return {**features, "sentence_embedding": embedding}


def sentence_transformers_step(backbone: Backbone, batch: Batch) -> Step:
    """Return the cached loss of the peer, in both directions like ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    sides = [*batch.sides]
    model = SentenceTransformer(modules=[Encoder(backbone, sides)], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / TEMPERATURE,
        mini_batch_size=len(batch) // CHUNKS,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    # longest first, like ours; the peer sorts in its data loader
    orders = [side.lengths().sum(1).argsort(descending=True) for side in sides]
    features = [
        {"input_ids": torch.stack([torch.full_like(order, number), order], dim=1)}
        for number, order in enumerate(orders)
    ]

    def step() -> None:
        model.train()
        loss(features, torch.empty(0)).backward()

    return step


# -- UME-R1 -----------------------------------------------------------------------------------------------


def ume_r1_steps(backbone: Backbone, batch: Batch) -> dict[str, Step]:
    """Return the whole SFT step, ours and that of UME-R1."""
    ours = MicroBatchSettings(tokens=MICRO_BATCH_TOKENS, gradient_cache=False)
    return {
        "ours": sft_step(backbone, batch, ours),
        "plain": sft_step(backbone, batch),
        "ume_r1": lambda: ume_r1_step(backbone, batch, per_mode=False),
        "ume_r1, per mode": lambda: ume_r1_step(backbone, batch, per_mode=True),
    }


def ume_r1_step(backbone: Backbone, batch: Batch, per_mode: bool) -> None:
    """Run SFT like UME-R1: each side padded to its longest sequence, logits at all positions.

    Args:
        backbone, batch: Weights and data, the same as for our step.
        per_mode: Whether the discriminative embedding has its own forward, over the prompt only.
    """
    disc, gen, cross_entropy = [], [], []
    for side in batch.sides:
        ids, mask, labels, prompt_mask = padded(side)
        hidden = hidden_states(backbone, side.prompts, ids, mask)
        logits = backbone.language_model.lm_head(hidden).float()
        cross_entropy.append(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        )
        gen.append(pool_at(hidden, *first_position(ids, labels != -100, backbone.processor.gen_id)))
        if per_mode:
            hidden = hidden_states(backbone, side.prompts, ids, prompt_mask)
        disc.append(pool_at(hidden, *first_position(ids, prompt_mask, backbone.processor.disc_id)))
    loss = info_nce(*gen, TEMPERATURE) + info_nce(*disc, TEMPERATURE) + sum(cross_entropy)
    loss.backward()


def padded(side: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, mask, labels and mask of the prompt, with prompt and completion of a row together."""
    ids = torch.zeros(len(side), int(side.lengths().sum(1).max()), dtype=torch.int64)
    mask, prompt_mask, labels = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(len(side)):
        prompt = side.prompts.input_ids[row][side.prompts.attention_mask[row].bool()]
        completion = side.completions.ids[row][side.completions.mask[row].bool()]
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.cat([prompt, completion])
        labels[row, len(prompt) : end] = completion
        mask[row, :end], prompt_mask[row, : len(prompt)] = 1, 1
    return ids, mask, labels, prompt_mask


def hidden_states(backbone: Backbone, prompts: Prompts, ids: Tensor, mask: Tensor) -> Tensor:
    images = backbone.image_inputs(prompts, ids)
    model = backbone.language_model.model
    return model(input_ids=ids, attention_mask=mask, **images, use_cache=False).last_hidden_state


# -- memory -----------------------------------------------------------------------------------------------


def in_a_process(name: str, base: Path, pairs: int, checkpointing: bool) -> int:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-m", "benchmarks.contrastive_step", "--memory_of", name]
    command += ["--base", str(base), "--pairs", str(pairs)]
    command += [] if checkpointing else ["--keep_activations"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def peak_of(name: str, base: Path, pairs: int, checkpointing: bool) -> int:
    """Return the peak memory of one NF4 step above the imports, in bytes."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backbone = make_backbone(base, True, checkpointing)
    batch = backbone.processor.training_batch(mixed_pairs(pairs))
    ume_r1_steps(backbone, batch)[name]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) * 1024


if __name__ == "__main__":
    main()
