"""The adapter, the trained part of a backbone: LoRA matrices and two token rows, in a folder that PEFT loads.

Called by mllm.py to attach and load it, and by the AdapterCheckpoint callback to write it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rime_pl.backbone.config import TOWER_LINEARS, BackboneConfig
from rime_pl.backbone.contract import wrong_field
from rime_pl.errors import RimeError
from rime_pl.places import places_of
from rime_pl.processing import CONTRACT_FILE, RimeProcessor

WEIGHTS_FILE = "adapter_model.safetensors"
_AGAIN = "Copy it again, or train the stage again."


def attach_adapters(
    model: PreTrainedModel, config: BackboneConfig, token_ids: list[int], lora: bool = True
) -> PeftModel:
    """Freeze the model and add LoRA matrices and trainable rows for the mode tokens, all in float32.

    Args:
        model: The loaded checkpoint, quantised or not.
        config: Rank, scale, dropout and target pattern of LoRA.
        token_ids: Ids of ``<disc_emb>`` and ``<gen_emb>``.
        lora: False leaves the LoRA matrices out, for a model into which they were merged.

    Raises:
        RimeError: If ``lora_targets`` matches no linear layer, or one outside the language model, or if
            ``lora_tower`` misses a layer of the vision tower.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linears if re.fullmatch(config.lora_targets, name)]
    if not matched:
        raise RimeError(
            "model.backbone.lora_targets must match the whole name of a linear layer of "
            f"{config.name_or_path}, e.g. {linears[-2]!r}, but {config.lora_targets!r} matches none."
        )
    outside = [name for name in matched if "language_model." not in name]
    if outside:
        raise RimeError(
            "model.backbone.lora_targets must match layers of the language model only, but "
            f"{config.lora_targets!r} matches {outside[0]!r}, which is not in the language model. Begin the "
            "pattern with '.*language_model', as the default does. To train the vision tower, too, set "
            "model.backbone.lora_tower."
        )
    _check_tower(config, linears)
    rows = {"embed_tokens": token_ids}
    if not model.config.tie_word_embeddings:
        rows["lm_head"] = token_ids  # an untied output layer needs its own row to predict <gen_emb>
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_pattern if lora else DUMMY_TARGET_MODULES,
        trainable_token_indices=rows,
        # not "CAUSAL_LM", because that class expects a forward with text only
        task_type=None,
    )
    # Trained weights are float32 even if the base model is bfloat16. At the learning rate of
    # configs/refine_rl.yaml, most updates are too small to change a bfloat16 number.
    return get_peft_model(model, settings, autocast_adapter_dtype=True)


def _check_tower(config: BackboneConfig, linears: list[str]) -> None:
    """Raise a RimeError if the part of the tower that is to train has a linear layer of an unknown name."""
    if not config.trains_tower:
        return
    part = [name for name in linears if ".visual." in name]
    if config.lora_tower == "merger":
        part = [name for name in part if ".visual.blocks." not in name]
    missed = [name for name in part if not re.fullmatch(TOWER_LINEARS[config.lora_tower], name)]
    if missed:
        raise RimeError(
            f"model.backbone.lora_tower={config.lora_tower} must find every linear layer there, but does not "
            f"know {missed[0]!r}. It knows the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Set it to none."
        )


