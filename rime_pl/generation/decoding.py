"""Read prompts, then write token by token: keys and values of each prompt are computed once.

Called by rewriting.py and rollouts.py beside it, by the modules and by the retriever. Nothing here has a
gradient; with one, several completions share their prompt in ``Backbone.forward``.

Shape legend: R prompts, G generations of each, P prompt tokens, C completion tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from rime_pl.backbone.mllm import Backbone, MediaFeatures
from rime_pl.backbone.packing import TAKE_MASKS
from rime_pl.backbone.shared_prompts import completion_mask
from rime_pl.generation.growing_cache import with_room
from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions, Prompts

#: (n, V) logits, (n,) row numbers and the number of the token -> the (n,) tokens that these rows write.
Choose = Callable[[Tensor, Tensor, int], Tensor]
#: Rows that have ended are dropped when at most this share goes on: each time, keys and values are copied.
_KEPT = 0.75


@dataclass
class DecodingState:
    """Where the generation of R * G rows stands: what they have read, and the state after it."""

    cache: Cache  # keys and values, R * G rows
    mask: Tensor  # (R * G, P) int64; grows by one column per decoded token
    next_position: Tensor  # (3, R * G, 1) int64
    last: Tensor  # (R * G, D): the hidden state that predicts the first token
    disc: Tensor  # (R, D) float32, normalised: discriminative embeddings of the prompts

    def copy(self) -> DecodingState:
        """Return a state that can move on alone. What was read is shared; nobody changes it."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return replace(self, cache=cache)

    def keep(self, rows: Tensor) -> None:
        """Forget all but the given rows (int64 indices)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.next_position = self.mask[rows], self.next_position[:, rows]

    def select(self, rows: Tensor) -> DecodingState:
        """Return a state of the given rows (int64 indices), with one row for each prompt; this one stays."""
        chosen = self.copy()
        chosen.keep(rows)
        return replace(chosen, last=self.last[rows], disc=self.disc[rows])


def join_states(states: list[DecodingState]) -> DecodingState:
    """Return one state of all rows, in the given order. The given ones are used up.

    Rows of a shorter prompt get columns on the left that nothing reads.
    """
    first, *others = states
    if not others:
        return first
    length = max(state.mask.shape[1] for state in states)
    missing = [length - state.mask.shape[1] for state in states]
    for layer, *more in zip(*(state.cache.layers for state in states), strict=True):
        for name in ("keys", "values"):
            each = [getattr(one, name) for one in (layer, *more)]
            filled = [F.pad(one, (0, 0, left, 0)) for one, left in zip(each, missing, strict=True)]
            setattr(layer, name, torch.cat(filled))
            for one in more:  # freed here, or all of them would be there twice
                setattr(one, name, getattr(layer, name).new_empty(0))
    masks = [F.pad(state.mask, (left, 0)) for state, left in zip(states, missing, strict=True)]
    return DecodingState(
        first.cache,
        torch.cat(masks),
        torch.cat([state.next_position for state in states], dim=1),
        torch.cat([state.last for state in states]),
        torch.cat([state.disc for state in states]),
    )


def prefill(
    backbone: Backbone, prompts: Prompts, num_generations: int, features: MediaFeatures | None = None
) -> DecodingState:
    """Read each prompt once, and copy its keys and values to ``num_generations`` rows."""
    positions = backbone.prompt_positions(prompts)
    output = backbone.run(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        **backbone.media_inputs(prompts, features),
        use_cache=True,
    )
    if num_generations > 1:
        output.past_key_values.batch_repeat_interleave(num_generations)
    return DecodingState(
        with_room(output.past_key_values),
        prompts.attention_mask.repeat_interleave(num_generations, dim=0),
        (positions[:, :, -1:] + 1).repeat_interleave(num_generations, dim=1),
        output.last_hidden_state[:, -1].repeat_interleave(num_generations, dim=0),
        backbone.read_disc(prompts, output.last_hidden_state),
    )


def suppressed_tokens(processor: RimeProcessor, vocabulary: int, device: torch.device) -> Tensor:
    """Return the tokens that no rewrite may contain.

    These are all special tokens except <gen_emb> and end of turn, and the table rows that no token uses. A
    sampled image placeholder, for example, would make the next forward fail.

    Returns:
        (V,) bool.
    """
    suppressed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    suppressed[len(processor.tokenizer) :] = True  # large checkpoints have spare rows
    suppressed[torch.tensor(processor.special_ids, device=device)] = True
    suppressed[torch.tensor([processor.gen_id, processor.turn_end_id], device=device)] = False
    return suppressed


def decode(
    backbone: Backbone,
    state: DecodingState,
    most: int,
    choose: Choose,
    goes_on: Callable[[bool], bool] = bool,
) -> Tensor:
    """Write token after token until all rows have ended, or have ``most`` tokens.

    Rows that have ended are dropped now and then: few rewrites are as long as the longest one of a batch.

    Args:
        backbone: In eval mode.
        state: After the prompts, N rows; it moves on and loses rows.
        most: Maximum number of tokens of a row.
        choose: Greedy, or sampling.
        goes_on: Given whether a row goes on, returns whether to write one more token.

    Returns:
        (N, up to ``most``) int64; what follows a row's first stop has no meaning.
    """
    processor, device = backbone.processor, state.mask.device
    stops = torch.tensor([processor.gen_id, processor.turn_end_id], device=device)
    written = torch.full((len(state.mask), most), processor.pad_id, device=device)
    rows, hidden = torch.arange(len(written), device=device), state.last
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(most):
        tokens = choose(backbone.language_model.lm_head(hidden), rows, step)
        written[rows, step] = tokens
        ended = ended | torch.isin(tokens, stops)
        count = len(rows) - int(ended.sum())
        if step + 1 == most or not goes_on(count > 0):
            return written[:, : step + 1]
        if count <= _KEPT * len(rows):
            kept = (~ended).nonzero().flatten() if count else rows.new_zeros(1)
            state.keep(kept)
            rows, tokens, ended = rows[kept], tokens[kept], ended[kept]
        hidden = decode_step(backbone, state, tokens)
    return written


def decode_step(backbone: Backbone, state: DecodingState, tokens: Tensor) -> Tensor:
    """Append one token to each row and return the hidden state that predicts the next one.

    Args:
        state: Its cache, mask and position move on by one token.
        tokens: (R * G,) int64.

    Returns:
        (R * G, D).
    """
    hidden = _read_on(backbone, state, tokens.unsqueeze(1), torch.ones_like(state.mask[:, :1]))
    return hidden[:, -1]


def embed_completions(backbone: Backbone, state: DecodingState, completions: Completions) -> Tensor:
    """Return the generative embeddings (R, D) of one completion of each prompt that was read.

    Args:
        backbone: In eval mode.
        state: After the prompts, with one row for each; it stays there.
        completions: R rows with <gen_emb>; a row without it becomes the zero vector.
    """
    hidden = _read_on(backbone, state.copy(), completions.ids, completions.mask)
    return backbone.read_gen(completions, hidden)[0]


def _read_on(backbone: Backbone, state: DecodingState, ids: Tensor, mask: Tensor) -> Tensor:
    """Append C tokens to each row and return their hidden states, (N, C, D)."""
    whole = torch.cat([state.mask, mask], dim=1)
    positions = state.next_position + torch.arange(ids.shape[1], device=ids.device)  # (3, N, C)
    seen = whole
    if backbone.config.attn_implementation in TAKE_MASKS:  # transformers takes longer to make the same mask
        dtype = state.last.dtype
        if ids.shape[1] == 1:  # the hot path: three operations
            seen = (whole - 1).to(dtype)[:, None, None] * torch.finfo(dtype).max  # (N, 1, 1, P + 1)
        else:
            seen = completion_mask(state.mask, mask, dtype)
    output = backbone.run(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=state.cache,
        use_cache=True,
    )
    state.mask = whole
    state.next_position = positions[:, :, -1:] + 1
    hidden: Tensor = output.last_hidden_state
    return hidden
