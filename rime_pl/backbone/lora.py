"""LoRA's two products with fewer passes over memory, in float32.

Called by mllm.py when it builds a model. PEFT copies the output of the base layer, computes the product of
LoRA, multiplies it by the scaling and adds it: four passes over a wide tensor, and as many backward. Here the
narrow tensor is scaled, and the second product is added to the output of the base layer as it is computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor


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
    special = args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant
    if special or len(layer.active_adapters) != 1 or torch.is_autocast_enabled(x.device.type):
        return _as_peft_does(layer, x, *args, **kwargs)
    (name,) = layer.active_adapters
    first, second = layer.lora_A[name], layer.lora_B[name]
    if not x.dtype == first.weight.dtype == second.weight.dtype or second.bias is not None:
        return _as_peft_does(layer, x)
    base = layer.base_layer(x)
    if base.dtype != x.dtype:
        return _as_peft_does(layer, x)
    narrow = F.linear(layer.lora_dropout[name](x), first.weight) * layer.scaling[name]  # (..., rank)
    return torch.addmm(base.flatten(0, -2), narrow.flatten(0, -2), second.weight.T).view_as(base)


def _as_peft_does(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return output


def add_in_place(model: Any) -> None:
    """Make all LoRA layers of a model use :func:`forward_in_place`; their names and values stay."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if layer.lora_A:  # not the table of tokens
            layer.forward = partial(forward_in_place, layer)
