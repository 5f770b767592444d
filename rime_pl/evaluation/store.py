"""Embeddings on disk, found by content: each content is embedded once, whichever tasks it belongs to.

Called by embedding.py. A part is a file of up to some hundred contents, written whole or not at all, so a
command that was killed at any moment goes on with the next part. Several processes write parts of their own.

Shape legend: N contents, D embedding width.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.inference.encoding import Meter
from rime_pl.types import Mode

#: How far the length of an embedding may be from 1.
_LENGTH = 0.01
_DIGESTS = "digests"


@dataclass(frozen=True)
class Made:
    """When and how a part was made: its times are those of then, also for a later call."""

    at: str  # ISO, UTC
    batch_size: int
    processes: int


@dataclass(frozen=True)
class Part:
    """What a file holds."""

    digests: Sequence[bytes]  # N
    vectors: Mapping[Mode, Tensor]  # mode -> (N, D) float32
    rewrites: Sequence[str] | None  # N; None without the generative mode
    meter: Meter  # what it cost
    made: Made


@dataclass
class Cost:
    """What the embeddings of some items cost, measured over the parts that hold them."""

    ms_per_item: dict[Mode, float] = field(default_factory=dict)
    rewrite_tokens: float | None = None  # mean of the items with a rewrite
    #: when and how that was measured, which may be in earlier calls: first and last part, and all settings
    measured_from: str = ""
    measured_to: str = ""
    batch_sizes: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)


class Store:
    """The parts of one model on one kind of device.

    Args:
        folder: Where they are; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[Mode, dict[bytes, tuple[Path, int]]] = {}
        self._meters: dict[Path, Meter] = {}
        self._made: dict[Path, Made] = {}
        self.refresh()

    def refresh(self) -> None:
        """Learn what parts have been written since the last call, by any process.

        A damaged file is removed with a warning, and its contents count as missing.
        """
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._meters:
                continue
            try:
                with safe_open(file, "pt") as opened:
                    digests = opened.get_tensor(_DIGESTS)
                    modes = [name for name in opened.keys() if name != _DIGESTS]  # noqa: SIM118
                    cost = json.loads(opened.metadata()["cost"])
                    made = Made(**json.loads(opened.metadata()["made"]))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                warnings.warn(f"{file} is damaged and will be made again: {error}", stacklevel=2)
                file.unlink(missing_ok=True)  # another process may have been first
                continue
            self._meters[file], self._made[file] = Meter(**cost), made
            for row, digest in enumerate(digests):
                for mode in modes:
                    self._places.setdefault(mode, {})[digest.numpy().tobytes()] = (file, row)  # type: ignore[call-overload]

    def lacks(self, digest: bytes, modes: Iterable[Mode]) -> tuple[Mode, ...]:
        """Return the modes in which a content has no embedding yet."""
        return tuple(mode for mode in modes if digest not in self._places.get(mode, {}))

    def has(self, name: str) -> bool:
        """Return whether a part of that name is written."""
        return self._file(name).is_file()

    def write(self, name: str, part: Part) -> None:
        """Write a part, whole or not at all; it is known after the next ``refresh``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = torch.frombuffer(bytearray(b"".join(part.digests)), dtype=torch.uint8)
        tensors = {_DIGESTS: digests.view(len(part.digests), -1)}
        tensors |= {mode: vectors.contiguous() for mode, vectors in part.vectors.items()}
        metadata = {"cost": json.dumps(vars(part.meter)), "made": json.dumps(vars(part.made))}
        if part.rewrites is not None:
            metadata["rewrites"] = json.dumps(part.rewrites)
        half = self.folder / f"{name}.half-{os.getpid()}"
        save_file(tensors, half, metadata)
        half.replace(self._file(name))
        for left in self.folder.glob(f"{name}.half-*"):  # by a process that was killed
            left.unlink(missing_ok=True)

    def vectors(self, digests: Sequence[bytes], mode: Mode) -> Tensor:
        """Return the embeddings of contents that are all there, (N, D) float32."""
        places = [self._places[mode][digest] for digest in digests]
        rows: dict[Path, list[int]] = {}
        for number, (file, _) in enumerate(places):
            rows.setdefault(file, []).append(number)
        found: Tensor | None = None
        for file, numbers in rows.items():
            with safe_open(file, "pt") as opened:
                vectors = opened.get_tensor(mode)
            if found is None:
                found = torch.empty(len(digests), vectors.shape[-1])
            found[numbers] = vectors[[places[number][1] for number in numbers]]
        if found is None:
            return torch.empty(0, 0)
        lengths = found.norm(dim=-1)
        if not bool(((lengths - 1).abs() < _LENGTH).all()):  # also where one is no number
            raise RimeError(
                f"{self.folder} holds damaged embeddings: each must have the length 1. Remove the folder, "
                "and give the same command again."
            )
        return found

    def rewrites(self, digests: Sequence[bytes]) -> list[str]:
        """Return the rewrites that the model wrote of contents with a generative embedding."""
        texts: dict[Path, list[str]] = {}
        written = []
        for digest in digests:
            file, row = self._places["generative"][digest]
            if file not in texts:
                with safe_open(file, "pt") as opened:
                    texts[file] = json.loads(opened.metadata()["rewrites"])
            written.append(texts[file][row])
        return written

    def cost(self, digests: Iterable[bytes], modes: Sequence[Mode]) -> Cost:
        """Return what embeddings cost: the mean over all items of the parts that hold one of them."""
        wanted, found = list(digests), Cost()
        used: set[Path] = set()
        for mode in modes:
            files = {self._places[mode][digest][0] for digest in wanted}
            used |= files
            meters = [self._meters[file] for file in files]
            items = sum(meter.items for meter in meters)
            found.ms_per_item[mode] = 1000 * sum(meter.seconds[mode] for meter in meters) / max(1, items)
            if mode == "generative":
                found.rewrite_tokens = sum(meter.rewrite_tokens for meter in meters) / max(1, items)
        made = [self._made[file] for file in used]
        times = [one.at for one in made]
        found.measured_from, found.measured_to = min(times, default=""), max(times, default="")
        found.batch_sizes = sorted({one.batch_size for one in made})
        found.processes = sorted({one.processes for one in made})
        return found

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
