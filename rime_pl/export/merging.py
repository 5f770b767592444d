"""Merge an adapter into whole weights: an ordinary checkpoint that computes what was trained.

Called by exporting.py. A run with a 4-bit base model learnt LoRA for the NF4 values, not for the values that
were rounded to them. So LoRA is added to the dequantised values, and the sum is rounded once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig

from rime_pl.backbone.lora import trained_table
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.generation.decoding import suppressed_tokens

#: Into which values LoRA is merged: those of its training, or those of the base model's files.
Weights = Literal["trained", "original"]


@torch.no_grad()
def merged_model(backbone: Backbone, weights: Weights, dtype: torch.dtype) -> Any:
    """Return the Hugging Face model of a backbone with its adapter inside, on the CPU, in eval mode.

    Args:
        backbone: With or without LoRA; it stays as it is.
        weights: Values to merge into: "trained" are the dequantised NF4 values if the base model is in 4
            bits; "original" are those of the base model's files.
        dtype: Of all weights.
    """
    name_or_path = backbone.config.name_or_path
    model: Any = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype, use_safetensors=True)
    size = len(trained_table(backbone.language_model.get_input_embeddings().token_adapter).frozen)
    if size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    packed = linear_4bit_modules(backbone.language_model) if weights == "trained" else {}
    for name, layer in backbone.language_model.named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            frozen = _values(packed.get(f"{name}.base_layer"), model.get_submodule(name).weight)
            _write(model, name, frozen + _change(layer))
        elif name in packed and not name.endswith(".base_layer"):
            _write(model, name, _values(packed[name], model.get_submodule(name).weight))
    _write_rows(model, backbone)
    model.generation_config = greedy(backbone)
    return model.eval()


def _values(packed: Any, weight: Tensor) -> Tensor:
    """Return what a linear layer multiplies by, in float32 on the CPU: its 4-bit values, or a weight."""
    if packed is None:
        return weight.float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.weight.data, packed.weight.quant_state).float().cpu()


def _change(layer: Any) -> Tensor:
    (name,) = layer.active_adapters
    product = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return (product * layer.scaling[name]).cpu()


def _write(model: Any, name: str, weight: Tensor) -> None:
    parameter = model.get_submodule(name).weight
    parameter.copy_(weight.to(parameter.dtype))


def _write_rows(model: Any, backbone: Backbone) -> None:
    """Put the trained rows of the mode tokens into the embedding table, and into a head of its own."""
    ours = backbone.language_model
    pairs = [(model.get_input_embeddings(), ours.get_input_embeddings())]
    if not model.config.tie_word_embeddings:
        pairs.append((model.get_output_embeddings(), ours.lm_head))
    for layer, trained in pairs:
        table = trained_table(trained.token_adapter)
        layer.weight[list(table.ids)] = table.trained.to(layer.weight.dtype).cpu()


def greedy(backbone: Backbone) -> GenerationConfig:
    """Return how `generate` writes a rewrite as our code does: greedily, and no other special token."""
    processor, head = backbone.processor, backbone.head()
    never: list[int] = (
        suppressed_tokens(processor, len(head.frozen), torch.device("cpu")).nonzero()[:, 0].tolist()
    )
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=processor.prompt.max_rewrite_tokens,
        eos_token_id=[processor.gen_id, processor.turn_end_id],
        pad_token_id=processor.pad_id,
        suppress_tokens=never,
    )
