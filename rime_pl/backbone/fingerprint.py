"""The fingerprint of a base model: whether an adapter meets the model that it was trained on.

Called by mllm.py; kept in the contract of each adapter and in each checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rime_pl.errors import RimeError

#: Begins each fingerprint of this rule. Those of :func:`embedding_fingerprint` have no mark.
_MARK = "v2-"
_COLUMNS = 64  # values that are read of each row
_REFUSED = (
    "model.backbone.name_or_path must give a checkpoint in safetensors files, but {folder} has neither "
    f"{SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Load it with transformers and save it again with "
    "save_pretrained()."
)


def base_fingerprint(name_or_path: str) -> str:
    """Return a fingerprint of a checkpoint: name, shape and up to 192 values of each of its tensors.

    It is read from the files and not from the loaded model. So it is the same in 4 and in 16 bits, on each
    device, and for any number of files, and it costs a few small reads for each tensor.

    Raises:
        RimeError: If the checkpoint has no safetensors files.
    """
    known: dict[str, tuple[str, Tensor]] = {}
    # the device is given, because Lightning sets another default while the model is built
    with torch.device("cpu"):
        for file in _weight_files(name_or_path):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no dictionary)
                    part = stored.get_slice(name)
                    known[name] = (str(part.get_shape()), torch.cat([*_samples(part)]))
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(known.items()):
        digest.update(f"{name} {shape}".encode())
        digest.update(values.numpy().tobytes())
    return _MARK + digest.hexdigest()


def embedding_fingerprint(model: Any) -> str:
    """Return the fingerprint of earlier versions: the size of a model and a few rows of its embedding table.

    It sees no other weights. It is kept for the adapters and checkpoints of earlier versions.
    """
    embedding = model.get_input_embeddings().weight
    # device and dtype are given, because Lightning sets other defaults while the model is built
    last = min(1000, embedding.shape[0]) - 1
    rows = torch.linspace(0, last, 64, dtype=torch.float32, device=embedding.device).long()
    digest = hashlib.sha256(str(model.config.text_config.hidden_size).encode())
    digest.update(str(model.config.text_config.num_hidden_layers).encode())
    digest.update(embedding[rows].detach().float().cpu().numpy().round(4).tobytes())
    return digest.hexdigest()


def _weight_files(name_or_path: str) -> list[Path]:
    """Return the files that transformers loads, in the order of its own rule."""
    config = cached_file(name_or_path, CONFIG_NAME, local_files_only=True)
    folder = Path(config or name_or_path).parent
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        raise RimeError(_REFUSED.format(folder=folder))
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _samples(part: Any) -> Iterator[Tensor]:
    """Return the first values of the first, the middle and the last row of a stored tensor, as float32."""
    shape = part.get_shape()
    if len(shape) < 2:
        yield part[:_COLUMNS].float().flatten() if shape else part[...].float().flatten()
        return
    for row in sorted({0, shape[0] // 2, shape[0] - 1}):
        yield part[row : row + 1, :_COLUMNS].float().flatten()
