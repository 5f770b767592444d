"""One real ``training_step`` of a real module on a backbone without weights: its bytes and FLOPs.

Called by predict.py. Nothing here knows a stage or a loss: what a module computes is what is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.generation import rollouts
from rime_pl.modules.base import RimeModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.preflight.plan.tracking import Largest, LiveBytes
from rime_pl.preflight.plan.weightless import WeightlessBackbone
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Rows

#: Tokens of a rewrite that are sampled; the keys and values of those before are there without that.
LAST_TOKENS = 3


#: ("weights", part), ("peak", kind of work, number of the pass, part): bytes; ("flops",), ("trained",),
#: ("parameters",): counts. Of a step at another depth, each has its counterpart.
Numbers = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class Simulation:
    """What a step needs."""

    numbers: Numbers  # each grows linearly with the number of layers
    largest: Largest


class _FirstPass(Exception):
    """Ends a simulation that only asks how many rows go through the decoder together."""


def simulate(
    module: RimeModule, architecture: PretrainedConfig, processor: RimeProcessor, batch: Batch
) -> Simulation:
    """Run one step and count.

    Args:
        module: Without a backbone; it stays as it is.
        architecture: Of the model to simulate.
        processor: Whose token ids the batch holds.
        batch: Only the shape of its pixel values is read.
    """
    backbone = WeightlessBackbone(module.config, architecture, processor)
    numbers = static_numbers(backbone)
    with _prepared(module, backbone, batch) as (step, inputs, live):
        loss = step.training_step(inputs, 0)
        if step.automatic_optimization:
            with live.counting("backward"):
                step.backward(loss)
    for (*work, number), peak in live.peaks.items():
        numbers |= {("peak", str(work), str(number), part): size for part, size in peak.parts.items()}
    return Simulation(numbers | {("flops",): live.flops}, live.largest)


def rows_of_a_pass(
    module: RimeModule, architecture: PretrainedConfig, processor: RimeProcessor, batch: Batch
) -> int:
    """Return how many rows go through the decoder together; the step itself says it."""
    backbone = WeightlessBackbone(module.config, architecture, processor)
    rows = len(batch)

    def stop(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows = len(kwargs["inputs_embeds"])
        raise _FirstPass

    decoder = backbone.language_model.model.language_model
    decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with _prepared(module, backbone, batch) as (step, inputs, _):
            step.training_step(inputs, 0)
    except _FirstPass:
        pass
    return rows


@contextmanager
def _prepared(
    module: RimeModule, backbone: WeightlessBackbone, batch: Batch
) -> Iterator[tuple[Any, Batch, LiveBytes]]:
    """The module with the backbone, its inputs, and the ruler that counts."""
    step: Any = copy.deepcopy(module)
    step.backbone = backbone
    live = LiveBytes(backbone.tensors(), backbone.language_model.config.text_config.vocab_size)
    tower = backbone.language_model.model.visual
    for part in (tower, *tower.blocks):
        live.count_forward(part, "vision tower")
    live.count_passes(backbone.language_model.model.language_model)
    _detach_from_trainer(step, live)
    query, target = (without_pixels(side, backbone) for side in (batch.query, batch.target))
    batch = replace(batch, query=query, target=target)
    del query, target
    with mock.patch.object(rollouts, "decode", _last_tokens(rollouts.decode)), live:
        if isinstance(module, RefineRLModule):
            with live.counting("reference adapter"):
                step.reference = trained_values(backbone)
        with live.counting("inputs"):
            inputs = batch.to("cpu", copy=True)
        del batch
        yield step, inputs, live


def _detach_from_trainer(step: Any, live: LiveBytes) -> None:
    """Replace what the module asks of Lightning's trainer."""

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        with live.counting("backward"):
            loss.backward()

    def zero_grad() -> None:
        for parameter in step.parameters():
            parameter.grad = None

    nothing = lambda *_, **__: None  # noqa: E731
    step.log = step.log_dict = nothing
    step.manual_backward = backward
    step.optimizers = lambda: SimpleNamespace(step=nothing, zero_grad=zero_grad)
    step.lr_schedulers = lambda: SimpleNamespace(step=nothing)


def without_pixels(rows: Rows, backbone: WeightlessBackbone) -> Rows:
    """The same rows, their pixel values without values."""
    pixels = rows.prompts.pixel_values
    if pixels is None:
        return rows
    with backbone.values:
        empty = torch.empty(pixels.shape)
    return replace(rows, prompts=replace(rows.prompts, pixel_values=empty))


def _last_tokens(decode: Any) -> Any:
    """Return ``decode`` of generation/rollouts.py that runs the model only for the last tokens.

    Keys and values are there as if it had run for all, because most memory is in use at the end.
    """

    def decode_last(backbone: Any, state: Any, numbers: Tensor, temperature: float) -> Tensor:
        skipped = max(0, numbers.shape[1] - LAST_TOKENS)
        for layer in state.cache.layers:
            layer.keys, layer.values = (
                torch.cat([kept, kept[:, :, -1:].expand(-1, -1, skipped, -1)], dim=2)
                for kept in (layer.keys, layer.values)
            )
        state.mask = torch.cat([state.mask, torch.ones(len(state.mask), skipped, dtype=torch.int64)], dim=1)
        written = decode(backbone, state, numbers[:, skipped:], temperature)
        return torch.cat([torch.zeros(len(written), skipped, dtype=torch.int64), written], dim=1)

    return decode_last


def static_numbers(backbone: WeightlessBackbone) -> Numbers:
    """Bytes of the weights by part, and how many numbers there are and train."""
    sizes = {"4-bit weights": 0, "other frozen weights": 0, "trained weights": 0}
    packed = {id(layer.weight): layer.weight for layer in linear_4bit_modules(backbone).values()}
    unpacked = sum(weight.quant_state.shape.numel() - weight.numel() for weight in packed.values())
    for tensor in backbone.tensors():
        trains = "trained weights" if tensor.requires_grad else "other frozen weights"
        sizes["4-bit weights" if id(tensor) in packed else trains] += tensor.nbytes
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in backbone.parameters()) + unpacked
    weights: Numbers = {("weights", part): size for part, size in sizes.items()}
    return weights | {("trained",): trained, ("parameters",): parameters}
