"""Reads Lightning's checkpoints without running what is in them: tensors and plain values, no other objects.

Used by cli.py and commands/run.py. A checkpoint is a pickle, and a pickle can name any command to be run.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rime_pl.errors import RimeError

#: What our checkpoints hold, with the type of each.
PARTS = {
    "state_dict": dict,
    "loops": dict,
    "global_step": int,
    "optimizer_states": list,
    "base_hash": str,
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint, on the CPU.

    Raises:
        RimeError: If the file is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise RimeError(f"{path}: there is no such checkpoint. Give --ckpt_path the file of one.")
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as parts:  # torch looks at no checksum
            if changed := parts.testzip():
                raise zipfile.BadZipFile(changed)
            if min(part.header_offset for part in parts.infolist()):
                raise zipfile.BadZipFile("there is something before the checkpoint")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any place of zip, pickle or torch
        raise RimeError(
            f"{path} is not used: it is damaged, or holds other objects than tensors and plain values. "
            "Nothing in it was run. Put an intact copy in its place, or remove it to train from the start."
        ) from error
    for name, kind in PARTS.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind):
            raise RimeError(f"{path} is no checkpoint of a run: it has no {name}.")
    if (count := len(checkpoint["optimizer_states"])) != 1:
        raise RimeError(f"{path} is no checkpoint of a run: it must hold one optimizer, but holds {count}.")
    if not 0 <= checkpoint["global_step"] < 2**62:
        raise RimeError(f"{path} is no checkpoint of a run: its step is {checkpoint['global_step']}.")
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(tensor, torch.Tensor) or not bool(tensor.isfinite().all()):
            raise RimeError(
                f"{path} is not used: {name} must hold finite numbers, but does not. Put an intact copy in "
                "its place, or remove it to train from the start."
            )
    return dict(checkpoint)


@contextmanager
def resuming(path: Path | None, module: Any) -> Iterator[None]:
    """Refuse a checkpoint by name if the trainer stumbles over its parts while it restores them.

    Args:
        path: The checkpoint; None if nothing is resumed.
        module: Its ``restoring`` says whether parts are being restored.

    Raises:
        RimeError: If the trainer could not restore a part.
    """
    try:
        yield
    except (RimeError, OSError, MemoryError):
        raise
    except Exception as error:
        if path is None or not module.restoring:
            raise
        raise RimeError(
            f"{path} does not fit this run, or is damaged ({type(error).__name__}: {error!s:.200}). Put "
            "an intact copy in its place, or remove it to train from the start."
        ) from error


def unlike(found: Any, ours: Any, place: str = "") -> str:
    """Return the place of a value in a checkpoint that has another type than ours there; "" if there is none.

    >>> unlike({"total": {"ready": None}}, {"total": {"ready": 3}, "more": 1})
    'total.ready'
    """
    if isinstance(ours, dict) and isinstance(found, dict):
        both = (unlike(found[key], ours[key], f"{place}.{key}") for key in ours if key in found)
        return next(filter(None, both), "").lstrip(".")
    number = isinstance(ours, (int, float)) and isinstance(found, (int, float)) and 0 <= found < 2**62
    return "" if number or (type(found) is type(ours) and not isinstance(ours, (int, float))) else place


def global_step(path: Path) -> int:
    """Return the number of optimizer steps behind a checkpoint."""
    return int(read_checkpoint(path)["global_step"])


def logged_step(path: Path) -> int:
    """Return the batches behind a checkpoint. TensorBoard counts them; each may have several updates."""
    try:
        loop = read_checkpoint(path)["loops"]["fit_loop"]
        return int(loop["epoch_loop.batch_progress"]["total"]["processed"])
    except (KeyError, TypeError, ValueError) as error:
        raise RimeError(f"{path} is no checkpoint of a run: it does not say how far the run is.") from error
