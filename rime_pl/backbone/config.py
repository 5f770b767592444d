"""The settings of the backbone: which checkpoint, in how many bits, and what of it trains.

One flat dataclass inside each stage's YAML; built into a model by mllm.py, never at import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rime_pl.prompts import PromptConfig

#: All linear layers of the decoder, and of nothing else: vision MLPs share the names gate/up/down_proj.
LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass
class BackboneConfig:
    """One multimodal language model with 4-bit base weights, LoRA and two trained token rows.

    Args:
        name_or_path: Hugging Face name or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint.
        load_in_4bit: Store the decoder's linear layers as NF4 with double quantisation (bitsandbytes).
        dtype: Of everything frozen that is not 4-bit, and of its matrix products; what trains is float32.
        lora_r: Rank of the LoRA matrices.
        lora_alpha: LoRA scale; the update is multiplied by lora_alpha / lora_r.
        lora_dropout: Dropout before the LoRA matrices.
        lora_targets: Regular expression over module names; must match whole names.
        gradient_checkpointing: Recompute activations in the backward pass, for less memory.
        attn_implementation: "sdpa", "eager" or an attention kernel that transformers knows.
        shard_base: Under FSDP2, also split the decoder's frozen weights over the processes; false leaves a
            whole copy on each, for more memory and less traffic.
        prompt: Chat layout, mode tokens and rewrite budget.
    """

    name_or_path: str
    load_in_4bit: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: str = LANGUAGE_LINEARS
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    shard_base: bool = True
    prompt: PromptConfig = field(default_factory=PromptConfig)
