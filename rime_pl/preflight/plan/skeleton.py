"""A backbone without data: the real classes, PEFT and bitsandbytes layers, on tensors that hold nothing.

Built from a config.json alone, by rehearsal.py and by `rime doctor`. No weight is read, none is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, Qwen2VLConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from rime_pl.backbone.adapters import attach_adapters
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.quantization import keep_packed_weights, linear_4bit_modules, quantization_config
from rime_pl.errors import RimeError

#: NF4 with double quantisation: values under one scale, scales under one scale of scales.
BLOCK, BLOCK_OF_SCALES = 64, 256
#: Qwen2-VL-2B-Instruct, the checkpoint of configs/*.yaml, so that they can be planned for without a download.
#: The numbers are those of `rime gpu-check`; a test holds the two together.
QWEN2_VL_2B: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
    },
}
KNOWN = {"Qwen/Qwen2-VL-2B-Instruct": QWEN2_VL_2B}


@dataclass
class Skeleton:
    """An adapted backbone whose tensors have shapes and no data."""

    config: BackboneConfig
    architecture: Any  # the checkpoint's own config
    peft: PeftModel
    mode: FakeTensorMode

    @property
    def language_model(self) -> Any:
        """The Hugging Face model, with LoRA inside."""
        return self.peft.get_base_model()

    def tensors(self) -> list[Tensor]:
        """Every weight and buffer once, the 4-bit state included."""
        found: dict[int, Tensor] = {}
        for module in self.peft.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    found[id(tensor)] = tensor
        for layer in linear_4bit_modules(self.peft).values():
            for tensor in state_tensors(layer.weight.quant_state):
                found[id(tensor)] = tensor
        return list(found.values())


def read_architecture(name_or_path: str) -> PretrainedConfig:
    """The config.json of a checkpoint: a folder, a download, or the one shape that is known by heart.

    Raises:
        RimeError: If none of them is to be had.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=name_or_path in KNOWN)
    except (OSError, ValueError) as error:
        if name_or_path in KNOWN:
            return Qwen2VLConfig.from_dict(KNOWN[name_or_path] | {"tie_word_embeddings": True})
        raise RimeError(
            f"model.backbone.name_or_path: no config.json for {name_or_path!r} ({error}). Give a folder that "
            f"holds the checkpoint's config.json (weights are not needed), or {', '.join(KNOWN)}."
        ) from error


def build_skeleton(
    config: BackboneConfig, architecture: PretrainedConfig, num_tokens: int | None = None
) -> Skeleton:
    """The backbone as `Backbone` builds it, adapters attached, in training mode.

    Args:
        config: Bits, dtype, adapters, checkpointing.
        architecture: From :func:`read_architecture`.
        num_tokens: Length of the tokenizer with both mode tokens; None if unknown: they fit in spare rows.

    Raises:
        RimeError: If ``lora_targets`` matches no linear layer, or one outside the language model.
    """
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            architecture, dtype=dtype, attn_implementation=config.attn_implementation
        )
        if num_tokens is not None and num_tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        settings: Any = quantization_config(config)
        if settings is not None:
            skipped = settings.llm_int8_skip_modules
            model = replace_with_bnb_linear(model, skipped, quantization_config=settings)
            model.is_loaded_in_4bit = True
            for layer in linear_4bit_modules(model).values():
                layer.weight.data = layer.weight.data.to(dtype)  # as it is stored
        peft = attach_adapters(model, config, [0, 1])
    mode = FakeTensorMode()
    with mode:
        _without_data(peft, dtype)
    keep_packed_weights(peft)
    skeleton = Skeleton(config, architecture, peft, mode)
    if config.gradient_checkpointing:
        skeleton.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        skeleton.language_model.enable_input_require_grads()
    peft.train()
    return skeleton


def _without_data(model: nn.Module, dtype: torch.dtype) -> None:
    """Meta tensors become tensors that claim to lie on the CPU, so that the CPU's operations are chosen."""
    packed = {id(layer.weight) for layer in linear_4bit_modules(model).values()}
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones are kept: an id is unique among the living
    for module in model.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for group in groups:
            for name, old in group.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = (
                        pack(old.shape, dtype)
                        if id(old) in packed
                        else torch.empty(old.shape, dtype=old.dtype)
                    )
                    if group is module._parameters and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = (old, new)
                group[name] = made[id(old)][1]


def pack(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """An NF4 weight with its double-quantised state, of the sizes that bitsandbytes gives them.

    Args:
        shape: Of the weight before packing.
        dtype: Storage type of the packed bytes, and of the products.
    """
    from bitsandbytes.functional import QuantState

    elements = shape.numel()
    blocks = -(-elements // BLOCK)
    scales = QuantState(
        torch.empty(-(-blocks // BLOCK_OF_SCALES)),
        code=torch.empty(256),
        blocksize=BLOCK_OF_SCALES,
        dtype=torch.float32,
    )
    weight: Any = nn.Parameter(torch.empty(-(-elements // 2) // dtype.itemsize, 1, dtype=dtype), False)
    weight.quant_state = QuantState(
        torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    return weight


def state_tensors(state: Any) -> list[Tensor]:
    """The tensors of a bitsandbytes quantisation state, those of its scales included."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]
