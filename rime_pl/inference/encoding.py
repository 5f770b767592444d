"""One batch through the model, in one mode or in both, and what that cost.

Called by the retriever. The meter is read by rime_pl/evaluation, whose tables set recall against cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.decoding import embed_completions, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.inference.batching import up_to
from rime_pl.types import Mode, Prompts

#: Given the numbers of R items and their discriminative embeddings (R, D), returns which get a rewrite, (R,)
#: bool.
Wanted = Callable[[Sequence[int], Tensor], Tensor]


@dataclass
class Meter:
    """What a model has done since the meter was made."""

    items: int = 0
    #: mode -> seconds until the vectors of these items were there. The media were opened before. In a pass of
    #: both modes the generative one counts as a whole, and the discriminative one to the end of the prompt.
    seconds: dict[Mode, float] = field(default_factory=dict)
    rewrite_tokens: int = 0

    def add(self, items: int, seconds: dict[Mode, float], rewrite_tokens: int) -> None:
        """Add a batch."""
        self.items += items
        self.rewrite_tokens += rewrite_tokens
        for mode, more in seconds.items():
            self.seconds[mode] = self.seconds.get(mode, 0.0) + more


def encode_batch(
    backbone: Backbone, prompts: Prompts, modes: Sequence[Mode], meter: Meter
) -> tuple[Tensor, list[str]]:
    """Return the embeddings of R prompts and the rewrites that the model wrote.

    Args:
        backbone: In eval mode; gradients are off.
        prompts: R prompts on any device.
        modes: Modes of the embeddings. With ``generative`` the prompt is read once for all.
        meter: Where the batch is counted.

    Returns:
        (R, modes, D) float32 on the CPU, L2-normalised, and R rewrites, empty without the generative mode.
    """
    began = time.perf_counter()
    prompts = prompts.to(next(backbone.parameters()).device)
    if "generative" not in modes:
        vectors = backbone(up_to(prompts, backbone.processor.disc_id)).disc.float().cpu()
        meter.add(len(prompts), {"discriminative": time.perf_counter() - began}, 0)
        return vectors.unsqueeze(1), [""] * len(prompts)
    read = prefill(backbone, prompts, 1)
    found: dict[Mode, Tensor] = {}
    seconds: dict[Mode, float] = {}
    if "discriminative" in modes:
        found["discriminative"] = read.disc.float().cpu()  # waits for the device
        seconds["discriminative"] = time.perf_counter() - began
    written = write_rewrites(backbone, prompts, state=read)
    found["generative"] = embed_completions(backbone, read, written.completions).float().cpu()
    rewrites = backbone.processor.decode(written.completions)
    seconds["generative"] = time.perf_counter() - began
    meter.add(len(prompts), seconds, int(written.lengths.sum()))
    return torch.stack([found[mode] for mode in modes], dim=1), rewrites


def encode_where(
    backbone: Backbone, prompts: Prompts, wanted: Callable[[Tensor], Tensor], meter: Meter
) -> tuple[Tensor, list[str]]:
    """Return both embeddings of R prompts, where only some are worth a rewrite; each prompt is read once.

    Args:
        backbone: In eval mode; gradients are off.
        prompts: R prompts on any device.
        wanted: Given the discriminative embeddings (R, D), returns which prompts get a rewrite, (R,) bool.
        meter: Where the batch is counted.

    Returns:
        (R, 2, D) float32 on the CPU, discriminative and generative; the latter is 0 without a rewrite. And R
        rewrites, empty where there is none.
    """
    began = time.perf_counter()
    prompts = prompts.to(next(backbone.parameters()).device)
    read = prefill(backbone, prompts, 1)
    disc = read.disc.float().cpu()
    seconds: dict[Mode, float] = {"discriminative": time.perf_counter() - began}
    gen, rewrites, tokens = torch.zeros_like(disc), [""] * len(prompts), 0
    rows = wanted(disc).nonzero().flatten()
    if len(rows):
        chosen = read.select(rows.to(read.disc.device)) if len(rows) < len(prompts) else read
        written = write_rewrites(backbone, prompts, state=chosen)
        gen[rows] = embed_completions(backbone, chosen, written.completions).float().cpu()
        for row, text in zip(rows.tolist(), backbone.processor.decode(written.completions), strict=True):
            rewrites[row] = text
        tokens = int(written.lengths.sum())
    seconds["generative"] = time.perf_counter() - began
    meter.add(len(prompts), seconds, tokens)
    return torch.stack([disc, gen], dim=1), rewrites
