"""Time and memory of a contrastive step: gradient cache, sentence-transformers and UME-R1, in the same run.

`make bench` runs it on one thread, in an environment that has the peers. The model is a Qwen2-VL in the
proportions of the 2B model (miniature.py). The last line holds ratios of CPU seconds (medians over rounds,
in which all steps take turns) and of memory, for NF4 without LoRA dropout. `.._over_ours` above 1 means that
ours is faster. The lines above hold the same with a LoRA dropout of 0.05, and with a float32 base model.

- cached over plain: an SFT step whose texts find pictures, with 8 micro-batches per side and vision
  features kept, against one forward per side. Small tensors fit into the caches of a CPU, which favours
  our gradient cache. So the ratio to the same micro-batches in one graph is also printed: the cost of the
  second forward.
- sentence-transformers: its CachedMultipleNegativesRankingLoss over the forward of transformers, with rows
  padded as it pads them, over our cached step with vision features kept. Both compute only the contrastive
  loss, on the same batch and micro-batch size; LoRA, patch embedding and attention of the pictures are ours
  in both. Also printed: the same loss with our whole backbone as its module, which differs from our step
  only in the vision features, and ours with the vision tower run twice, as theirs does.
- UME-R1 (arXiv 2511.00405): its SFT step, on pictures and texts of mixed lengths: one forward per side,
  padded to the longest row, float32 logits at all positions, and a gradient through the frozen vision tower,
  which transformers asks for in a Qwen2-VL with gradient checkpointing. LoRA, patch embedding and attention
  of the pictures are ours in both. Ours is the SFT step with micro-batches of similar length in one graph
  (tokens without gradient cache). Also printed: UME-R1 without the gradient through the tower, ours with one
  forward per side, and all of them without checkpointing.
- memory: bytes of the tensors that the step makes, at its peak: activations, logits and gradients.
- utilisation: FLOPs per second of our step over those of a matrix product, by the same formulas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.miniature import (
    RANK,
    make_backbone,
    make_proportioned,
    mixed_pairs,
    picture_pairs,
    silent,
)
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.losses.contrastive import info_nce
from rime_pl.metrics.flops import product_flops_per_second
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.types import Batch, Pair, Prompts, Rows
from tests.gpu.watch import standing_tensors

TEMPERATURE = 0.02
CHUNKS = 8
ON_OURS = "sentence-transformers, our backbone"
MICRO_BATCH_TOKENS = 1024  # rows of similar length, in one graph
MIB = 2**20
#: Name -> 4-bit base model, LoRA dropout. The last line holds the ratios of the first.
SETTINGS = {
    "NF4, dropout 0": (True, 0.0),
    "NF4, dropout 0.05": (True, 0.05),
    "fp32, dropout 0": (False, 0.0),
}
Step = Callable[[], object]
#: Name of a step -> its CPU seconds in each round.
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=32,
        help="Pairs in a batch, twice as many with the cache (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="Settings (default: all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline: list[dict[str, float | None]] = []
    with tempfile.TemporaryDirectory(prefix="rime-bench-") as folder:
        base = make_proportioned(Path(folder) / "base")
        for name in args.only:
            bits, dropout = SETTINGS[name]
            backbone = make_backbone(base, bits, lora_dropout=dropout, lora_r=RANK)
            ratios = cached_ratios(name, backbone, 2 * args.pairs, args.rounds)
            if not headline:
                backbone = make_backbone(base, bits, lora_dropout=dropout, lora_r=RANK)
                ume_r1_ratios(f"{name}, activations kept", backbone, args.pairs, args.rounds)
            backbone = make_backbone(base, bits, True, lora_dropout=dropout, lora_r=RANK)
            ratios |= ume_r1_ratios(f"{name}, checkpointed", backbone, args.pairs, args.rounds)
            print(f"{name}: {json.dumps(ratios)}", flush=True)
            headline.append(ratios)
    print(json.dumps(headline[0]))


def cached_ratios(name: str, backbone: Backbone, pairs: int, rounds: int) -> dict[str, float | None]:
    """Print the steps that show the cost of the gradient cache, and return the two ratios."""
    seconds = measure(cached_steps, backbone, picture_pairs(pairs), rounds)
    print(f"{name}, pictures: {in_words(seconds)}", flush=True)
    own = ratio(seconds, "cached", "same micro-batches")
    print(f"{name}: cached over the same micro-batches in one graph {own:.3f}")
    found: dict[str, float | None] = {"cached_over_plain": round(ratio(seconds, "cached", "plain"), 3)}
    peer, ours = "sentence-transformers", "contrastive, vision kept"
    if peer in seconds:
        print(f"{name}: {peer} over ours, {spread(seconds, peer, ours)}")
        print(f"{name}: its loss on our backbone over ours, {spread(seconds, ON_OURS, ours)}")
        print(f"{name}: the same with our tower run twice, {spread(seconds, ON_OURS, 'contrastive')}")
    found["sentence_transformers_over_ours"] = (
        round(ratio(seconds, peer, ours), 3) if peer in seconds else None
    )
    return found


def ume_r1_ratios(name: str, backbone: Backbone, pairs: int, rounds: int) -> dict[str, float | None]:
    """Print the SFT steps, ours and those of UME-R1, and return the ratios of time and memory."""
    seconds = measure(ume_r1_steps, backbone, mixed_pairs(pairs), rounds)
    print(f"{name}: {in_words(seconds)}", flush=True)
    batch = backbone.processor.training_batch(mixed_pairs(pairs))
    lives = {step: counted(run, backbone, batch) for step, run in ume_r1_steps(backbone, batch).items()}
    peaks = {step: live.peak.total() for step, live in lives.items()}
    print(f"{name}: " + ", ".join(f"{step} {size / MIB:.1f} MiB" for step, size in peaks.items()))
    product = product_flops_per_second(torch.device("cpu"), torch.float32)
    for step in ("ours", "ume_r1"):
        share = lives[step].flops / statistics.median(seconds[step]) / product
        print(f"{name}: utilisation of {step} {share:.2f} ({lives[step].flops / 1e9:.0f} GFLOP in a step)")
    for step in [step for step in seconds if step.startswith("ume_r1")]:
        print(f"{name}: {step} over ours, {spread(seconds, step, 'ours')}", flush=True)
    return {
        "ume_r1_over_ours": round(ratio(seconds, "ume_r1", "ours"), 3),
        "memory_over_ume_r1": round(peaks["ours"] / peaks["ume_r1"], 3),
    }


def in_words(seconds: Seconds) -> str:
    return ", ".join(f"{step} {statistics.median(values):.3f} s" for step, values in seconds.items())


def quotients(seconds: Seconds, above: str, below: str) -> list[float]:
    """Return the quotients of two steps, one for each round."""
    return [one / other for one, other in zip(seconds[above], seconds[below], strict=True)]


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """Return the median of the quotients of each round: a slow minute slows both steps of a round."""
    return statistics.median(quotients(seconds, above, below))


def spread(seconds: Seconds, above: str, below: str) -> str:
    """Return median, lowest and highest quotient in words."""
    found = quotients(seconds, above, below)
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def measure(
    make: Callable[[Backbone, Batch], dict[str, Step]],
    backbone: Backbone,
    pairs: list[Pair],
    rounds: int,
) -> Seconds:
    """Return the CPU seconds of each step. Steps take turns, so a busy machine slows all."""
    batch = backbone.processor.training_batch(pairs)
    steps = make(backbone, batch)
    seen: Seconds = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            backbone.zero_grad(set_to_none=True)
            start = time.process_time()  # time of one thread, which other processes do not change
            step()
            if round_number:  # the first round only warms up
                seen[name].append(time.process_time() - start)
    return seen


def counted(step: Step, backbone: Backbone, batch: Batch) -> LiveBytes:
    """Return the bytes of the tensors that a step makes, without weights and inputs, and its FLOPs."""
    backbone.zero_grad(set_to_none=True)
    with LiveBytes(standing_tensors(backbone, [], batch)) as live:
        step()
    return live


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
        steps[ON_OURS] = sentence_transformers_step(backbone, batch, ours=True)
    return steps


# -- sentence-transformers --------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A module of a SentenceTransformer: row numbers in, generative embeddings out.

    Args:
        backbone: The model.
        sides: The rows that numbers stand for.
        ours: Whether our backbone reads the rows; otherwise the model of transformers, padded.
    """

    def __init__(self, backbone: Backbone, sides: list[Rows], ours: bool) -> None:
        super().__init__()
        self.backbone, self.sides, self.ours = backbone, sides, ours

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        ids = features["input_ids"]  # (R, 2): side, row
        rows = self.sides[int(ids[0, 0])].select(ids[:, 1])
        if self.ours:
            return {**features, "sentence_embedding": self.backbone(rows.prompts, rows.completions).gen}
        token_ids, mask, _labels, _prompt_mask = padded(rows)
        hidden = hidden_states(self.backbone, rows.prompts, token_ids, mask)
        place = first_position(token_ids, mask, self.backbone.processor.gen_id)
        return {**features, "sentence_embedding": pool_at(hidden, *place)}


