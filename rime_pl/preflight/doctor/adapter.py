"""Does an adapter folder fit what is here? Files, base, token rows and the pooling contract.

Called by `rime doctor --adapter RUN`. The base is loaded once, without 4 bits and without training it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText

from rime_pl.backbone.adapters import WEIGHTS_FILE, base_fingerprint, read_contract, state_hash
from rime_pl.errors import RimeError
from rime_pl.preflight.doctor.result import Check, ok, problem, warning
from rime_pl.processing import RimeProcessor

AGAIN = "Copy the folder again, or train the stage again."


def check_adapter(folder: Path, base: str | None = None) -> list[Check]:
    """Every check of one adapter folder.

    Args:
        folder: ``<run>/<stage>/adapter``.
        base: Its base, where it lies elsewhere now; None takes the one that the contract names.
    """
    try:
        contract = read_contract(folder)
    except (RimeError, json.JSONDecodeError) as error:
        return [problem("adapter", f"{folder}: {error}", "Give the folder of a finished run.")]
    found = [weights(folder, contract)]
    try:
        processor = RimeProcessor.from_adapter(folder)
    except (RimeError, KeyError, TypeError) as error:
        return [*found, problem("pooling contract", f"no processor beside the adapter: {error}", AGAIN)]
    found.append(pooling(contract, processor))
    found.append(token_rows(folder, len(processor.tokenizer), contract))
    found.append(fingerprint(contract, base or contract["backbone"]["name_or_path"]))
    return found


def weights(folder: Path, contract: dict[str, Any]) -> Check:
    """The weights are those that the contract was written for."""
    from safetensors.torch import load_file

    try:
        same = state_hash(load_file(folder / WEIGHTS_FILE)) == contract["weights_hash"]
    except SafetensorError as error:
        return problem("adapter weights", f"{folder / WEIGHTS_FILE} cannot be read: {error}", AGAIN)
    if not same:
        return problem(
            "adapter weights", "content and weights_hash differ: the file is damaged or another", AGAIN
        )
    return ok(
        "adapter weights", f"{(folder / WEIGHTS_FILE).stat().st_size / 2**20:.1f} MiB, content as saved"
    )


def pooling(contract: dict[str, Any], processor: RimeProcessor) -> Check:
    """Both embeddings are read where they were trained to be."""
    for name, value in processor.contract().items():
        if contract.get(name) != value:
            seen = f"{name} is {contract.get(name)} in the contract and {value} in the tokenizer beside it"
            return problem("pooling contract", seen, AGAIN)
    prompt = processor.prompt
    seen = f"{prompt.disc_token} is {processor.disc_id}, {prompt.gen_token} is {processor.gen_id}"
    return ok("pooling contract", seen)


def token_rows(folder: Path, num_tokens: int, contract: dict[str, Any]) -> Check:
    """A trained row for each mode token, at ids that the tokenizer has."""
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            names = [name for name in file.keys() if "trainable_tokens" in name]  # noqa: SIM118
            rows = {name: file.get_slice(name).get_shape()[0] for name in names}
    except SafetensorError as error:
        return problem("token rows", f"{folder / WEIGHTS_FILE} cannot be read: {error}", AGAIN)
    ids = (contract["disc_token_id"], contract["gen_token_id"])
    if not rows or any(count != len(set(ids)) for count in rows.values()):
        return problem("token rows", f"{rows or 'none'} in the adapter, {len(set(ids))} mode tokens", AGAIN)
    if max(ids) >= num_tokens:
        return problem("token rows", f"id {max(ids)}, but the tokenizer has {num_tokens} tokens", AGAIN)
    return ok("token rows", f"{len(set(ids))} trained, ids {ids[0]} and {ids[1]} of {num_tokens} tokens")


def fingerprint(contract: dict[str, Any], base: str) -> Check:
    """The base is the one that the adapter was trained on."""
    name = "base fingerprint"
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=contract["backbone"]["dtype"])
    except (OSError, ValueError) as error:
        remedy = "Give the folder of the base with --model.backbone.name_or_path and --config."
        return warning(name, f"{base} cannot be loaded here: {error}", remedy)
    seen = base_fingerprint(model)
    if seen != contract["base_hash"]:
        text = f"{base} has {seen[:12]}, the adapter was trained on {contract['base_hash'][:12]}"
        return problem(
            name, text, "Use the base that the adapter was trained on, or train again on this one."
        )
    return ok(name, f"{base}: {seen[:12]}")
