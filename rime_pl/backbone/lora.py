"""Run adapted layers faster than PEFT does: with a gradient in fewer passes, without one as a single product.

Called by mllm.py when it builds a model, and by whoever reads without a gradient. PEFT copies the output of
the base layer, computes the product of LoRA, multiplies it by the scaling and adds it: four passes over a
wide tensor, and as many backward. Here the narrow tensor is scaled, and the second product is added to the
output of the base layer as it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rime_pl.backbone.head import Table, logits


def forward_in_place(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``base(x) + scaling B A dropout(x)``, in PEFT's own way where it is more than that.

    That is so if base layer and LoRA have other types (a bfloat16 base), under autocast, and for adapters
    that are merged, switched off, several, or of another kind.

    Args:
        layer: A LoRA layer of PEFT.
        x: (..., in) inputs.
        args, kwargs: PEFT's further arguments.

    Returns:
        (..., out), of the type of the base layer's output.

    Source: LoRA, arXiv 2106.09685.
    """
    whole = layer.whole_weight  # once: another thread may end its `merged`
    if whole is not None:
        return F.linear(x, whole, layer.base_layer.bias)
    special = args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant
    if special or len(layer.active_adapters) != 1 or torch.is_autocast_enabled(x.device.type):
        return _as_peft_does(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    first, second = layer.lora_A[name], layer.lora_B[name]
    if not x.dtype == first.weight.dtype == second.weight.dtype or second.bias is not None:
        return _as_peft_does(layer, x)
    rows = x.flatten(0, -2)
    base = layer.base_layer(rows)
    if base.dtype != x.dtype:
        return _as_peft_does(layer, x)
    narrow = F.linear(layer.lora_dropout[name](rows), first.weight) * layer.scaling[name]  # (rows, rank)
    return base.addmm_(narrow, second.weight.T).view(*x.shape[:-1], base.shape[-1])


def _as_peft_does(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return output


def forward_table(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Look tokens up, or compute their logits where the layer is the tied head.

    PEFT copies the whole table in each forward, as a few of its rows train, and its gradient is as large.
    Here those rows are put into the result.

    Args:
        layer: A layer of PEFT with trained tokens.
        x: (...,) token ids, or (..., D) hidden states.
        args, kwargs: PEFT's further arguments.

    Returns:
        (..., D) of the table's type, or (..., V) of the type of ``x``.
    """
    if args or kwargs or not _is_plain(layer) or torch.is_autocast_enabled(x.device.type):
        return _as_peft_does(layer, x, *args, **kwargs)
    table = trained_table(layer)
    if type(layer.base_layer) is nn.Linear:
        return logits(x, table)
    found = F.embedding(x, table.frozen)
    for token, row in zip(table.ids, table.trained.to(found.dtype), strict=True):
        found = torch.where((x == token).unsqueeze(-1), row, found)
    return found


def trained_table(layer: Any) -> Table:
    """Return the table of a layer with trained tokens."""
    (name,) = layer.active_adapters
    base = layer.base_layer
    bias = base.bias if isinstance(base, nn.Linear) else None
    return Table(base.weight, layer.trainable_tokens_delta[name], layer.token_indices[name], bias)


def _is_plain(layer: Any) -> bool:
    """Return whether a layer only looks rows up or multiplies by them, with one adapter that is in use."""
    base = layer.base_layer
    looked_up = type(base) is nn.Embedding and base.max_norm is None and not base.scale_grad_by_freq
    adapted = len(layer.active_adapters) == 1 and not layer.disable_adapters and not layer.merged
    return adapted and (looked_up or type(base) is nn.Linear)


def add_in_place(model: Any) -> None:
    """Make all adapted layers of a model use the functions of this file; their names and values stay."""
    for layer in _adapted(model):
        table = isinstance(layer, TrainableTokensLayer)
        if not table:
            layer.whole_weight = None
        layer.forward = partial(forward_table if table else forward_in_place, layer)


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, no gradient, and each layer with LoRA is one product, with the weight ``W + scaling B A``.

    Nothing is written into the 4-bit weights: each layer gets a whole weight beside them, and drops it at the
    end. A bfloat16 layer stays as it is, because the sum would be rounded, and small changes lost. So do
    weights that are sharded over processes. Other adapter values must be there before, not put in inside.

    Args:
        model: After :func:`add_in_place`; in eval mode, or with a LoRA dropout of 0.
    """
    layers: list[Any] = [layer for layer in _adapted(model) if isinstance(layer, LoraLayer)]
    sharded = any(isinstance(one, DTensor) for layer in layers for one in layer.parameters())
    with torch.no_grad():
        if sharded or any(layer.whole_weight is not None for layer in layers):  # merged already
            yield
            return
        try:
            for layer in layers:
                layer.whole_weight = _whole_weight(layer)
            yield
        finally:
            for layer in layers:
                layer.whole_weight = None


def _adapted(model: Any) -> list[Any]:
    """Return the linear layers with LoRA and the tables with trained rows."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer | TrainableTokensLayer)]
    return [layer for layer in layers if isinstance(layer, TrainableTokensLayer) or layer.lora_A]


def _whole_weight(layer: Any) -> Tensor | None:
    """Return what a layer multiplies by, (out, in); None if it would be rounded."""
    (name,) = layer.active_adapters
    weight = layer.base_layer.weight
    state = getattr(weight, "quant_state", None)
    first, second, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if (weight.dtype if state is None else state.dtype) != torch.float32:
        return None
    with torch.autocast(weight.device.type, enabled=False):
        if state is None:
            return torch.addmm(weight, second, first, alpha=scaling)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).addmm_(second, first, alpha=scaling)
