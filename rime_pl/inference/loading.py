"""Load a trained model: the folder of a run, an adapter, an export, or a released checkpoint.

Called by ``rime_pl.load`` in a notebook and by the commands.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rime_pl.backbone.adapters import WEIGHTS_FILE, contract_in, read_contract
from rime_pl.backbone.config import LoadSettings
from rime_pl.backbone.mllm import load_backbone
from rime_pl.backbone.whole import load_whole
from rime_pl.errors import RimeError
from rime_pl.inference.gallery_cache import identity
from rime_pl.inference.released import released_contract
from rime_pl.inference.retriever import Retriever
from rime_pl.processing import CONTRACT_FILE
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import tasks_from_json

#: Files of weights that are pickles: to read one can run any code that is in it.
PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def load(
    run: str | Path,
    device: str = "cpu",
    base: str | Path | None = None,
    dtype: str | None = None,
    load_in_4bit: bool | None = None,
    attn_implementation: str | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Retriever:
    """Return a trained model, ready to encode.

    Args:
        run: The folder of a run (``runs/<name>/cma``), or one above, if there is one adapter below it; or a
            folder that `rime export` wrote; or a released checkpoint with mode tokens of its own.
        device: Device of the model, e.g. "cuda".
        base: Folder or Hugging Face name of the base model of an adapter (default: where it was in training).
        dtype: "float32" or "bfloat16" (default: as in training).
        load_in_4bit: Storage of the decoder's linear layers as NF4 (default: as in training; an export has
            none). Another storage than in training gives other vectors, with a warning.
        attn_implementation: Attention kernel (default: as in training).
        prompt: Settings of ``PromptConfig`` that the files of a released checkpoint do not tell.

    Raises:
        RimeError: If there is no model or more than one, if its base model cannot be loaded, if weights are
            a pickle, or if a setting is not for such a folder.
    """
    settings = LoadSettings(dtype, load_in_4bit, attn_implementation)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise RimeError(
            f"device must be one that torch can use here, such as 'cpu', but is {device!r}."
        ) from error
    folder = Path(run).expanduser()
    if is_whole(folder):
        return _whole(folder, device, base, settings, prompt)
    if prompt is not None:
        raise RimeError(
            f"prompt is for a released checkpoint, but {folder} holds an adapter, which keeps its own. Leave "
            "prompt out."
        )
    if (folder / "adapter_config.json").is_file():  # an adapter that is not in a run
        refuse_pickles(folder)
    stage = None if (folder / WEIGHTS_FILE).is_file() else RunFolder.with_adapter(folder)
    return _adapter(stage.adapter if stage else folder, stage, device, base, settings)


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a whole checkpoint, and neither a run nor an adapter."""
    return (folder / "config.json").is_file() and not (folder / WEIGHTS_FILE).is_file()


def refuse_pickles(folder: Path) -> None:
    """Raise a RimeError if a folder holds weights as a pickle, which could run code when it is read."""
    for pattern in PICKLES:
        if found := sorted(folder.glob(pattern)):
            raise RimeError(
                f"{found[0]} is a pickle, which can run code when it is read: weights must be safetensors. "
                "Load it where you trust it, save it with save_pretrained(), and remove this file."
            )


def _adapter(
    folder: Path, stage: RunFolder | None, device: str, base: str | Path | None, settings: LoadSettings
) -> Retriever:
    refuse_pickles(folder)
    contract = read_contract(folder)
    try:
        backbone = load_backbone(folder, device, base, settings)
    except RimeError as error:
        if base is not None or contract.get("base_paths") or Path(contract["base"]).is_dir():
            raise
        # an earlier version kept the path only as it was typed, and it may also be the name of a download
        raise RimeError(
            f"{folder}: its base model {contract['base']} must be a folder, counted from "
            f"{Path.cwd()}, or a Hugging Face name that can be loaded, but is neither. Give the folder as "
            "base (--base)."
        ) from error
    trained = contract["backbone"].get("load_in_4bit", True)
    if settings.load_in_4bit not in (None, trained):
        warnings.warn(
            f"{folder} was trained on a base model {'in' if trained else 'without'} 4 bits and is loaded "
            f"{'without' if trained else 'in'} them: its vectors are other ones than those of its report.",
            stacklevel=3,
        )
    return Retriever(backbone, tasks_from_json(contract), stage, identity(_changed(contract, settings)))


def _whole(
    folder: Path,
    device: str,
    base: str | Path | None,
    settings: LoadSettings,
    prompt: Mapping[str, Any] | None,
) -> Retriever:
    if base is not None:
        raise RimeError(
            f"base is for an adapter, but {folder} holds a whole model, which needs no base model. Leave "
            "base (--base) out."
        )
    refuse_pickles(folder)
    if not (folder / CONTRACT_FILE).is_file():
        contract = released_contract(folder, prompt or {})
    elif prompt is not None:
        raise RimeError(
            f"prompt is for a released checkpoint without {CONTRACT_FILE}, but {folder} has one. Leave "
            "prompt out."
        )
    else:
        contract = contract_in(folder / CONTRACT_FILE)
    if settings.load_in_4bit:
        warnings.warn(
            f"{folder} holds whole weights and is loaded in 4 bits: its vectors are other ones than those of "
            "parity.json.",
            stacklevel=3,
        )
    backbone = load_whole(folder, contract, device, settings)
    return Retriever(backbone, tasks_from_json(contract), None, identity(_changed(contract, settings)))


def _changed(contract: dict[str, Any], settings: LoadSettings) -> dict[str, Any]:
    return contract | {"backbone": contract["backbone"] | settings.given()}
