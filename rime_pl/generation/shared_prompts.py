"""Several completions of one prompt: prompt and images are computed once per item.

Called by rewriting.py and rollouts.py beside it. With a gradient, a row is the prompt followed by its G
completions: the attention mask lets each completion see the prompt and itself, and the positions of each
continue at the end of the prompt. Without one, keys and values of the prompt are kept.

Shape legend: R items, G completions each, P prompt tokens, C completion tokens, L = P + G * C, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.errors import RimeError
from rime_pl.types import Completions, Prompts


@dataclass
class GroupOutput:
    """What one forward over R items with G completions each gives; rows of an item stand together."""

    disc: Tensor  # (R, D) float32, normalised
    gen: Tensor  # (R * G, D) float32, normalised
    before: Tensor  # (R * G, C, D): the hidden state that predicts each completion token


def forward_groups(
    backbone: Backbone, prompts: Prompts, completions: Completions, image_features: Any | None = None
) -> GroupOutput:
    """Run one forward over R prompts with all their completions.

    Args:
        backbone: In any mode; dropout must be off where probabilities are compared.
        prompts: R rows.
        completions: R * G rows, the G of an item together.
        image_features: From ``Backbone.encode_images``.

    Raises:
        RimeError: If the attention kernel does not accept a custom mask.
    """
    if backbone.config.attn_implementation not in ("sdpa", "eager"):
        raise RimeError(
            "model.backbone.attn_implementation must be 'sdpa' or 'eager' in Refine-RL, but is "
            f"{backbone.config.attn_implementation!r}. Rewrites that share a prompt need a custom mask, and "
            "other attention kernels do not accept one."
        )
    items, length = prompts.input_ids.shape
    groups, width = len(completions) // items, completions.ids.shape[1]
    ids = torch.cat([prompts.input_ids, completions.ids.view(items, groups * width)], dim=1)  # (R, L)
    valid = torch.cat([prompts.attention_mask, completions.mask.view(items, groups * width)], dim=1)
    positions = prompt_positions(backbone, prompts)  # (3, R, P)
    after = positions[:, :, -1:] + 1 + torch.arange(width, device=ids.device).repeat(groups)  # (3, R, G * C)
    segment = torch.arange(groups, device=ids.device).repeat_interleave(width) + 1
    segment = torch.cat([segment.new_zeros(length), segment])  # (L,); 0 is the prompt
    hidden = backbone.language_model.model(
        input_ids=ids,
        attention_mask=_additive(shared_prompt_mask(segment, valid), backbone),
        position_ids=torch.cat([positions, after], dim=2),
        **_images(backbone, prompts, ids, image_features),
        use_cache=False,
    ).last_hidden_state  # (R, L, D)
    disc = backbone.read_disc(prompts, hidden)
    written = hidden[:, length:].reshape(items * groups, width, -1)  # (R * G, C, D)
    at, found = first_position(completions.ids, completions.mask, backbone.processor.gen_id)
    start = hidden[:, length - 1 : length].repeat_interleave(groups, dim=0)  # (R * G, 1, D)
    return GroupOutput(disc, pool_at(written, at, found), torch.cat([start, written[:, :-1]], dim=1))


def shared_prompt_mask(segment: Tensor, valid: Tensor) -> Tensor:
    """Return which token attends to which: to earlier tokens of the prompt and of its own completion.

    Args:
        segment: (L,) int64, ascending: 0 for the prompt, 1 to G for the completions.
        valid: (R, L), 0 at padding.

    Returns:
        (R, 1, L, L) bool, query by key. Each token, also padding, attends to itself: no softmax is empty.

    Example:
        >>> shared_prompt_mask(torch.tensor([0, 0, 1, 2]), torch.tensor([[0, 1, 1, 1]])).int()[0, 0].tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    place = torch.arange(len(segment), device=segment.device)
    related = (segment == 0) | (segment == segment.unsqueeze(1))  # (L, L)
    earlier = related & (place <= place.unsqueeze(1))
    seen = earlier & valid.bool().unsqueeze(1)  # (R, L, L)
    return (seen | torch.eye(len(segment), dtype=torch.bool, device=segment.device)).unsqueeze(1)


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
    positions = prompt_positions(backbone, prompts)
    output = backbone.run(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        position_ids=positions,
        **_images(backbone, prompts, prompts.input_ids, image_features),
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
    at, found = first_position(completions.ids, completions.mask, backbone.processor.gen_id)
    return pool_at(hidden, at, found)


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


def prompt_positions(backbone: Backbone, prompts: Prompts) -> Tensor:
    """Return the rotary positions (time, height, width) of left-padded prompts.

    Returns:
        (3, R, P) int64; the three are equal at text tokens.
    """
    if prompts.image_grid_thw is None:
        counted = (prompts.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return counted.expand(3, -1, -1)
    inputs = backbone.image_inputs(prompts, prompts.input_ids, pixels=False)
    positions, _ = backbone.language_model.model.get_rope_index(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **inputs
    )
    return positions


def _additive(seen: Tensor, backbone: Backbone) -> Tensor:
    """Turn a bool mask into the float mask that attention kernels add to their scores."""
    dtype = backbone.language_model.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _images(backbone: Backbone, prompts: Prompts, ids: Tensor, image_features: Any | None) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(backbone.image_inputs(prompts, ids, pixels=image_features is None))
    if image_features is not None:
        inputs["mm_encoder_outputs"] = {"image": image_features}
    return inputs
