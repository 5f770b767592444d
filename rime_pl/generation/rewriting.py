"""Writing rewrites greedily, for evaluation and search.

Called by the stages' evaluation and the retriever. Reinforcement learning draws them in rollouts.py, with
the same tokens suppressed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions, Prompts


@dataclass
class Rewriting:
    """Rewrites of R prompts."""

    completions: Completions  # R rows, each ending in <gen_emb> and end of turn
    lengths: Tensor  # (R,) int64 tokens of the rewrite itself
    well_formed: Tensor  # (R,) bool: not empty, and the model itself wrote <gen_emb>


def suppressed_tokens(processor: RimeProcessor, vocabulary: int, device: torch.device) -> Tensor:
    """Tokens that no rewrite may hold: all special ones but its two ends, and rows beyond the tokenizer.

    A sampled image placeholder would make the next forward fail.

    Returns:
        (V,) bool.
    """
    suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    suppressed[len(processor.tokenizer) :] = True  # big checkpoints have spare rows
    suppressed[torch.tensor(processor.special_ids, device=device)] = True
    suppressed[torch.tensor([processor.gen_id, processor.turn_end_id], device=device)] = False
    return suppressed


@torch.no_grad()
def write_rewrites(
    backbone: Backbone,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    synced: bool = False,
) -> Rewriting:
    """Let the model write until <gen_emb>; force <gen_emb> at the budget, and count that.

    Args:
        backbone: In eval mode, or with dropout 0.
        prompts: R rows.
        max_new_tokens: Budget; None takes the prompt config's.
        synced: All ranks keep stepping until the last has finished; needed under sharding.

    Returns:
        Completions of equal layout to the reference ones.
    """
    processor = backbone.processor
    budget = processor.prompt.budget(max_new_tokens)
    stop = [processor.gen_id, processor.turn_end_id]
    vocabulary = len(backbone.language_model.get_output_embeddings().weight)
    suppressed = suppressed_tokens(processor, vocabulary, prompts.input_ids.device)
    written = backbone.language_model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        **backbone.image_inputs(prompts, prompts.input_ids),
        max_new_tokens=budget + 1,  # one more for <gen_emb> itself
        eos_token_id=stop,
        pad_token_id=processor.pad_id,
        suppress_tokens=suppressed.nonzero().flatten().tolist(),
        synced_gpus=synced,
        do_sample=False,
    )[:, prompts.input_ids.shape[1] :]
    return close_rewrites(written, processor.gen_id, processor.turn_end_id, processor.pad_id, budget)


def close_rewrites(written: Tensor, gen_id: int, turn_end_id: int, pad_id: int, budget: int) -> Rewriting:
    """Cut each row at its first stop token or the budget, and end it in <gen_emb> and end of turn.

    Args:
        written: (R, T) int64 sampled tokens, anything after the first stop.
        gen_id, turn_end_id, pad_id: Token ids.
        budget: Most tokens of a rewrite.

    Example:
        >>> written = torch.tensor([[5, 6, 1, 0], [5, 6, 7, 8]])
        >>> r = close_rewrites(written, gen_id=1, turn_end_id=2, pad_id=0, budget=3)
        >>> r.completions.ids.tolist(), r.lengths.tolist(), r.well_formed.tolist()
        ([[5, 6, 1, 2, 0], [5, 6, 7, 1, 2]], [2, 3], [True, False])
    """
    rows, steps = written.shape
    stops = (written == gen_id) | (written == turn_end_id)
    first = torch.where(stops.any(1), stops.int().argmax(1), steps).clamp(max=budget)
    ended = torch.zeros(rows, dtype=torch.bool, device=written.device)
    inside = first < steps
    ended[inside] = written[inside, first[inside]] == gen_id
    width = int(first.max()) + 2
    position = torch.arange(width, device=written.device)
    ids = torch.full((rows, width), pad_id, device=written.device)
    ids[:, : min(width, steps)] = written[:, : min(width, steps)]
    ids = torch.where(position == first.unsqueeze(1), gen_id, ids)
    ids = torch.where(position == first.unsqueeze(1) + 1, turn_end_id, ids)
    mask = (position <= first.unsqueeze(1) + 1).long()
    ids = ids.masked_fill(mask == 0, pad_id)
    return Rewriting(Completions(ids, mask), first, ended & (first > 0))
