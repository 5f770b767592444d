"""4-bit loading, and the table that shows what is 4-bit, what has LoRA and what trains.

Called by mllm.py and by the stages. transformers quantises while it loads, on CPU and GPU. The precision
plugin of Lightning is not used, because it needs CUDA and cannot be combined with FSDP.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from typing import Any

import torch
from torch import nn

from rime_pl.backbone.config import BackboneConfig
from rime_pl.errors import RimeError


def quantization_config(config: BackboneConfig) -> object | None:
    """Return the quantisation config of transformers, or None without 4 bits.

    Raises:
        RimeError: If 4 bits are set and bitsandbytes is not installed.
    """
    if not config.load_in_4bit:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RimeError(
            "model.backbone.load_in_4bit=true needs bitsandbytes, which is not installed. "
            "Run `pip install bitsandbytes`, or set model.backbone.load_in_4bit=false."
        )
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP gathers the frozen weights of a layer as one type, so packed bytes get the type of the others.
        bnb_4bit_quant_storage=dtype,
        # The full path is needed: with the name "visual" only, the tower (model.visual.*) would become 4-bit.
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def linear_4bit_modules(model: nn.Module) -> dict[str, Any]:
    """Return all 4-bit linear layers by name, also those inside LoRA layers."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def keep_packed_weights(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights in place.

    On CPUs with AVX512-BF16, a forward in eval mode repacks the weights of Linear4bit. Training after it
    crashes or, under FSDP2, is wrong without an error.
    """
    for module in linear_4bit_modules(model).values():
        module.support_avx512bf16_for_cpu = False


def packed_digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of the packed bytes of each 4-bit layer; gather sharded weights first."""
    digests = {}
    for name, module in linear_4bit_modules(model).items():
        # a copy, because FSDP cannot free memory that numpy refers to
        weight = module.weight.detach().to("cpu", copy=True).contiguous()
        digests[name] = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    return digests


def packed_weights_hash(model: nn.Module) -> str:
    """Return one SHA-256 of the packed bytes of all 4-bit weights. Training must not change it."""
    digests = sorted(packed_digests(model).items())
    return hashlib.sha256(str(digests).encode()).hexdigest()


def describe(model: nn.Module) -> str:
    """Return a table with the 4-bit layers, LoRA layers and parameters of each part of the model."""
    four_bit = linear_4bit_modules(model)
    rows: dict[str, Counter[str]] = {}
    for name, _ in four_bit.items():
        rows.setdefault(_part(name), Counter())["4bit"] += 1
    for name, module in model.named_modules():
        if name.endswith("lora_A.default") and isinstance(module, nn.Linear):
            rows.setdefault(_part(name), Counter())["lora"] += 1
    for name, parameter in model.named_parameters():
        count = rows.setdefault(_part(name), Counter())
        packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
        count["all"] += parameter.numel() * packed
        count["trained"] += parameter.numel() if parameter.requires_grad else 0
    lines = [f"{'part':<16}{'4-bit layers':>14}{'LoRA layers':>13}{'trained':>13}{'parameters':>16}"]
    for part, count in [*sorted(rows.items()), ("total", sum(rows.values(), Counter()))]:
        lines.append(
            f"{part:<16}{count['4bit']:>14,}{count['lora']:>13,}{count['trained']:>13,}{count['all']:>16,}"
        )
    return "\n".join(lines)


def _part(name: str) -> str:
    for part in ("visual", "embed_tokens", "lm_head", "self_attn", "mlp"):
        if f".{part}" in f".{name}":
            return {"self_attn": "attention", "visual": "vision tower"}.get(part, part)
    return "other"
