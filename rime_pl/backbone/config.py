"""The settings of the backbone: which checkpoint, in how many bits, and which parts of it train.

One dataclass inside the YAML of each stage; mllm.py builds the model from it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from rime_pl.errors import RimeError
from rime_pl.prompts import PromptConfig

#: The types that weights and matrix products may have.
Dtype = Literal["float32", "bfloat16"]
#: A higher rank of LoRA than this has more values than the matrices that it changes.
MAX_RANK = 16_384
#: All linear layers of the decoder and no others: the MLPs of a vision tower also have gate/up/down_proj.
LANGUAGE_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
#: The linear layers of the mergers of a vision tower, which make visual tokens of patches, and of its blocks.
_MERGERS = r".*visual\.(merger|deepstack_merger_list\.\d+)\.(mlp\.[02]|linear_fc[12])"
_BLOCKS = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.((linear_)?fc[12]|(gate|up|down)_proj))"
TOWER_LINEARS = {"merger": _MERGERS, "all": f"{_MERGERS}|{_BLOCKS}"}


@dataclass
class BackboneConfig:
    """Base model with 4-bit weights, LoRA and two trained token rows.

    Args:
        name_or_path: Hugging Face name or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint.
        load_in_4bit: Storage of the decoder's linear layers as NF4 with double quantisation (bitsandbytes).
        dtype: Type of frozen weights that are not 4-bit and of matrix products; trained weights are float32.
        lora_r: Rank of the LoRA matrices.
        lora_alpha: Scale of LoRA; its update is multiplied by lora_alpha / lora_r.
        lora_dropout: Dropout rate before the LoRA matrices.
        lora_targets: Regular expression that matches the whole names of the modules with LoRA in the decoder.
        lora_tower: LoRA in the vision tower: "none" leaves the tower frozen, "merger" trains the layers that
            make visual tokens of patches, "all" trains every linear layer.
        gradient_checkpointing: Recomputation of activations in the backward pass: less memory, more time.
        attn_implementation: Attention kernel: "sdpa", "eager", or a flash kernel such as "flash_attention_2".
        shard_base: Under FSDP2, division of the decoder's frozen weights among the processes; false keeps a
            whole copy on each, which takes more memory and less communication.
        shard_tower: Under FSDP2, division of the vision tower's weights among the processes; false keeps a
            whole copy on each.
        prompt: Chat layout, mode tokens and budget of a rewrite.
    """

    name_or_path: str
    load_in_4bit: bool = True
    dtype: Dtype = "bfloat16"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: str = LANGUAGE_LINEARS
    lora_tower: Literal["none", "merger", "all"] = "none"
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    shard_base: bool = True
    shard_tower: bool = False
    prompt: PromptConfig = field(default_factory=PromptConfig)

    def __post_init__(self) -> None:
        for name, value in (("lora_r", self.lora_r), ("lora_alpha", self.lora_alpha)):
            if not 1 <= value <= MAX_RANK:
                raise RimeError(
                    f"model.backbone.{name} must be at least 1 and at most {MAX_RANK}, but is {value}."
                )
        if not 0 <= self.lora_dropout < 1:
            raise RimeError(
                f"model.backbone.lora_dropout must be at least 0 and less than 1, but is {self.lora_dropout}."
            )
        try:
            re.compile(self.lora_pattern)
        except re.error as error:
            raise RimeError(
                f"model.backbone.lora_targets must be a regular expression, but {self.lora_targets!r:.90} is "
                f"none: {error}."
            ) from error

    @property
    def lora_pattern(self) -> str:
        """Return the regular expression of all modules with LoRA, for PEFT's ``target_modules``."""
        if not self.trains_tower:
            return self.lora_targets
        return f"(?:{self.lora_targets})|{TOWER_LINEARS[self.lora_tower]}"

    @property
    def trains_tower(self) -> bool:
        """Return whether a part of the vision tower trains."""
        return self.lora_tower != "none"


@dataclass(frozen=True)
class LoadSettings:
    """What a user changes when a trained model is loaded; None leaves it as it was in training.

    Args:
        dtype: Type of frozen weights that are not 4-bit and of matrix products: "float32" or "bfloat16".
        load_in_4bit: Storage of the decoder's linear layers as NF4.
        attn_implementation: Attention kernel, as ``BackboneConfig`` has it.
    """

    dtype: str | None = None
    load_in_4bit: bool | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise RimeError(
                f"dtype must be {' or '.join(map(repr, get_args(Dtype)))}, or None for that of the training, "
                f"but is {self.dtype!r}."
            )
        if self.load_in_4bit not in (None, True, False):
            raise RimeError(f"load_in_4bit must be True, False or None, but is {self.load_in_4bit!r}.")

    def given(self) -> dict[str, Any]:
        """Return the settings that are changed, by their names in ``BackboneConfig``."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def applied(self, backbone: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a backbone with these changes.

        Raises:
            RimeError: If a flash kernel of attention would get float32.
        """
        changed = backbone | self.given()
        kernel = self.attn_implementation or ""
        if "flash" in kernel and changed.get("dtype", "bfloat16") == "float32":
            raise RimeError(
                f"attn_implementation={kernel!r} needs half precision, but the dtype is float32. Give "
                "dtype='bfloat16', or attn_implementation='sdpa'."
            )
        return changed
