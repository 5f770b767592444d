"""Reads Lightning's checkpoints without running what is in them: tensors and plain values, no other objects.

Used by cli.py and commands/run.py. A checkpoint is a pickle, and a pickle can name any command to be run.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from rime_pl.errors import RimeError

#: What our checkpoints hold, with the type of each.
PARTS = {"state_dict": dict, "loops": dict, "global_step": int, "optimizer_states": list, "base_hash": str}


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
    return dict(checkpoint)


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
