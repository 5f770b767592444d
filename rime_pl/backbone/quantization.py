"""4-bit loading, and the table that says what is 4-bit, what has LoRA and what trains.

Called by mllm.py. Quantisation happens in transformers' own loader, on CPU and GPU alike, so that no
Lightning precision plugin is needed (that one is CUDA-only and cannot be combined with FSDP).
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
    """The transformers quantisation config, or None without 4 bits.

    Raises:
        RimeError: If 4 bits are asked for and bitsandbytes is not installed.
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
        # FSDP gathers what is frozen in a layer as one type: packed bytes travel as the type of the others.
        bnb_4bit_quant_storage=dtype,
        # A full path: the bare name "visual" left the tower in 4 bits (its modules are model.visual.*).
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def linear_4bit_modules(model: nn.Module) -> dict[str, Any]:
    """All 4-bit linear layers by name (LoRA's wrapped base layers included)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def keep_packed_weights(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights in place.

    On CPUs with AVX512-BF16 an eval forward repacks Linear4bit weights, after which training crashes
    (and is silently wrong under FSDP2).
    """
    for module in linear_4bit_modules(model).values():
        module.support_avx512bf16_for_cpu = False


def packed_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 over the packed bytes of each 4-bit layer; sharded weights must be gathered first."""
    digests = {}
    for name, module in linear_4bit_modules(model).items():
        # a copy: FSDP cannot free memory that numpy has looked at
        weight = module.weight.detach().to("cpu", copy=True).contiguous()
        digests[name] = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    return digests


def packed_weights_hash(model: nn.Module) -> str:
    """SHA-256 over the packed bytes of all 4-bit weights, in name order: must never change."""
    digests = sorted(packed_digests(model).items())
    return hashlib.sha256(str(digests).encode()).hexdigest()


def describe(model: nn.Module) -> str:
    """A table of the model's parts: modules in 4 bits, LoRA modules, trained and all parameters."""
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