def sentence_transformers_step(backbone: Backbone, batch: Batch, ours: bool = False) -> Step:
    """Return the cached loss of the peer, in both directions like ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    sides = [*batch.sides]
    model = SentenceTransformer(modules=[Encoder(backbone, sides, ours)], device="cpu")
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
        "ume_r1": lambda: ume_r1_step(backbone, batch),
        "ume_r1, no gradient in the tower": lambda: ume_r1_step(backbone, batch, tower=False),
    }


@contextmanager
def input_gradients(model: Any) -> Iterator[None]:
    """Ask for gradients of the inputs, as PEFT and the trainer of transformers do with checkpointing.

    In a Qwen2-VL the patch embedding is an input, too, so the frozen tower gets a backward pass.
    """
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()


def ume_r1_step(backbone: Backbone, batch: Batch, tower: bool = True) -> None:
    """Run SFT like UME-R1: each side padded to its longest sequence, logits at all positions.

    Args:
        backbone, batch: Weights and data, the same as for our step.
        tower: Whether a gradient goes through the vision tower where activations are recomputed.
    """
    if tower and backbone.config.gradient_checkpointing:
        with input_gradients(backbone.language_model):
            return ume_r1_step(backbone, batch, tower=False)
    disc, gen, cross_entropy = [], [], []
    for side in batch.sides:
        ids, mask, labels, prompt_mask = padded(side)
        hidden = hidden_states(backbone, side.prompts, ids, mask)
        logits = backbone.language_model.lm_head(hidden).float()
        cross_entropy.append(
            F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        )
        gen.append(pool_at(hidden, *first_position(ids, labels != -100, backbone.processor.gen_id)))
        disc.append(pool_at(hidden, *first_position(ids, prompt_mask, backbone.processor.disc_id)))
    loss = torch.stack(cross_entropy).sum()
    for query, target in (gen, disc):
        loss = loss + info_nce(query, target, TEMPERATURE)
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
    media = backbone.media_inputs(prompts) | backbone.layout(prompts, ids)
    model = backbone.language_model.model
    return model(input_ids=ids, attention_mask=mask, **media, use_cache=False).last_hidden_state


if __name__ == "__main__":
    main()
