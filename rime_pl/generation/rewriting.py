"""Write rewrites greedily, for evaluation and search.

Called by the evaluation of every stage and by the retriever. Reinforcement learning samples its rewrites in
rollouts.py, which suppresses the same tokens and closes rewrites in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.generation.decoding import DecodingState, decode, prefill, suppressed_tokens
from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions, Prompts, Rollouts


@torch.no_grad()
def write_rewrites(
    backbone: Backbone,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    goes_on: Callable[[bool], bool] = bool,
    state: DecodingState | None = None,
) -> Rollouts:
    """Return one greedy rewrite of each prompt; a rewrite that reaches the budget is cut there.

    Args:
        backbone: In eval mode, or with dropout 0.
        prompts: R rows.
        max_new_tokens: Maximum length of a rewrite in tokens; None takes that of the prompt config.
        goes_on: Given whether a row goes on, returns whether to write one more token. A sharded model needs
            all ranks to go on until the last one has finished.
        state: After the prompts, if they were read before; it stays there.

    Returns:
        R rewrites, laid out like the reference rewrites.
    """
    if backbone.processor.prompt.num_latent_tokens:
        return latent_completions(backbone.processor, len(prompts), prompts.input_ids.device)
    training = backbone.training
    if training:  # gradient checkpointing would discard the cache of keys and values
        backbone.eval()
    try:
        state = prefill(backbone, prompts, 1) if state is None else state.copy()
        budget = backbone.processor.prompt.budget(max_new_tokens)
        table = backbone.language_model.get_output_embeddings().weight
        suppressed = suppressed_tokens(backbone.processor, len(table), state.mask.device)

        def most_likely(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            return logits.masked_fill(suppressed, float("-inf")).argmax(dim=-1)

        written = decode(backbone, state, budget + 1, most_likely, goes_on)  # one more for <gen_emb>
    finally:
        if training:
            backbone.train()
    return finish_rewrites(written, backbone.processor, budget)


def latent_completions(processor: RimeProcessor, rows: int, device: torch.device) -> Rollouts:
    """Return the latent tokens that stand in place of every rewrite, as ``rows`` equal rows.

    The model wrote none of them: no label is set. They count as well-formed, because they always end.
    """
    completions = processor.completions([""] * rows).to(device)
    labels = torch.full_like(completions.ids, -100)
    lengths = completions.mask.sum(1) - 2  # without <gen_emb> and end of turn
    return Rollouts(completions, labels, lengths, torch.ones_like(lengths, dtype=torch.bool))


def finish_rewrites(written: Tensor, processor: RimeProcessor, budget: int) -> Rollouts:
    """Close the rewrites that a model wrote; one whose text is only white space is not well-formed.

    Args:
        written: (N, T) int64, see :func:`close_rewrites`.
        processor: Decodes the rewrites.
        budget: Maximum length of a rewrite in tokens.
    """
    closed = close_rewrites(written, processor.gen_id, processor.turn_end_id, processor.pad_id, budget)
    says = [bool(text) for text in processor.decode(closed.completions)]
    closed.well_formed &= torch.tensor(says, dtype=torch.bool, device=written.device)
    return closed


def close_rewrites(written: Tensor, gen_id: int, turn_end_id: int, pad_id: int, budget: int) -> Rollouts:
    """Cut each row at its first stop token or at the budget, and end it with <gen_emb> and end of turn.

    Here a row is well-formed if it has a token and the model wrote <gen_emb>; its text is not read.

    Args:
        written: (N, T) int64, the tokens that the model wrote; anything may follow the first stop token.
        gen_id, turn_end_id, pad_id: Token ids; the first two are the stop tokens.
        budget: Maximum length of a rewrite in tokens.

    Example:
        >>> written = torch.tensor([[5, 6, 1, 0], [5, 6, 7, 8]])
        >>> r = close_rewrites(written, gen_id=1, turn_end_id=2, pad_id=0, budget=3)
        >>> r.completions.ids.tolist(), r.lengths.tolist(), r.well_formed.tolist()
        ([[5, 6, 1, 2, 0], [5, 6, 7, 1, 2]], [2, 3], [True, False])
        >>> r.labels.tolist()
        [[5, 6, 1, -100, -100], [5, 6, 7, 8, -100]]
    """
    rows, steps = written.shape
    stops = (written == gen_id) | (written == turn_end_id)
    first = torch.where(stops.any(1), stops.int().argmax(1), steps).clamp(max=budget)  # (N,)
    ended = torch.zeros(rows, dtype=torch.bool, device=written.device)
    inside = first < steps
    ended[inside] = written[inside, first[inside]] == gen_id
    width = int(first.max()) + 2
    position = torch.arange(width, device=written.device)
    ids = torch.full((rows, width), pad_id, device=written.device)
    ids[:, : min(width, steps)] = written[:, : min(width, steps)]
    labels = torch.where((position <= first.unsqueeze(1)) & (position < steps), ids, -100)
    ids = torch.where(position == first.unsqueeze(1), gen_id, ids)
    ids = torch.where(position == first.unsqueeze(1) + 1, turn_end_id, ids)
    mask = (position <= first.unsqueeze(1) + 1).long()
    ids = ids.masked_fill(mask == 0, pad_id)
    return Rollouts(Completions(ids, mask), labels, first, ended & (first > 0))
