"""Embeddings that sampled rewrites are compared with: the anchors of Refine-RL, by the frozen reference.

Used by modules/refine_rl.py, with the reference's values in the model. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.decoding import embed_completions, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.settings import AnchorKind
from rime_pl.types import Batch, Prompts, Side


def anchors_of(
    kind: AnchorKind,
    backbone: Backbone,
    batch: Batch,
    max_new_tokens: int,
    sides: Sequence[Side] = ("query", "target"),
) -> dict[Side, Tensor]:
    """Return :func:`anchor_vectors` of the given sides of B pairs, (B, D) each."""
    prompts = {"query": batch.query.prompts, "target": batch.target.prompts}
    return {side: anchor_vectors(kind, backbone, prompts[side], max_new_tokens) for side in sides}


@torch.no_grad()
def anchor_vectors(kind: AnchorKind, backbone: Backbone, prompts: Prompts, max_new_tokens: int) -> Tensor:
    """Return the embeddings (R, D) of items that rewrites of the other side are compared with.

    They are discriminative ones, or with ``greedy`` the generative ones of the model's own greedy rewrites:
    anchors of the other mode that stand still as well. This control tells whether discriminative anchors help
    because they are discriminative, or because they do not move. Paper: the control is ours.

    Args:
        kind: "rollouts" are of the batch; their table, and what people read, is discriminative.
        backbone: The frozen reference.
        prompts: R items.
        max_new_tokens: Budget of a greedy rewrite: that of the sampled ones.
    """
    if kind != "greedy":
        disc: Tensor = backbone(prompts).disc
        return disc
    training = backbone.training
    backbone.eval()  # in training mode, gradient checkpointing discards the cache of keys and values
    try:
        read = prefill(backbone, prompts, 1)
        written = write_rewrites(backbone, prompts, max_new_tokens, state=read)
        return embed_completions(backbone, read, written.completions)
    finally:
        backbone.train(training)
