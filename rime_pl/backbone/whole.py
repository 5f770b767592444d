"""Load a checkpoint into which an adapter was merged, or that was released as a whole.

Called by the loading of trained models; mllm.py loads adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rime_pl.backbone.config import BackboneConfig, LoadSettings
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.processing import CONTRACT_FILE, RimeProcessor
from rime_pl.prompts import PromptConfig


def load_whole(
    folder: str | Path,
    contract: dict[str, Any],
    device: str | torch.device | None = None,
    settings: LoadSettings = LoadSettings(),
) -> Backbone:
    """Load a checkpoint into which an adapter was merged, in eval mode.

    Args:
        folder: Of the checkpoint, with its processor.
        contract: Its contract: prompt, ids of the mode tokens, settings, fingerprint of the weights.
        device: Device of the weights; None is the CPU.
        settings: What is to be otherwise than when it was written.

    Raises:
        RimeError: If processor or weights are not those of the contract.
    """
    prompt = PromptConfig(**contract["prompt"])
    config = BackboneConfig(**settings.applied(contract["backbone"]), prompt=prompt)
    config.name_or_path = str(folder)
    processor = RimeProcessor.from_pretrained(str(folder), prompt)
    ids, expected = (
        [processor.disc_id, processor.gen_id],
        [contract["disc_token_id"], contract["gen_token_id"]],
    )
    if processor.new_tokens or ids != expected:
        raise RimeError(
            f"{folder}: the tokenizer must have the mode tokens {prompt.disc_token} and {prompt.gen_token} "
            f"with the ids {expected}, but gives {ids}. Copy the folder again."
        )
    backbone = Backbone(config, processor, device, lora=False)
    if backbone.base_hash != contract["weights_hash"]:
        raise RimeError(
            f"{folder}: the weights must be those that {CONTRACT_FILE} was written for, with fingerprint "
            f"{contract['weights_hash'][:12]}, but have {backbone.base_hash[:12]}. Copy the folder again."
        )
    return backbone.eval()
