"""The embeddings of galleries, kept in the folder of a run, so that a second search is fast.

Called by the retriever.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Encoded:
    """The results of encoding N items."""

    embeddings: Tensor  # (N, D) float32 on the CPU, L2-normalised: dot products are cosines
    rewrites: list[str] | None  # N rewrites that the model wrote; None in the discriminative mode
    seconds: float
    unusable: dict[int, str] = field(default_factory=dict)  # item without a row here -> what is wrong


def read_encoded(file: Path) -> Encoded | None:
    """Return what was kept in a file; None, with a warning if it is damaged, where there is nothing."""
    if not file.is_file():
        return None
    try:
        return Encoded(**torch.load(file, weights_only=True))
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        warnings.warn(f"{file} is damaged and will be made again: {error}", stacklevel=4)
        return None


def keep_encoded(file: Path, encoded: Encoded) -> None:
    """Write the results into a file, whole or not at all; a folder that takes none is warned of."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half_written = file.with_suffix(".half")
        torch.save(vars(encoded), half_written)
        half_written.replace(file)
    except (OSError, RuntimeError) as error:  # e.g. a run folder without permission to write
        warnings.warn(f"The embeddings of the gallery could not be cached: {error}", stacklevel=4)


def identity(contract: Mapping[str, Any]) -> str:
    """Return all of an adapter's contract that can change an embedding."""
    backbone = {name: value for name, value in contract["backbone"].items() if name != "name_or_path"}
    rest = {n: value for n, value in contract.items() if n not in ("base", "base_paths", "tasks", "backbone")}
    return json.dumps([backbone, rest], sort_keys=True)
