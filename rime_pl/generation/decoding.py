"""Read prompts, then go on token by token: keys and values of each prompt are computed once.

Called by rewriting.py and rollouts.py beside it, by the modules and by the retriever. Nothing here has a
gradient; with one, several completions share their prompt in ``Backbone.forward``.

Shape legend: R prompts, G generations of each, P prompt tokens, C completion tokens, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from rime_pl.backbone.mllm import Backbone
from rime_pl.types import Completions, Prompts


@dataclass
class DecodingState:
    """Where the generation of R * G rows stands: what they have read, and the state after it."""

    cache: Cache  # keys and values, R * G rows
    mask: Tensor  # (R * G, P) int64; grows by one column per decoded token
    next_position: Tensor  # (3, R * G, 1) int64
    last: Tensor  # (R * G, D): the hidden state that predicts the first token
    disc: Tensor  # (R, D) float32, normalised: discriminative embeddings of the prompts

    def copy(self) -> DecodingState:
        """Return a state that can move on alone. It shares the tensors, because none is changed in place."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return replace(self, cache=cache)

    def keep(self, rows: Tensor) -> None:
        """Forget all but the given rows (int64 indices)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.next_position = self.mask[rows], self.next_position[:, rows]


def prefill(
    backbone: Backbone, prompts: Prompts, num_generations: int, image_features: Any | None = None
) -> DecodingState:
    """Read each prompt once, and copy its keys and values to ``num_generations`` rows."""
    positions = backbone.prompt_positions(prompts)
    output = backbone.run(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        **backbone.image_inputs(prompts, prompts.input_ids, image_features),
        use_cache=True,
    )
    if num_generations > 1:
        output.past_key_values.batch_repeat_interleave(num_generations)
    return DecodingState(
        output.past_key_values,
        prompts.attention_mask.repeat_interleave(num_generations, dim=0),
        (positions[:, :, -1:] + 1).repeat_interleave(num_generations, dim=1),
        output.last_hidden_state[:, -1].repeat_interleave(num_generations, dim=0),
        backbone.read_disc(prompts, output.last_hidden_state),
    )


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
    state.mask = torch.cat([state.mask, mask], dim=1)
    positions = state.next_position + torch.arange(ids.shape[1], device=ids.device)  # (3, N, C)
    output = backbone.run(
        input_ids=ids,
        attention_mask=state.mask,
        position_ids=positions,
        past_key_values=state.cache,
        use_cache=True,
    )
    state.next_position = positions[:, :, -1:] + 1
    hidden: Tensor = output.last_hidden_state
    return hidden
