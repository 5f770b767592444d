"""Embeds the items of a task in parts, on one or several processes, and goes on where it was stopped.

Called by `rime eval`. Lightning's ``Trainer.predict`` starts the processes. Each process hashes a share of
the items, all learn the hashes, and each embeds every n-th part that is missing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from rime_pl import __version__
from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.errors import DataError, RimeError
from rime_pl.evaluation.digests import as_source, item_digest
from rime_pl.evaluation.store import Made, Part, Store
from rime_pl.inference.encoding import Meter
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.sources import holds_opened
from rime_pl.processing import CONTRACT_FILE
from rime_pl.types import Item, Mode, Side

#: Items of a part: what a kill costs at most, on each process.
PART = 128


@dataclass(frozen=True)
class Asked:
    """The items of one side of a task, and the modes to embed them in."""

    side: Side
    items: Sequence[Item]
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class Digests:
    """The hashes of both sides of a task, one for each item."""

    queries: list[bytes]
    candidates: list[bytes]
    texts_cut: dict[Side, int] = field(default_factory=dict)  # items whose text the model reads in part


@dataclass(frozen=True)
class _Content:
    """What is known of an item before it is embedded."""

    digest: bytes
    opened: bool  # whether its media are in memory as soon as it is read
    cut: bool  # whether its text is too long


@dataclass(frozen=True)
class _Piece:
    """A part that is to be written."""

    name: str
    asked: Asked
    rows: list[int]
    digests: list[bytes]
    modes: tuple[Mode, ...]
    opened: bool  # whether some media are in memory as soon as the item is read


class Rows(Sequence[Item]):
    """Some items of a sequence, each read when it is asked for."""

    def __init__(self, items: Sequence[Item], rows: Sequence[int]) -> None:
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.items, self.rows[index])
        return as_source(self.items[self.rows[index]])


def sides_of(task: BenchmarkTask, pairs: Sequence[str]) -> tuple[Asked, Asked]:
    """Return the sides of a task with the modes that some pairs of modes need, such as "gen-disc"."""
    names: dict[str, Mode] = {"disc": "discriminative", "gen": "generative"}
    halves = [pair.split("-") for pair in pairs]
    queries, targets = (
        tuple(mode for name, mode in names.items() if any(half[at] == name for half in halves))
        for at in range(2)
    )
    return Asked("query", task.queries, queries), Asked("target", task.candidates, targets)


class Embedder(L.LightningModule):
    """Embeds one task after the other; the model is no part of this module, because it is on its device.

    Args:
        model: The trained model.
        store: Where embeddings are kept.
        batch_size: Largest number of items in a forward.
        progress: Called with the number of contents of the task that all processes have embedded, and with
            the number that was missing.
    """

    def __init__(
        self,
        model: Retriever,
        store: Store,
        batch_size: int,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.retriever, self.store, self.batch_size, self.progress = model, store, batch_size, progress
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer parts than processes
        self.task_name = ""
        self.asked: tuple[Asked, Asked] | None = None
        self.found = Digests([], [])
        self.pieces: list[_Piece] = []
        self.fault = ""  # why an item of the task cannot be embedded, on this process

    def embed(self, trainer: L.Trainer, name: str, asked: tuple[Asked, Asked]) -> Digests:
        """Embed what is missing of a task and return its hashes. All processes must call it.

        Args:
            trainer: Starts the processes at the first call.
            name: Name of the task in errors.
            asked: The queries and the candidates.

        Raises:
            DataError: If an item cannot be embedded: task, side and number of the item are named. It is
                raised on all processes, and the next task can follow.
        """
        self.task_name, self.asked, self.fault = name, asked, ""
        trainer.predict(self, return_predictions=False)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.store.refresh()
        self._tell()
        if fault := self._agreed():
            raise DataError(fault)
        return self.found

    def predict_dataloader(self) -> DataLoader[int]:
        """Return the numbers of the parts that this process embeds."""
        assert self.asked is not None, "embed() says what to embed"
        rank, world = self.trainer.global_rank, self.trainer.world_size
        self.store.refresh()
        hashed = [self._hashed(asked, rank, world) for asked in self.asked]
        if not self.fault:
            cut: dict[Side, int] = {
                asked.side: sum(one.cut for one in rows)
                for asked, rows in zip(self.asked, hashed, strict=True)
            }
            queries, candidates = ([one.digest for one in rows] for rows in hashed)
            self.found = Digests(queries, candidates, cut)
        self.pieces = [] if self.fault else list(self._missing(hashed))
        self._tell()
        return DataLoader(range(rank, len(self.pieces), world), batch_size=None)  # type: ignore[arg-type]

    def predict_step(self, number: int) -> None:
        """Embed a part and write it; after a fault, the parts that are left are not needed."""
        piece = self.pieces[number]
        if self.fault or self.store.has(piece.name):
            return
        items: Sequence[Item] = Rows(piece.asked.items, piece.rows)
        self.retriever.meter = Meter()
        try:
            if not piece.opened:
                items = list(items)  # then the retriever sorts them by length
            encoded = self.retriever.encode_modes(items, piece.modes, self.batch_size)
        except (DataError, OSError) as error:
            self.fault = self._named(error, piece)
            return
        except RimeError as error:  # of the model, so that other tasks would fail as well
            raise RimeError(self._named(error, piece)) from error
        rewrites = encoded["generative"].rewrites if "generative" in encoded else None
        vectors = {mode: one.embeddings for mode, one in encoded.items()}
        made = Made(datetime.now(UTC).isoformat(timespec="seconds"), self.batch_size, self.trainer.world_size)
        self.store.write(piece.name, Part(piece.digests, vectors, rewrites, self.retriever.meter, made))
        self._tell()

    def _hashed(self, asked: Asked, rank: int, world: int) -> list[_Content]:
        """Return what is known of each item, of which each process reads a share; [] after a fault."""
        mine: list[_Content] = []
        for row in () if self.fault else range(rank, len(asked.items), world):
            try:
                item = asked.items[row]
                cut = self.retriever.backbone.processor.cuts(item)
                mine.append(_Content(item_digest(item), holds_opened(item), cut))
            except (DataError, OSError) as error:
                self.fault = f"{self.task_name}: {_shown(asked.side)} {row} cannot be read: {error}"
                break
        self.fault = self._agreed()
        if self.fault:
            return []
        if world == 1:
            return mine
        shares: list[Any] = [None] * world
        torch.distributed.all_gather_object(shares, mine)
        return [shares[row % world][row // world] for row in range(len(asked.items))]

    def _agreed(self) -> str:
        """Return the fault of the first process that has one. All processes must call it."""
        world = self.trainer.world_size
        if world == 1:
            return self.fault
        faults: list[Any] = [""] * world
        torch.distributed.all_gather_object(faults, self.fault)
        return str(next(filter(None, faults), ""))

    def _missing(self, hashed: Sequence[Sequence[_Content]]) -> Iterator[_Piece]:
        """Yield the parts that are missing; the same on all processes, and after a kill."""
        planned: dict[bytes, set[Mode]] = {}
        for asked, rows in zip(self.asked or (), hashed, strict=True):
            first: dict[bytes, int] = {}
            for row, one in enumerate(rows):
                first.setdefault(one.digest, row)
            distinct = list(first.items())
            for start in range(0, len(distinct), PART):  # of all contents, so that a kill moves no border
                groups: dict[tuple[Mode, ...], list[tuple[bytes, int]]] = {}
                for digest, row in distinct[start : start + PART]:
                    others = planned.setdefault(digest, set())
                    lacks = tuple(m for m in self.store.lacks(digest, asked.modes) if m not in others)
                    others.update(lacks)
                    if lacks:
                        groups.setdefault(lacks, []).append((digest, row))
                for modes, group in groups.items():
                    digests, numbers = [digest for digest, _ in group], [row for _, row in group]
                    key = hashlib.sha256("-".join(modes).encode() + b"".join(digests)).hexdigest()[:32]
                    opened = any(rows[row].opened for row in numbers)
                    yield _Piece(key, asked, numbers, digests, modes, opened)

    def _tell(self) -> None:
        if self.trainer.is_global_zero:
            sizes = [(len(piece.rows), self.store.has(piece.name)) for piece in self.pieces]
            self.progress(sum(size for size, done in sizes if done), sum(size for size, _ in sizes))

    def _named(self, error: Exception, piece: _Piece) -> str:
        """Return an error with the number of the item in its task."""

        def number(found: re.Match[str]) -> str:
            place = int(found[1] or 0)
            return f"{_shown(piece.asked.side)} {piece.rows[place]}" if place < len(piece.rows) else found[0]

        return f"{self.task_name}: {re.sub(r'the item|item ([0-9]+)', number, str(error), count=1)}"


def _shown(side: Side) -> str:
    return "query" if side == "query" else "candidate"


def versions() -> dict[str, str]:
    """Return the versions of what decodes pictures, makes patches of them, and embeds them."""
    others = {package: metadata.version(package) for package in ("transformers", "torch", "pillow")}
    return {"rime_pl": __version__, **others}


def store_of(cache: Path, model: Retriever) -> Store:
    """Return the embeddings that are kept of a model on its kind of device.

    Raises:
        RimeError: If the model has no name: its embeddings could be taken for those of another.
    """
    if not model.name:
        raise RimeError(
            "A model whose embeddings are kept must have a name, but has none. Load it from a run."
        )
    device = next(model.backbone.parameters()).device.type
    known = hashlib.sha256(f"{model.name} {device}".encode())
    for package, version in versions().items():
        known.update(f" {package} {version}".encode())
    if model.run is not None:  # sizes of pictures may stand only in these files
        for file in sorted(model.run.adapter.glob("*.json")):
            if file.name != CONTRACT_FILE:  # what it says of vectors is in the name
                known.update(file.name.encode() + file.read_bytes())
    return Store(cache / known.hexdigest()[:16])


def make_trainer(accelerator: str, devices: int) -> L.Trainer:
    """Return what runs the embedding on one or several processes.

    Args:
        accelerator: "cpu" or "gpu".
        devices: Number of processes, each with a device of its own.
    """
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,  # the module divides the parts
        inference_mode=False,  # weights that are merged for a while must stay ordinary tensors
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
