"""Embeds many items part by part, and keeps each part in the run folder, so that a stopped command goes on.

Called by `rime mine`, which embeds a whole training split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rime_pl.errors import DataError
from rime_pl.inference.gallery_cache import Encoded, keep_encoded, read_encoded
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.sources import Source
from rime_pl.types import Mode

#: Folder of the parts, in a run folder.
PARTS = "embeddings"
#: Items of a part.
PART = 256


@dataclass
class Vectors:
    """The embeddings of N items; the row of an item that cannot be used is zeros."""

    of_mode: dict[Mode, Tensor]  # mode -> (N, D) float32 on the CPU, L2-normalised
    unusable: dict[int, str]  # number of an item -> what is wrong


def encode_in_parts(
    model: Retriever,
    items: Sequence[Source],
    digests: Sequence[bytes],
    modes: Sequence[Mode],
    batch_size: int = 32,
    each: Callable[[int], object] = lambda count: None,
) -> Vectors:
    """Return the embeddings of items that are read when they are asked for.

    A part whose items are the same as in an earlier call, with the same adapter, comes from the run folder.

    Args:
        model: The trained model.
        items: N items; a slice of them reads nothing.
        digests: What decides the embedding of each item.
        modes: Modes to embed in.
        batch_size: Largest number of items in a forward.
        each: Called with the number of items that are done.

    Raises:
        RimeError: If an embedding is not finite.
    """
    found = Vectors({mode: torch.zeros(len(items), model.dimension) for mode in modes}, {})
    for start in range(0, len(items), PART):
        part = slice(start, min(start + PART, len(items)))
        names = {mode: _file(model, mode, digests[part]) for mode in modes}
        kept: dict[Mode, Encoded | None] = {}
        for mode, file in names.items():
            kept[mode] = read_encoded(file) if file else None
        if missing := [mode for mode, encoded in kept.items() if encoded is None]:
            made, unusable = _encode(model, items[part], missing, batch_size)
            found.unusable |= {start + number: says for number, says in unusable.items()}
            kept.update(made)
            for mode, new in made.items():
                if (place := names[mode]) and not unusable:  # what is wrong may be repaired by then
                    keep_encoded(place, new)
        for mode, encoded in kept.items():
            if encoded is not None:
                rows = [n for n in range(part.start, part.stop) if n - part.start not in encoded.unusable]
                found.of_mode[mode][rows] = encoded.embeddings
        each(part.stop - part.start)
    return found


def _encode(
    model: Retriever, items: Sequence[Source], modes: Sequence[Mode], batch_size: int
) -> tuple[dict[Mode, Encoded], dict[int, str]]:
    """Return the results and what is wrong with the others; no results if no item can be used."""
    try:
        made = model.encode_modes(items, modes, batch_size, skip_unusable=True)
    except DataError:
        unusable = {}
        for number in range(len(items)):
            try:
                items[number]
            except DataError as error:
                unusable[number] = str(error)
        if len(unusable) < len(items):
            raise
        return {}, unusable
    return made, next(iter(made.values())).unusable


def _file(model: Retriever, mode: Mode, digests: Sequence[bytes]) -> Path | None:
    """Return where a part is kept; None without a run folder."""
    if model.run is None:
        return None
    key = hashlib.sha256(f"{model.name} {mode} ".encode() + b"".join(digests)).hexdigest()[:32]
    return model.run.path / PARTS / f"{key}.pt"
