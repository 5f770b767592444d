"""Embeddings that sampled rewrites are compared with: the anchors of Refine-RL, by the frozen reference.

Used by modules/refine_rl.py, with the reference's values in the model. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone, MediaFeatures
from rime_pl.generation.decoding import embed_completions, join_states, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.scoring import SampledPart, cut_parts
from rime_pl.modules.settings import AnchorKind, RolloutSettings
from rime_pl.types import Batch, Prompts, Side


def anchors_of(
    kind: AnchorKind,
    backbone: Backbone,
    batch: Batch,
    rollouts: RolloutSettings,
    sides: Sequence[Side] = ("query", "target"),
    parts: Sequence[SampledPart] = (),
) -> dict[Side, Tensor]:
    """Return :func:`anchor_vectors` of the given sides of B pairs, (B, D) each.

    Args:
        parts: What was sampled of the batch, if anything: their pictures are not read again.
    """
    found = {}
    for side in sides:
        prompts = (batch.query if side == "query" else batch.target).prompts
        images = [part.images for part in parts if part.side == side]
        found[side] = anchor_vectors(kind, backbone, prompts, rollouts, images)
    return found


@torch.no_grad()
def anchor_vectors(
    kind: AnchorKind,
    backbone: Backbone,
    prompts: Prompts,
    rollouts: RolloutSettings,
    images: Sequence[MediaFeatures | None] = (),
) -> Tensor:
    """Return the embeddings (R, D) of items that rewrites of the other side are compared with.

    They are discriminative ones, or with ``greedy`` the generative ones of the model's own greedy rewrites:
    anchors of the other mode that stand still as well. This control tells whether discriminative anchors help
    because they are discriminative, or because they do not move. Paper: the control is ours.

    Args:
        kind: "rollouts" are of the batch; their table, and what people read, is discriminative.
        backbone: The frozen reference.
        prompts: R items.
        rollouts: Bounds of a pass and of the passes that are written together, and the budget of a greedy
            rewrite, as of the sampled ones.
        images: Features of the vision tower, of each pass; none to read the pictures here.
    """
    cuts = cut_parts(len(prompts), rollouts.items_per_pass)
    passes = list(zip(cuts, images or [None] * len(cuts), strict=True))
    if kind != "greedy":
        read = [backbone(_rows(prompts, rows), features=seen).disc for rows, seen in passes]
        return torch.cat(read)
    training = backbone.training
    backbone.eval()  # in training mode, gradient checkpointing discards the cache of keys and values
    try:
        together = rollouts.passes_per_sampling or len(passes)
        written = [passes[first : first + together] for first in range(0, len(passes), together)]
        return torch.cat([_greedy(backbone, prompts, some, rollouts.max_new_tokens) for some in written])
    finally:
        backbone.train(training)


def _greedy(
    backbone: Backbone,
    prompts: Prompts,
    passes: Sequence[tuple[Tensor, MediaFeatures | None]],
    max_new_tokens: int | None,
) -> Tensor:
    """Return the embeddings of greedy rewrites of some rows: read pass by pass, written together."""
    rows = torch.cat([some for some, _ in passes])
    read = join_states([prefill(backbone, _rows(prompts, some), 1, seen) for some, seen in passes])
    written = write_rewrites(backbone, _rows(prompts, rows), max_new_tokens, state=read).completions
    if len(passes) == 1:
        return embed_completions(backbone, read, written)
    places = torch.arange(len(rows), device=written.ids.device).split([len(some) for some, _ in passes])
    return torch.cat([embed_completions(backbone, read.select(at), written.select(at)) for at in places])


def _rows(prompts: Prompts, rows: Tensor) -> Prompts:
    return prompts if len(rows) == len(prompts) else prompts.select(rows.to(prompts.input_ids.device))
