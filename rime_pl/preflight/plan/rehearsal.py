"""A training step on tensors without data: which bytes are alive when, before any weight is there.

Called by `rime plan`. The same layers, losses and backward as in a run, so that what a formula would forget
is in the count (PEFT's copy of the embedding table, masks widened for attention, a tower that keeps its
activations). The step mirrors rime_pl/modules/{sft,cma,refine_rl}.py and backbone/{mllm,groups}.py; tests
hold it to the bytes of real steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.generation.rollouts import distribution, sample_tokens
from rime_pl.generation.shared_prompts import shared_prompt_mask
from rime_pl.losses.alignment import cross_mode_alignment, decisive_rewrite
from rime_pl.losses.contrastive import info_nce
from rime_pl.losses.language_modeling import token_cross_entropy
from rime_pl.losses.policy_gradient import Divisors, policy_loss
from rime_pl.preflight.plan.shapes import RolloutShape, SideShape, StepShape
from rime_pl.preflight.plan.skeleton import Skeleton, state_tensors
from rime_pl.preflight.plan.tracking import Largest, LiveBytes, Peak
from rime_pl.scaling.micro_batches import MicroBatches
from rime_pl.types import EncodedSide, ModeEmbeddings


@dataclass(frozen=True)
class Static:
    """Bytes that lie there all the time, by part."""

    packed: int  # 4-bit weights
    packed_state: int  # their scales, and the scales of those
    vision: int  # vision tower
    embedding: int  # embedding table and, if it is another tensor, output layer
    other: int  # norms, biases, buffers; linear layers that are not in 4 bits
    lora: int
    token_rows: int
    trained: int  # number of trained parameters, not bytes
    parameters: int  # number of all parameters, a packed one counted as it was


@dataclass(frozen=True)
class StepMemory:
    """What a step needs above the weights and optimiser states."""

    peak: Peak
    largest: Largest
    gradients: int  # bytes of all gradients


def static_memory(skeleton: Skeleton) -> Static:
    """Every weight once, by part."""
    parts = dict.fromkeys(("packed", "packed_state", "vision", "embedding", "other", "lora", "token_rows"), 0)
    trained = parameters = 0
    packed = {id(layer.weight): layer.weight for layer in linear_4bit_modules(skeleton.peft).values()}
    for weight in packed.values():
        parts["packed_state"] += sum(tensor.nbytes for tensor in state_tensors(weight.quant_state))
    for name, tensor in _named_tensors(skeleton):
        parts[_part(name, id(tensor) in packed)] += tensor.nbytes
        if isinstance(tensor, torch.nn.Parameter):
            shape = packed[id(tensor)].quant_state.shape if id(tensor) in packed else tensor.shape
            parameters += shape.numel()
            trained += tensor.numel() if tensor.requires_grad else 0
    return Static(**parts, trained=trained, parameters=parameters)


def _named_tensors(skeleton: Skeleton) -> list[tuple[str, Tensor]]:
    return [*skeleton.peft.named_parameters(), *skeleton.peft.named_buffers()]


def _part(name: str, packed: bool) -> str:
    if packed:
        return "packed"
    if "lora_" in name:
        return "lora"
    if "trainable_tokens" in name:
        return "token_rows"
    if ".visual." in name:
        return "vision"
    if "embed_tokens" in name or "lm_head" in name:
        return "embedding"
    return "other"


def rehearse(skeleton: Skeleton, step: StepShape) -> StepMemory:
    """One step, forward and backward.

    Args:
        skeleton: From ``build_skeleton``.
        step: Stage and sizes.
    """
    merged = skeleton.architecture.vision_config.spatial_merge_size**2
    rehearsal = _Step(skeleton)
    with skeleton.mode, rehearsal.live:
        if step.rollouts is not None:
            sides = [step.query, *([step.target] if step.rollouts.both_sides else [])]
            rehearsal.policy([side.even(merged) for side in sides], step.rollouts)
        else:
            sides = [side.even(merged) for side in step.encoded]
            if step.cached is None:
                rehearsal.plain(step.stage, sides)
            else:
                rehearsal.cached(step.stage, sides, step.cached)
        trained = [p for p in skeleton.peft.parameters() if p.grad is not None]
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        for parameter in trained:
            parameter.grad = None
    return StepMemory(rehearsal.live.peak, rehearsal.live.largest, gradients)


class _Step:
    """One step's forward passes; its ``live`` counts the bytes."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.patches_of_an_image = 0  # of the side that is looked at
        self.dtype = getattr(torch, skeleton.config.dtype)
        self.live = LiveBytes(skeleton.tensors(), lambda: self.patches_of_an_image)
        for parameter in skeleton.peft.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.live.move(p.grad, "gradients")  # type: ignore[arg-type]
                )

    def plain(self, stage: str, sides: list[SideShape]) -> None:
        """One forward a side, as ``training_step`` without micro-batches."""
        with self.live.counting("inputs"):
            self.batch = [self._inputs(side) for side in sides[:2]]
        loss = self._plain_loss(stage, sides)  # which lets go of the embeddings, as training_step does
        with self.live.counting("backward"):
            loss.backward()

    def _plain_loss(self, stage: str, sides: list[SideShape]) -> Tensor:
        encoded = [
            self._encode(side, inputs, side.labels) for side, inputs in zip(sides, self.batch, strict=False)
        ]
        for side in sides[2:]:
            with self.live.counting("inputs"):
                again = self._inputs(side)  # freed with this forward; the batch itself lives on
            encoded.append(self._encode(side, again, labels=0))
            del again
        return _loss(stage, encoded)

    def cached(self, stage: str, sides: list[SideShape], micro: MicroBatches) -> None:
        """As the two passes of ``GradientCache``: the loss on leaves, then a micro-batch of each side."""
        width = self.skeleton.architecture.text_config.hidden_size
        with self.live.counting("inputs"):
            self.batch = [self._inputs(side) for side in sides]
        with self.live.counting("embeddings"):
            leaves = [
                EncodedSide(*(torch.zeros(size, requires_grad=True) for size in ((r, width), (r, width), ())))
                for r in (side.rows for side in sides)
            ]
        kept = []
        if micro.reuse_vision:
            with self.live.counting("vision features"):
                kept = [self._features(side) for side in sides]
        with self.live.counting("loss"):
            loss = _loss(stage, leaves)
            loss.backward()
        del loss
        for leaf in (tensor for side in leaves for tensor in (side.disc, side.gen)):
            if leaf.grad is not None:  # of the wrong rewrites only gen is read
                self.live.move(leaf.grad, "embeddings")
        for number, side in enumerate(sides):
            part = side.largest(micro.rows_of(side.prompt_tokens + side.completion_tokens, side.rows))
            with self.live.counting("inputs"):
                inputs = self._inputs(part)
            features = self._features(part) if kept else None
            encoded = self._encode(part, inputs, part.labels if number < 2 else 0, features)
            with self.live.counting("backward"):
                (encoded.disc.sum() + encoded.gen.sum() + encoded.cross_entropy).backward()

    def policy(self, sides: list[SideShape], drawn: RolloutShape) -> None:
        """As Refine-RL: all rewrites are drawn and scored by the reference, then passes with gradient.

        Of each side one pass is rehearsed; of the others, what they keep lies there.
        """
        size = drawn.items_per_pass
        parts = [side.largest(size) if size and size < side.rows else side for side in sides]
        with self.live.counting("inputs"):
            self.batch = [self._inputs(side) for side in sides]
            if parts != sides:  # parts of a batch are copies of its rows
                self.batch += [self._inputs(side) for side in sides]
        with self.live.counting("vision features"):
            kept = [self._features(side) for side in sides]
        with self.live.counting("rollouts"):
            shape = (sum(side.rows for side in sides) * drawn.num_generations, drawn.max_new_tokens + 2)
            written = [torch.zeros(shape, dtype=torch.int64) for _ in range(3)]  # ids, mask, labels
            scores = [torch.zeros(shape) for _ in range(3)]  # the reference's two, and the old policy's
        for part, features in zip(parts, kept, strict=True):
            with torch.no_grad():
                self._draw(part, drawn)
                self._score(part, drawn, features)
        for part, features in zip(parts, kept, strict=True):
            logprobs = self._score(part, drawn, features)
            mask = torch.zeros(logprobs.shape, dtype=torch.bool)
            old, weights = logprobs.detach(), torch.zeros(len(logprobs))
            divisors = Divisors(len(logprobs), logprobs.numel(), logprobs.shape[1])
            out = policy_loss(logprobs, old, weights, mask, torch.zeros(logprobs.shape), divisors)
            with self.live.counting("backward"):
                out.loss.backward()
        del written, scores

    def _draw(self, part: SideShape, drawn: RolloutShape) -> None:
        """The pictures, then the last token of the rewrites: keys and values are longest there."""
        text, rows = self.skeleton.architecture.text_config, part.rows * drawn.num_generations
        if part.patches:
            with self.live.counting("vision tower"):
                self._look(part, self._inputs(part)["pixels"])
        heads = text.num_key_value_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (rows, heads, part.prompt_tokens + drawn.max_new_tokens, width)
        with self.live.counting("keys and values"):
            cache = [torch.empty(shape, dtype=self.dtype) for _ in range(2 * text.num_hidden_layers)]
            longer = torch.empty(shape, dtype=self.dtype)  # a token longer: beside the old one for a moment
        with self.live.counting("logits"):
            model = self.skeleton.language_model
            logits = model.lm_head(torch.empty(rows, text.hidden_size, dtype=self.dtype))
            nothing = torch.zeros(logits.shape[-1], dtype=torch.bool)
            sample_tokens(distribution(logits, nothing, 1.0), torch.zeros(rows, dtype=torch.float64))
        del cache, longer

    def _score(self, part: SideShape, drawn: RolloutShape, features: list[Tensor]) -> Tensor:
        """As ``score_rollouts``, the prompt once an item and its rewrites side by side: (N, C)."""
        model, groups, width = self.skeleton.language_model, drawn.num_generations, drawn.max_new_tokens + 2
        items, length = part.rows, part.prompt_tokens
        with self.live.counting("inputs"):
            ids = torch.zeros(items, length + groups * width, dtype=torch.int64)
            positions = torch.zeros(4, *ids.shape, dtype=torch.int64)
        seen = shared_prompt_mask(torch.zeros(ids.shape[1], dtype=torch.int64), torch.zeros_like(ids))
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)
        del seen
        hidden = model.get_input_embeddings()(ids)
        if part.patches:
            at = (ids == 0).unsqueeze(-1).expand_as(hidden)
            hidden = hidden.masked_scatter(at, features[0].to(hidden.dtype))
        hidden = self._decode(hidden, positions, mask)
        written = hidden[:, length:].reshape(items * groups, width, -1)
        start = hidden[:, length - 1 : length].repeat_interleave(groups, dim=0)
        before = torch.cat([start, written[:, :-1]], dim=1)
        row, column = torch.zeros(2, items * groups * (width - 1), dtype=torch.int64).unbind()
        with self.live.counting("logits"):
            logits = model.lm_head(before[row, column])
            nothing = torch.zeros(logits.shape[-1], dtype=torch.bool)
            logprobs = distribution(logits, nothing, 1.0)
            with torch.no_grad():
                entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
            picked = logprobs.gather(1, row.unsqueeze(1)).squeeze(1)
        at = torch.zeros(before.shape[:2], dtype=torch.bool)
        scores = [torch.zeros(at.shape).masked_scatter(at, values) for values in (picked, entropy)]
        return scores[0]

    def _decode(self, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """The decoder's layers on embeddings that are there."""
        plain = self.skeleton.architecture.model_type == "qwen2_vl"
        decoded: Tensor = self.skeleton.language_model.model.language_model(
            inputs_embeds=hidden,
            position_ids=positions,
            # as transformers prepares it; a mapping for the models with layers of several kinds
            attention_mask={"full_attention": mask} if plain else mask,
            use_cache=False,
        ).last_hidden_state
        return decoded

    def _inputs(self, shape: SideShape) -> dict[str, Tensor]:
        """Ids, mask and patches of a batch, as the data module hands them over."""
        length = shape.prompt_tokens + shape.completion_tokens
        inputs = {name: torch.zeros(shape.rows, length, dtype=torch.int64) for name in ("ids", "mask")}
        if shape.patches:
            vision = self.skeleton.architecture.vision_config
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            inputs["pixels"] = torch.empty(shape.patches, width)
        return inputs

    def _features(self, shape: SideShape) -> list[Tensor]:
        """What is kept of the vision tower's work: its output, and one more for each deepstack layer."""
        vision = self.skeleton.architecture.vision_config
        count = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])
        width = self.skeleton.architecture.text_config.hidden_size
        tokens = shape.patches // vision.spatial_merge_size**2
        return [torch.empty(tokens, width, dtype=self.dtype) for _ in range(count)] if tokens else []

    def _encode(
        self,
        shape: SideShape,
        inputs: dict[str, Tensor],
        labels: int,
        features: list[Tensor] | None = None,
    ) -> EncodedSide:
        """As ``RimeModule.forward_rows``, the rows of logits counted instead of looked up."""
        model = self.skeleton.language_model
        ids, length = inputs["ids"], shape.prompt_tokens + shape.completion_tokens
        hidden = model.get_input_embeddings()(ids)
        if shape.patches:
            if features is None:
                with self.live.counting("vision tower"):
                    features = self._look(shape, inputs["pixels"])
            at = (ids == 0).unsqueeze(-1).expand_as(hidden)
            hidden = hidden.masked_scatter(at, features[0].to(hidden.dtype))
        positions = torch.zeros(4, shape.rows, length, dtype=torch.int64)
        mask = torch.zeros(shape.rows, 1, length, length, dtype=torch.bool) if shape.padded else None
        hidden = self._decode(hidden, positions, mask)
        at, found = first_position(ids, inputs["mask"], 0)
        disc, gen = pool_at(hidden, at, found), pool_at(hidden, at, found)
        before = hidden[:, shape.prompt_tokens - 1 : -1]
        row, column = torch.zeros(2, labels, dtype=torch.int64).unbind()
        with self.live.counting("logits"):
            logits = model.lm_head(before[row, column])
            expected = torch.zeros(labels, dtype=torch.int64)
            cross_entropy = token_cross_entropy(logits, expected, max(1, labels))
        return EncodedSide(disc, gen, cross_entropy)

    def _look(self, shape: SideShape, pixels: Tensor) -> list[Tensor]:
        """The vision tower, its positions given: they depend on values, and there are none."""
        tower = self.skeleton.language_model.model.visual
        self.patches_of_an_image = shape.of_an_image
        indices, weights = torch.zeros(shape.patches, 4, dtype=torch.int64), torch.empty(shape.patches, 4)
        seen: Any = tower(
            pixels.type(self.dtype),
            grid_thw=torch.zeros(shape.images, 3, dtype=torch.int64),
            position_ids=torch.zeros(shape.patches, 2, dtype=torch.int64),
            cu_seqlens=torch.zeros(shape.images + 1, dtype=torch.int32),
            interp_indices=indices,
            interp_weights=weights,
            return_dict=True,
        )
        merged = seen.pooler_output
        pictures = torch.cat(merged.split(len(merged) // shape.images))
        deep = getattr(seen, "deepstack_features", None) or []
        return [pictures, *deep]


def _loss(stage: str, sides: list[EncodedSide]) -> Tensor:
    """As ``training_step`` of the stage; the third side are the wrong rewrites."""
    q, t, *wrong = sides
    contents = torch.zeros(len(q.gen), 2, dtype=torch.int64)
    total = info_nce(q.gen, t.gen, 1.0, contents) + info_nce(q.disc, t.disc, 1.0, contents)
    total = total + q.cross_entropy + t.cross_entropy
    if stage == "cma":
        query, target = ModeEmbeddings(q.disc, q.gen), ModeEmbeddings(t.disc, t.gen)
        total = total + cross_mode_alignment(query, target, 1.0, contents)
    for side in wrong:
        index = torch.arange(len(side.gen))
        chosen = ModeEmbeddings(t.disc[index], t.gen[index])
        total = total + decisive_rewrite(q.gen[index], side.gen, chosen, 1.0)
    return total
