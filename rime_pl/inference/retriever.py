"""The trained model in use: load a run, encode texts and pictures, search among them.

``rime_pl.load(run)`` in a notebook and ``rime search`` in a terminal are both this file.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import Tensor

from rime_pl.backbone.adapters import read_contract
from rime_pl.backbone.mllm import Backbone, load_backbone
from rime_pl.errors import RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.run_folder import RunFolder
from rime_pl.types import Item, Mode

#: A text, a picture (a path or opened), or both with an instruction.
Source = str | Path | Image.Image | Item
MODES: tuple[Mode, ...] = ("discriminative", "generative")
CACHE = "search_cache"
#: Qwen-VL's image processor refuses longer pictures.
MAX_ASPECT = 200


@dataclass
class Encoded:
    """What encoding N items gives."""

    embeddings: Tensor  # (N, D) float32 on the CPU, L2-normalised: dot products are cosines
    rewrites: list[str] | None  # N texts that the model wrote; None in the discriminative mode
    seconds: float


@dataclass
class Hit:
    """One gallery item found."""

    place: int  # in the gallery, from 0
    item: Item
    score: float  # cosine
    rewrite: str | None  # of the gallery item


@dataclass
class Found:
    """What one search gives."""

    hits: list[Hit]  # best first
    rewrite: str | None  # of the query
    encode_ms: float  # of the query: one forward, or writing and one forward
    search_ms: float  # comparing with the gallery


class Retriever:
    """Encodes and searches with a trained adapter.

    Args:
        backbone: In eval mode.
        name: What identifies base and adapter in the cache of gallery embeddings.
        cache: Folder of that cache; None keeps nothing on disk.
    """

    def __init__(self, backbone: Backbone, name: str = "", cache: Path | None = None) -> None:
        self.backbone = backbone
        self.name = name
        self.cache = cache
        self.gallery: list[Item] = []
        self._encoded: dict[Mode, Encoded] = {}

    def encode(
        self,
        items: Sequence[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        instruction: str = "",
    ) -> Tensor:
        """Embeddings of texts, pictures or both.

        Args:
            items: A ``str`` is a text, a ``Path`` a picture; an ``Item`` may hold both and its instruction.
            mode: ``discriminative`` is one forward; ``generative`` writes a rewrite first.
            batch_size: Items at a time.
            instruction: The task, for items that bring none, e.g. "Find the picture with this name."

        Returns:
            (N, D) float32 on the CPU, L2-normalised.

        Raises:
            RimeError: If a picture cannot be read, or the mode is unknown.
        """
        return self.encode_full(items, mode, batch_size, instruction).embeddings

    def rewrite(self, items: Sequence[Source], batch_size: int = 32, instruction: str = "") -> list[str]:
        """What the model writes about each item before it embeds it."""
        return self.encode_full(items, "generative", batch_size, instruction).rewrites or []

    def encode_full(
        self,
        items: Sequence[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        instruction: str = "",
        progress: str = "",
    ) -> Encoded:
        """As ``encode``, with the rewrites and the time.

        Args:
            items, mode, batch_size, instruction: See ``encode``.
            progress: Title of a progress bar; none without.
        """
        _known(mode)
        rows = [to_item(item, instruction) for item in items]
        if not rows:
            raise RimeError("encode: the list of items is empty; give at least one text or picture.")
        starts = range(0, len(rows), batch_size)
        vectors: list[Tensor] = []
        rewrites: list[str] = []
        began = time.perf_counter()
        for start in track(starts, progress, disable=not progress):
            vector, written = self._encode_batch(rows[start : start + batch_size], mode)
            vectors.append(vector)
            rewrites += written
        seconds = time.perf_counter() - began
        return Encoded(torch.cat(vectors), rewrites if mode == "generative" else None, seconds)

    @torch.no_grad()
    def _encode_batch(self, items: list[Item], mode: Mode) -> tuple[Tensor, list[str]]:
        device = next(self.backbone.parameters()).device
        prompts = self.backbone.processor.prompts(items).to(device)
        if mode == "discriminative":
            return self.backbone(prompts).disc.float().cpu(), []
        written = write_rewrites(self.backbone, prompts).completions
        embedding = self.backbone(prompts, written).gen
        return embedding.float().cpu(), self.backbone.processor.decode(written)

    def index(
        self,
        items: Sequence[Source],
        modes: Sequence[Mode] = MODES,
        batch_size: int = 32,
        instruction: str = "",
        progress: bool = False,
    ) -> None:
        """Make these items the gallery of ``search``.

        Embeddings are kept in the run folder: the same items are encoded once for each adapter and mode.

        Args:
            items: See ``encode``.
            modes: The modes in which the gallery can be searched.
            batch_size, instruction: See ``encode``.
            progress: Whether a progress bar is shown.

        Raises:
            RimeError: If there is nothing to index.
        """
        if not items:
            raise RimeError("index: the gallery is empty; give at least one text or picture.")
        self.gallery = [to_item(item, instruction) for item in items]
        self._encoded = {}
        for mode in modes:
            title = f"gallery, {mode}" if progress else ""
            self._encoded[mode] = self._cached(_known(mode), batch_size, title)

    def _cached(self, mode: Mode, batch_size: int, progress: str) -> Encoded:
        if self.cache is None:
            return self.encode_full(self.gallery, mode, batch_size, progress=progress)
        file = self.cache / f"{_fingerprint(self.name, mode, self.gallery)}.pt"
        if file.is_file():
            return Encoded(**torch.load(file))
        encoded = self.encode_full(self.gallery, mode, batch_size, progress=progress)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            half_written = file.with_suffix(".half")
            torch.save(vars(encoded), half_written)
            half_written.replace(file)
        except OSError as error:  # a run folder that is not ours to write
            warnings.warn(f"gallery embeddings are not kept: {error}", stacklevel=2)
        return encoded

    def search(
        self,
        query: Source,
        mode: Mode = "discriminative",
        top_k: int = 8,
        target_mode: Mode | None = None,
        instruction: str = "",
    ) -> Found:
        """The gallery items closest to a query.

        Args:
            query: See ``encode``.
            mode: How the query is encoded.
            top_k: Most items returned.
            target_mode: How the gallery was encoded; default as the query. After CMA any pair works.
            instruction: The task, if the query brings none.

        Raises:
            RimeError: If the gallery was not indexed in that mode.
        """
        target_mode = _known(target_mode or mode)
        if target_mode not in self._encoded:
            raise RimeError(
                f"search: no gallery in mode {target_mode!r}; indexed: {sorted(self._encoded) or 'nothing'}. "
                "Call index(items) first."
            )
        encoded = self.encode_full([query], mode, instruction=instruction)
        gallery = self._encoded[target_mode]
        began = time.perf_counter()
        scores, places = (gallery.embeddings @ encoded.embeddings[0]).topk(min(top_k, len(self.gallery)))
        search_ms = 1000 * (time.perf_counter() - began)
        hits = [
            Hit(place, self.gallery[place], score, gallery.rewrites[place] if gallery.rewrites else None)
            for score, place in zip(scores.tolist(), places.tolist(), strict=True)
        ]
        written = encoded.rewrites[0] if encoded.rewrites else None
        return Found(hits, written, 1000 * encoded.seconds, search_ms)


def load(run: str | Path, device: str = "cpu") -> Retriever:
    """The model of a run, ready to encode.

    Args:
        run: The folder of a run (``runs/<name>/cma``), or one above: then the run that finished last.
        device: Where the model goes.

    Raises:
        RimeError: If there is no adapter, or its base cannot be loaded.
    """
    folder = RunFolder.with_adapter(run)
    contract = read_contract(folder.adapter)
    name = (
        f"{contract['base_hash']} {contract['weights_hash']} {json.dumps(contract['prompt'], sort_keys=True)}"
    )
    name += f" {contract['backbone']['load_in_4bit']} {contract['backbone']['dtype']}"
    return Retriever(load_backbone(folder.adapter, device), name, folder.path / CACHE)


def to_item(source: Source, instruction: str = "") -> Item:
    """A text, a path to a picture or a picture as an Item; an Item keeps its own instruction.

    Raises:
        RimeError: If the file is no readable picture; the message names it.
    """
    if isinstance(source, Item):
        return source if source.instruction else replace(source, instruction=instruction)
    if isinstance(source, str):
        return Item(source, (), "", instruction)
    if isinstance(source, Path):
        return Item("", (open_picture(source),), source.name, instruction)
    return Item("", (source.convert("RGB"),), "", instruction)


def open_picture(path: Path) -> Image.Image:
    """A picture file, decoded."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RimeError(f"{path}: not a readable picture ({error}). Remove or replace the file.") from error
    if max(picture.size) >= MAX_ASPECT * min(picture.size):
        size = f"{picture.width} x {picture.height}"
        raise RimeError(
            f"{path}: {size} pixels, but sides may differ {MAX_ASPECT} times at most. Crop the file."
        )
    return picture


def _known(mode: Mode) -> Mode:
    if mode not in MODES:
        raise RimeError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}.")
    return mode


def _fingerprint(name: str, mode: Mode, items: Sequence[Item]) -> str:
    """What decides the embeddings: adapter, mode and what the model sees of each item, in order."""
    digest = hashlib.sha256(f"{name} {mode}".encode())
    for item in items:
        digest.update(
            json.dumps([item.text, item.instruction, [image.size for image in item.images]]).encode()
        )
        for image in item.images:
            digest.update(image.tobytes())
    return digest.hexdigest()[:32]
