"""What a step costs: cached against plain, and against two peers on the same weights and batch, in one run.

`make bench` runs it in the peers' own environment, on one thread. Last line: ratios of seconds, medians
over interleaved rounds, and of peak memory. > 1 in `.._over_ours` means that ours is faster.

- cached over plain: SFT step, 8 micro-batches a side, vision features kept, over the same batch in one
  forward a side.
- sentence-transformers: its CachedMultipleNegativesRankingLoss, contrastive alone, with our backbone as its
  module, same micro-batch size, against our cache with the vision tower run twice as it does.
- the ancestor's recipe: a forward per side, both sides padded to the longest sequence, logits at all
  positions in float32; the variant with one forward per side *and* mode is printed beside it. Against our
  plain SFT step.
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

from benchmarks.miniature import PROPORTIONED, VOCABULARY, make_backbone, make_base, mixed_pairs, silent
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.losses.contrastive import info_nce
from rime_pl.modules.sft import SFTModule
from rime_pl.types import Batch, Prompts, Rows

TEMPERATURE = 0.02
CHUNKS = 8
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_of", choices=["plain", "ancestor"], help="used by itself, in a process")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(peak_of(args.memory_of, args.base, args.pairs))
        return
    with tempfile.TemporaryDirectory(prefix="rime-bench-") as folder:
        base = make_base(Path(folder), PROPORTIONED, VOCABULARY)
        memory = {name: in_a_process(name, base, args.pairs) for name in ("plain", "ancestor")}
        nf4, fp32 = (measure(base, bits, args.pairs, args.rounds) for bits in (True, False))
    for name, seconds in (("NF4", nf4), ("fp32", fp32)):
        print(f"{name}: " + ", ".join(f"{step} {value:.3f} s" for step, value in seconds.items()))
    print(f"peak above the imports: { ({n: f'{b / 2**20:.0f} MiB' for n, b in memory.items()}) }")
    print("fp32: " + json.dumps(ratios(fp32, memory)))
    print(
        "the ancestor with a forward per side and mode: "
        + json.dumps(
            {n: round(s["ancestor, per mode"] / s["plain"], 3) for n, s in (("nf4", nf4), ("fp32", fp32))}
        )
    )
    print(json.dumps(ratios(nf4, memory)))


def ratios(seconds: dict[str, float], memory: dict[str, int]) -> dict[str, float | None]:
    peer = seconds.get("sentence-transformers")
    return {
        "cached_over_plain": round(seconds["cached"] / seconds["plain"], 3),
        "sentence_transformers_over_ours": round(peer / seconds["contrastive"], 3) if peer else None,
        "ancestor_over_ours": round(seconds["ancestor"] / seconds["plain"], 3),
        "memory_over_ancestor": round(memory["plain"] / memory["ancestor"], 3),
    }


def measure(base: Path, load_in_4bit: bool, pairs: int, rounds: int) -> dict[str, float]:
    """Median seconds of each step; rounds are interleaved, so that a busy machine hits all alike."""
    backbone = make_backbone(base, load_in_4bit)
    batch = backbone.processor.training_batch(mixed_pairs(pairs))
    steps = our_steps(backbone, batch) | ancestor_steps(backbone, batch)
    if importlib.util.find_spec("sentence_transformers"):
        steps["sentence-transformers"] = sentence_transformers_step(backbone, batch)
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            backbone.zero_grad(set_to_none=True)
            start = time.process_time()  # of one thread: what others do to this machine does not count
            step()
            if round_number:  # the first warms up
                seen[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


# -- ours -------------------------------------------------------------------------------------------------


def our_steps(backbone: Backbone, batch: Batch) -> dict[str, Step]:
    rows = len(batch) // CHUNKS
    plain = silent(SFTModule(backbone.config), backbone)
    cached = silent(SFTModule(backbone.config, micro_batch_size=rows), backbone)
    twice = silent(SFTModule(backbone.config, micro_batch_size=rows, reuse_vision=False), backbone)
    unlabelled = [without_labels(side) for side in (batch.query, batch.target)]

    def contrastive() -> None:
        query, target = (twice.encode(side) for side in unlabelled)
        twice.backward(info_nce(query.gen, target.gen, TEMPERATURE))

    return {
        "plain": lambda: plain.backward(plain.training_step(batch, 0)),
        "cached": lambda: cached.backward(cached.training_step(batch, 0)),
        "contrastive": contrastive,
    }


def without_labels(rows: Rows) -> Rows:
    return Rows(rows.prompts, rows.completions, torch.zeros_like(rows.annotated))


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
    """The peer's cached loss in both directions, as ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    sides = [batch.query, batch.target]
    model = SentenceTransformer(modules=[Encoder(backbone, sides)], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / TEMPERATURE,
        mini_batch_size=len(batch) // CHUNKS,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    # longest first, as ours takes them: the peer sorts in its data loader
    orders = [side.lengths().sum(1).argsort(descending=True) for side in sides]
    features = [
        {"input_ids": torch.stack([torch.full_like(order, number), order], dim=1)}
        for number, order in enumerate(orders)
    ]

    def step() -> None:
        model.train()
        loss(features, torch.empty(0)).backward()

    return step


# -- the ancestor's recipe --------------------------------------------------------------------------------


def ancestor_steps(backbone: Backbone, batch: Batch) -> dict[str, Step]:
    return {
        "ancestor": lambda: ancestor_step(backbone, batch, per_mode=False),
        "ancestor, per mode": lambda: ancestor_step(backbone, batch, per_mode=True),
    }


def ancestor_step(backbone: Backbone, batch: Batch, per_mode: bool) -> None:
    """SFT as its ancestor takes it: everything padded to the longest sequence, logits at all positions.

    Args:
        per_mode: A forward of its own for the discriminative embedding, over the prompt alone.
    """
    longest = max(int(side.lengths().sum(1).max()) for side in (batch.query, batch.target))
    disc, gen, cross_entropy = [], [], []
    for side in (batch.query, batch.target):
        ids, mask, labels, prompt_mask = padded(side, longest)
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


def padded(side: Rows, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt and completion of each row together, right-padded: ids, mask, labels, mask of the prompt."""
    ids = torch.zeros(len(side), length, dtype=torch.int64)
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


def in_a_process(name: str, base: Path, pairs: int) -> int:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-m", "benchmarks.contrastive_step", "--memory_of", name]
    command += ["--base", str(base), "--pairs", str(pairs)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=env, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def peak_of(name: str, base: Path, pairs: int) -> int:
    """Peak of one NF4 step above the imports, in bytes."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backbone = make_backbone(base, load_in_4bit=True)
    batch = backbone.processor.training_batch(mixed_pairs(pairs))
    (our_steps(backbone, batch) | ancestor_steps(backbone, batch))[name]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) * 1024


if __name__ == "__main__":
    main()