def adapter_state(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of the adapter on the CPU, with the names that PEFT uses.

    Args:
        model: The model with the adapter.
        state_dict: Its tensors, if they had to be gathered from several ranks first.
    """
    state = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def save_adapter(
    folder: str | Path,
    model: PeftModel,
    state: dict[str, Tensor],
    processor: RimeProcessor,
    config: BackboneConfig,
    base_hash: str,
    tasks: Mapping[str, Any] | None = None,
) -> None:
    """Write adapter weights, PEFT config, processor files and the pooling contract into ``folder``.

    Args:
        folder: Created if it does not exist.
        model: Gives the PEFT config.
        state: From :func:`adapter_state`.
        processor: Saved too, so that encoding needs only this folder and the base model.
        config: How the base model was loaded.
        base_hash: ``base_fingerprint`` of the base model.
        tasks: Instructions of the tasks that it was trained on, see ``training_texts.py``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    processor.save_pretrained(folder)
    backbone = {name: value for name, value in asdict(config).items() if name != "prompt"}
    hashes = {"base_hash": base_hash, "weights_hash": state_hash(state)}
    contract = processor.contract() | {"base": config.name_or_path, "backbone": backbone} | hashes
    contract |= {"base_paths": places_of(config.name_or_path, folder), "tasks": tasks or {}}
    (folder / CONTRACT_FILE).write_text(json.dumps(contract, indent=2) + "\n")


def load_adapter_weights(
    model: PeftModel,
    folder: str | Path,
    processor: RimeProcessor,
    base_hash: str,
    old_base_hash: str = "",
) -> None:
    """Load the weights of an adapter folder into a model that has an adapter, if they fit.

    Args:
        model: The model with an adapter.
        folder: The adapter folder.
        processor: That of the model. Its budget of a rewrite may be larger than the adapter's.
        base_hash: ``base_fingerprint`` of the model.
        old_base_hash: Its ``embedding_fingerprint``, for adapters of earlier versions.

    Raises:
        RimeError: If the folder holds no adapter or a damaged one, or if prompt, mode tokens, base model or
            shapes of tensors (rank, targets) differ.
    """
    folder = Path(folder)
    contract = read_contract(folder)
    for name, value in processor.contract().items():
        if _with_larger_budget(contract.get(name), value) != value:
            raise RimeError(
                f"{folder / CONTRACT_FILE}: {name} must be that of this run, {value}, but is "
                f"{contract.get(name)}. Use the model.backbone.prompt and the base model of the adapter; "
                "only max_rewrite_tokens may be larger than the adapter's."
            )
    _check_base(folder, contract, base_hash, old_base_hash)
    state = _read_weights(folder / WEIGHTS_FILE, contract["weights_hash"])
    ours = adapter_state(model)
    expected = {name: tuple(t.shape) for name, t in ours.items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
        raise RimeError(
            f"{folder}: tensor {name} must have the same shape in adapter and model, but has "
            f"{found.get(name)} and {expected.get(name)}. Use the lora_r, lora_targets and lora_tower of "
            "the adapter."
        )
    for name, tensor in state.items():
        if tensor.dtype != ours[name].dtype:
            raise RimeError(
                f"{folder / WEIGHTS_FILE}: tensor {name} must be {ours[name].dtype}, as it was saved, but is "
                f"{tensor.dtype}. {_AGAIN}"
            )
    set_peft_model_state_dict(model, state)


def _check_base(folder: Path, contract: dict[str, Any], base_hash: str, old_base_hash: str) -> None:
    """Raise a RimeError if the adapter was trained on another base model."""
    if contract["base_hash"] == old_base_hash:
        warnings.warn(
            f"{folder} was saved by an earlier version, whose fingerprint of the base model covers only the "
            "embedding table. Whether the other weights are those of its training is not checked.",
            stacklevel=3,
        )
    elif contract["base_hash"] != base_hash:
        raise RimeError(
            f"{folder}: model.backbone.name_or_path must give the base model that this adapter was trained "
            f"on, {contract['base']} with fingerprint {contract['base_hash'][:12]}, but gives one with "
            f"fingerprint {base_hash[:12]}."
        )


def _with_larger_budget(saved: Any, value: Any) -> Any:
    """Return a saved prompt with the budget of this run, if that is larger; anything else as it is."""
    name = "max_rewrite_tokens"
    if not isinstance(saved, dict) or not isinstance(value, dict):
        return saved
    return saved | {name: value[name]} if saved.get(name, 0) < value[name] else saved


def _read_weights(path: Path, expected_hash: str) -> dict[str, Tensor]:
    try:
        state = load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # types that torch does not have
        raise RimeError(f"{path} is damaged ({error}). {_AGAIN}") from error
    if state_hash(state) != expected_hash:
        raise RimeError(f"{path} is damaged: it does not match weights_hash in {CONTRACT_FILE}. {_AGAIN}")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise RimeError(f"{path}: tensor {name} must hold finite numbers, but does not. {_AGAIN}")
    return state


def trained_values(model: Any) -> dict[str, Tensor]:
    """Return a copy of all trained values, e.g. as the frozen reference of reinforcement learning."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapter_values(model: Any, values: dict[str, Tensor]) -> Iterator[None]:
    """Give the model other adapter values for a while: a second model that shares the base model's memory.

    Args:
        model: The model that ``values`` were copied from.
        values: From :func:`trained_values`.

    Raises:
        RuntimeError: If gradients are on, because a backward pass would need values that are gone by then.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("adapter_values must be used under torch.no_grad().")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p.data for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data = values[name]
        yield
    finally:
        for name, p in trained.items():
            p.data = own[name]


def read_contract(folder: str | Path) -> dict[str, Any]:
    """Return the pooling contract of an adapter folder: how and with which base model it was trained.

    Raises:
        RimeError: If the folder holds no adapter.
    """
    path = Path(folder) / CONTRACT_FILE
    if not path.is_file() or not (Path(folder) / WEIGHTS_FILE).is_file():
        raise RimeError(f"{folder} must hold an adapter, with the files {CONTRACT_FILE} and {WEIGHTS_FILE}.")
    return contract_in(path)


def contract_in(path: Path) -> dict[str, Any]:
    """Return the contract in a file, of an adapter or of a whole model.

    Raises:
        RimeError: If the file is damaged.
    """
    try:
        contract = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RimeError(f"{path} is damaged: it is no JSON ({error}). {_AGAIN}") from error
    if wrong := wrong_field(contract):
        raise RimeError(f"{path} is damaged: {wrong}. {_AGAIN}")
    return dict(contract)


def state_hash(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
