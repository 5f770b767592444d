"""Read a released checkpoint of this family, such as UME-R1: what its own files say, and what they do not.

Called by loading.py for a folder without our contract. The tokenizer says which mode tokens there are, its
chat template says the system prompt, and config.json says the family. No file says with which words the
model is asked for a rewrite, so these must be given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from rime_pl.backbone.base_path import check_base
from rime_pl.backbone.contract import wrong_field
from rime_pl.backbone.fingerprint import base_fingerprint
from rime_pl.errors import RimeError
from rime_pl.prompts import TURN_END, TURN_START, PromptConfig

#: Names of the mode tokens in the checkpoints that we know of.
KNOWN = {"disc_token": "<disc_emb>", "gen_token": "<gen_emb>"}


def released_contract(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contract of a released checkpoint, from its files and from what the user gives.

    Args:
        folder: With config.json, safetensors and processor.
        given: Settings of ``PromptConfig``; ``rewrite_instruction`` is needed.

    Raises:
        RimeError: If the checkpoint is of another family or quantised, if it has no mode tokens, or if
            something that its files do not tell is not given.
    """
    check_base(str(folder))
    config = json.loads((folder / "config.json").read_bytes())
    if config.get("quantization_config"):
        raise RimeError(
            f"{folder}: the weights must be whole, but config.json has a quantization_config. Take the "
            "checkpoint that is not quantised, and give load_in_4bit=True."
        )
    if unknown := sorted(set(given) - {field.name for field in fields(PromptConfig)}):
        known = ", ".join(field.name for field in fields(PromptConfig))
        raise RimeError(f"prompt must hold settings of a prompt, {known}, but holds {unknown[0]!r}.")
    prompt = KNOWN | dict(given)
    processor, ids = _tokens(folder, prompt)
    _need_instruction(folder, prompt)
    if "system_prompt" not in prompt:
        prompt["system_prompt"] = _system_prompt(folder, processor)
    dtype = config.get("dtype") or config.get("torch_dtype")
    settings = {"load_in_4bit": False, "dtype": "float32" if dtype == "float32" else "bfloat16"}
    fingerprint = base_fingerprint(str(folder))
    contract = {
        **{"base": str(folder), "base_hash": fingerprint, "weights_hash": fingerprint, **ids},
        **{"prompt": prompt, "backbone": {"name_or_path": str(folder), **settings}, "tasks": {}},
    }
    if wrong := wrong_field(contract):
        raise RimeError(f"{folder}: {wrong}. Correct it in the prompt that you give.")
    return contract


def _tokens(folder: Path, prompt: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """Return the processor of a checkpoint, and the ids of its mode tokens by their names in a contract."""
    try:
        processor = AutoProcessor.from_pretrained(str(folder))
    except Exception as error:  # damaged files fail in any place of transformers
        raise RimeError(f"{folder}: its processor cannot be loaded ({error}). Copy it again.") from error
    vocabulary = processor.tokenizer.get_vocab()
    for name in KNOWN:
        if not isinstance(prompt[name], str) or prompt[name] not in vocabulary:
            raise RimeError(
                f"{folder}: the tokenizer must have the token {prompt[name]}, at which an embedding is read, "
                f"but does not. Give the name of its own as prompt={{{name!r}: ...}}; a plain base model has "
                "none, and is no trained model."
            )
    return processor, {f"{name}_id": vocabulary[prompt[name]] for name in KNOWN}


def _need_instruction(folder: Path, prompt: Mapping[str, Any]) -> None:
    """Raise a RimeError unless the words that ask for a rewrite are given."""
    if not isinstance(prompt.get("rewrite_instruction"), str):
        raise RimeError(
            f"{folder} is a whole checkpoint without rime.json. No file of it says with which words it is "
            "asked for a rewrite. Give them, as its model card has them: "
            'prompt={"rewrite_instruction": "..."} ("" if there are none, or if you need only the '
            "discriminative mode)."
        )


def _system_prompt(folder: Path, processor: Any) -> str:
    """Return the system prompt that the checkpoint's own chat template writes before a user's turn.

    Raises:
        RimeError: If the template writes something else there, or if there is none.
    """
    message = [{"role": "user", "content": [{"type": "text", "text": "A"}]}]
    try:
        written = processor.apply_chat_template(message, tokenize=False)
    except Exception as error:  # no template, or one that fails
        raise RimeError(
            f"{folder}: its chat template cannot be rendered ({error}), so the system prompt is not known. "
            'Give it: prompt={"system_prompt": "..."} ("" for none).'
        ) from error
    before, _, rest = written.partition(f"{TURN_START}user\nA")
    if rest and not before:
        return ""
    start, end = f"{TURN_START}system\n", f"{TURN_END}\n"
    if rest and before.startswith(start) and before.endswith(end):
        return str(before[len(start) : -len(end)])
    raise RimeError(
        f"{folder}: its chat template must begin with a system prompt or the user's turn, but writes "
        f"{written[:90]!r}. Give the system prompt of the training: prompt={{'system_prompt': '...'}}."
    )
