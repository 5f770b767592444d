"""Use a trained model: load a run, encode texts and pictures, search among them.

Called by ``rime_pl.load(run)`` in a notebook and by ``rime search`` in a terminal.
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

#: A text, a picture (path or opened), or an item that may hold both and an instruction.
Source = str | Path | Image.Image | Item
MODES: tuple[Mode, ...] = ("discriminative", "generative")
CACHE = "search_cache"
#: The image processor of Qwen-VL refuses pictures whose sides differ more.
MAX_ASPECT = 200


@dataclass
class Encoded:
    """The results of encoding N items."""

    embeddings: Tensor  # (N, D) float32 on the CPU, L2-normalised: dot products are cosines
    rewrites: list[str] | None  # N rewrites that the model wrote; None in the discriminative mode
    seconds: float


@dataclass
class Hit:
    """One gallery item that a search found."""

    place: int  # index in the gallery, from 0
    item: Item
    score: float  # cosine
    rewrite: str | None  # rewrite of the gallery item


@dataclass
class Found:
    """The results of one search."""

    hits: list[Hit]  # best first
    rewrite: str | None  # rewrite of the query
    encode_ms: float  # time to encode the query, in ms: with its rewrite in the generative mode
    search_ms: float  # time to compare it with the gallery, in ms


class Retriever:
    """Encodes and searches with a trained adapter.

    Args:
        backbone: In eval mode.
        name: Identifies base model and adapter in the cache of gallery embeddings.
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
        """Return the embeddings of texts, pictures or both.

        Args:
            items: A ``str`` is a text, a ``Path`` a picture; an ``Item`` may hold both and an instruction.
            mode: ``discriminative`` needs one forward; ``generative`` writes a rewrite first.
            batch_size: Number of items in a forward.
            instruction: Task of items without one, e.g. "Find the picture with this name."

        Returns:
            (N, D) float32 on the CPU, L2-normalised.

        Raises:
            RimeError: If a picture cannot be read, or the mode is unknown.
        """
        return self.encode_full(items, mode, batch_size, instruction).embeddings

    def rewrite(self, items: Sequence[Source], batch_size: int = 32, instruction: str = "") -> list[str]:
        """Return the rewrite that the model writes of each item before it embeds the item."""
        return self.encode_full(items, "generative", batch_size, instruction).rewrites or []

    def encode_full(
        self,
        items: Sequence[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        instruction: str = "",
        progress: str = "",
    ) -> Encoded:
        """Return the embeddings, the rewrites and the time.

        Args:
            items, mode, batch_size, instruction: See ``encode``.
            progress: Title of a progress bar; empty for no bar.
        """
        _known(mode)
        rows = [to_item(item, instruction) for item in items]
        if not rows:
            raise RimeError("encode needs at least one text or picture, but the list of items is empty.")
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

        Embeddings are cached in the run folder, so the same items are encoded only once per adapter and mode.

        Args:
            items: See ``encode``.
            modes: Modes in which the gallery can be searched.
            batch_size, instruction: See ``encode``.
            progress: Whether to show a progress bar.

        Raises:
            RimeError: If there are no items.
        """
        if not items:
            raise RimeError("index needs at least one text or picture, but the gallery is empty.")
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
            return Encoded(**torch.load(file, weights_only=True))
        encoded = self.encode_full(self.gallery, mode, batch_size, progress=progress)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            half_written = file.with_suffix(".half")
            torch.save(vars(encoded), half_written)
            half_written.replace(file)
        except OSError as error:  # e.g. a run folder without permission to write
            warnings.warn(f"The embeddings of the gallery could not be cached: {error}", stacklevel=2)
        return encoded

    def search(
        self,
        query: Source,
        mode: Mode = "discriminative",
        top_k: int = 8,
        target_mode: Mode | None = None,
        instruction: str = "",
    ) -> Found:
        """Return the gallery items that are most similar to a query.

        Args:
            query: See ``encode``.
            mode: Mode of the query.
            top_k: Maximum number of items.
            target_mode: Mode of the gallery (default: that of the query). After CMA, any pair of modes works.
            instruction: Task, if the query has none.

        Raises:
            RimeError: If the gallery was not indexed in that mode.
        """
        target_mode = _known(target_mode or mode)
        if target_mode not in self._encoded:
            raise RimeError(
                f"search needs a gallery in mode {target_mode!r}, but indexed is: "
                f"{', '.join(sorted(self._encoded)) or 'nothing'}. Call index(items) first."
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
    """Return a text, a path to a picture or a picture as an Item; an Item keeps its own instruction.

    Raises:
        RimeError: If the file is not a readable picture.
    """
    if isinstance(source, Item):
        return source if source.instruction else replace(source, instruction=instruction)
    if isinstance(source, str):
        return Item(source, (), "", instruction)
    if isinstance(source, Path):
        return Item("", (open_picture(source),), source.name, instruction)
    return Item("", (source.convert("RGB"),), "", instruction)


def open_picture(path: Path) -> Image.Image:
    """Open and decode a picture file.

    Raises:
        RimeError: If it cannot be read, or its sides differ too much.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RimeError(
            f"{path} must be a readable picture, but is not ({error}). Remove or replace it."
        ) from error
    if max(picture.size) >= MAX_ASPECT * min(picture.size):
        raise RimeError(
            f"{path}: the longer side must be less than {MAX_ASPECT} times the shorter one, but the picture "
            f"has {picture.width} x {picture.height} pixels. Crop it."
        )
    return picture


def _known(mode: Mode) -> Mode:
    if mode not in MODES:
        raise RimeError(f"mode must be {' or '.join(map(repr, MODES))}, but is {mode!r}.")
    return mode


def _fingerprint(name: str, mode: Mode, items: Sequence[Item]) -> str:
    """Return a hash of all that decides the embeddings: adapter, mode and the content of all items."""
    digest = hashlib.sha256(f"{name} {mode}".encode())
    for item in items:
        digest.update(
            json.dumps([item.text, item.instruction, [image.size for image in item.images]]).encode()
        )
        for image in item.images:
            digest.update(image.tobytes())
    return digest.hexdigest()[:32]
