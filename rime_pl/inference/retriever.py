"""Use a trained model: encode texts and pictures, search among them.

Made by loading.py, for a notebook (``rime_pl.load``) or a terminal (``rime search``).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from rime_pl.backbone.lora import merged
from rime_pl.backbone.mllm import Backbone
from rime_pl.bars import Bar
from rime_pl.errors import DataError, RimeError
from rime_pl.inference.batching import Batches, Prepared
from rime_pl.inference.encoding import Meter, Wanted, encode_batch, encode_where
from rime_pl.inference.gallery_cache import Encoded, keep_encoded, read_encoded
from rime_pl.inference.hits import Found, Hit
from rime_pl.inference.sources import Source, checked, content_digest, is_one, one_item
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import TaskInstructions, choose_task, unknown_words
from rime_pl.types import Mode, Prompts, Side

MODES: tuple[Mode, ...] = ("discriminative", "generative")
CACHE = "search_cache"


class Retriever:
    """Encodes and searches with a trained adapter.

    Args:
        backbone: In eval mode.
        tasks: The instructions of the tasks that it was trained on, by the name of the task.
        run: Folder of the run; it keeps the embeddings of galleries. None keeps nothing on disk.
        name: Identifies adapter and base model among these embeddings.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, TaskInstructions] | None = None,
        run: RunFolder | None = None,
        name: str = "",
    ) -> None:
        self.backbone = backbone
        self.tasks = dict(tasks or {})
        self.run = run
        self.name = name
        self.meter = Meter()  # of all that was encoded
        self.gallery: Sequence[Source] = ()
        self.unusable: dict[int, str] = {}  # number of a gallery item that was left out -> what is wrong
        self._encoded: dict[Mode, Encoded] = {}

    def __repr__(self) -> str:
        run, base = str(self.run) if self.run else None, self.backbone.config.name_or_path
        known = f"dimension={self.dimension}, modes={MODES}, tasks={tuple(self.tasks)}"
        return f"Retriever(run={run!r}, base={base!r}, {known})"

    @property
    def dimension(self) -> int:
        """The length D of an embedding."""
        return int(self.backbone.language_model.config.text_config.hidden_size)

    # -- embeddings -----------------------------------------------------------------------------------

    def encode_query(
        self,
        items: Source | Iterable[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        task: str | None = None,
    ) -> Tensor:
        """Return the embeddings of queries, with the instruction that queries had in training.

        Args:
            items, mode, batch_size: See ``encode``.
            task: A name in ``tasks`` (default: the first that asks in words alone for a picture).

        Returns:
            See ``encode``.

        Raises:
            RimeError: As ``encode``, or if there is no such task.
        """
        return self.encode(items, mode, batch_size, self.instruction("query", task))

    def encode_target(
        self,
        items: Source | Iterable[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        task: str | None = None,
    ) -> Tensor:
        """Return the embeddings of targets; like ``encode_query``, but with the targets' instruction."""
        return self.encode(items, mode, batch_size, self.instruction("target", task))

    def encode(
        self,
        items: Source | Iterable[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        instruction: str = "",
    ) -> Tensor:
        """Return the embeddings of texts, pictures or both, with an instruction of your own or none.

        A search should use ``encode_query`` and ``encode_target``, because the model was trained with the
        instructions of its tasks.

        Args:
            items: One item or several. A ``str`` is a text, a ``Path`` a picture; an ``Item`` may hold both
                and an instruction.
            mode: ``discriminative`` needs one forward; ``generative`` writes a rewrite first.
            batch_size: Largest number of items in a forward. Long items make a batch smaller. Pictures are
                opened when their batch is due, with several cores also for the next batches, at most four.
            instruction: Task of items without one, e.g. "Find the picture with this name."

        Returns:
            (N, D) float32 on the CPU, L2-normalised; of one item (D,). Its ``.numpy()`` is a NumPy array.

        Raises:
            RimeError: If a picture cannot be read, or the mode is unknown.
        """
        embeddings = self.encode_full(items, mode, batch_size, instruction).embeddings
        return embeddings[0] if is_one(items) else embeddings

    def rewrite(
        self, items: Source | Iterable[Source], batch_size: int = 32, instruction: str = ""
    ) -> str | list[str]:
        """Return the rewrite that the model writes of each item before it embeds it; of one item a str."""
        rewrites = self.encode_full(items, "generative", batch_size, instruction).rewrites or []
        return rewrites[0] if is_one(items) else rewrites

    def instruction(self, side: Side, task: str | None = None) -> str:
        """Return the instruction that items of a side had in training.

        Args:
            side: ``query`` or ``target``.
            task: See ``encode_query``.
        """
        return choose_task(self.tasks, task).of(side)

    def encode_full(
        self,
        items: Source | Iterable[Source],
        mode: Mode = "discriminative",
        batch_size: int = 32,
        instruction: str = "",
        progress: str = "",
        skip_unusable: bool = False,
    ) -> Encoded:
        """Return the embeddings, (N, D) also of one item, with the rewrites and the time.

        Args:
            items, mode, batch_size, instruction: See ``encode``.
            progress: Title of a progress bar; empty for no bar.
            skip_unusable: Whether items whose pictures cannot be used are left out and named in the result.
        """
        return self.encode_modes(items, (_known(mode),), batch_size, instruction, progress, skip_unusable)[
            mode
        ]

    def encode_modes(
        self,
        items: Source | Iterable[Source],
        modes: Sequence[Mode],
        batch_size: int,
        instruction: str = "",
        progress: str = "",
        skip_unusable: bool = False,
        each: Callable[[int], object] = lambda count: None,
        wanted: Wanted | None = None,
    ) -> dict[Mode, Encoded]:
        """Return what ``encode_full`` does, in some modes; ``each`` gets the size of each batch.

        With ``wanted``, the modes must be ``MODES``, and only the items that it names get a rewrite. The
        generative vectors of the others are 0.
        """
        if batch_size < 1:
            raise RimeError(f"batch_size must be 1 or more, but is {batch_size}.")
        rows = self._checked(items, skip_unusable)
        unusable: dict[int, str] = {}
        found: list[tuple[int, Tensor, str]] = []
        began = time.perf_counter()
        given = (batch_size, instruction, unusable if skip_unusable else None)
        batches = Batches(rows, self.backbone.processor, *given)
        # to merge LoRA takes as long as a forward or two
        pays = "generative" in modes or batches.several
        with (
            Bar(off=not progress) as bar,
            torch.no_grad(),
            merged(self.backbone) if pays else nullcontext(),
            closing(batches.__iter__()) as prepared,
        ):
            shown = bar.add_task(progress, total=len(rows))
            for batch in prepared:
                found += self._encode_prepared(batch, modes, wanted)
                bar.advance(shown, batch.done)
                each(batch.done)
        if not found:
            raise DataError(
                f"At least one item must be usable, but none of {len(rows)} is. The first: {unusable[0]}"
            )
        found.sort(key=itemgetter(0))
        seconds = time.perf_counter() - began
        embeddings = torch.stack([vector for _, vector, _ in found], dim=1)  # (modes, N, D)
        rewrites = [rewrite for _, _, rewrite in found]
        left_out = dict(sorted(unusable.items()))
        return {
            mode: Encoded(vectors.clone(), rewrites if mode == "generative" else None, seconds, left_out)
            for mode, vectors in zip(modes, embeddings, strict=True)
        }

    def _checked(self, items: Source | Iterable[Source], skip_unusable: bool) -> Sequence[Source]:
        return checked(items, not skip_unusable, self.backbone.processor.prompt.media_limit)

    def _encode_prepared(
        self, batch: Prepared, modes: Sequence[Mode], wanted: Wanted | None
    ) -> list[tuple[int, Tensor, str]]:
        """Return number, embeddings (modes, D) and rewrite of each item of a batch that can be used."""
        if batch.prompts is None:
            return []
        if wanted is None:
            vectors, written = self._encode_batch(batch.prompts, modes)
        else:
            which = partial(wanted, batch.numbers)
            vectors, written = encode_where(self.backbone, batch.prompts, which, self.meter)
        self._refuse_damaged(vectors)
        return list(zip(batch.numbers, vectors, written, strict=True))

    def _encode_batch(self, prompts: Prompts, modes: Sequence[Mode]) -> tuple[Tensor, list[str]]:
        """Return embeddings (R, modes, D) of R prompts, and rewrites; without the generative mode empty."""
        return encode_batch(self.backbone, prompts, modes, self.meter)

    def _refuse_damaged(self, vectors: Tensor) -> None:
        if not bool(vectors.isfinite().all()):
            raise RimeError(
                f"{self}: an embedding must be finite, but one is not. The adapter or the base model is "
                "damaged: copy it again, or train the stage again."
            )

    # -- search ---------------------------------------------------------------------------------------

    def index(
        self,
        items: Source | Iterable[Source],
        modes: Sequence[Mode] = MODES,
        batch_size: int = 32,
        task: str | None = None,
        instruction: str | None = None,
        progress: bool = False,
        skip_unusable: bool = False,
    ) -> None:
        """Make these items the gallery of ``search``.

        Embeddings are cached in the run folder, so the same items are encoded only once per adapter and mode.
        Of pictures given as ``Path``, only the path is kept.

        Args:
            items, batch_size: See ``encode``.
            modes: Modes in which the gallery can be searched.
            task: See ``encode_target``.
            instruction: Instruction in the place of the task's.
            progress: Whether to show a progress bar.
            skip_unusable: Whether items whose pictures cannot be used are left out and named in ``unusable``.

        Raises:
            RimeError: If there are no items, or one cannot be embedded.
        """
        text = self.instruction("target", task) if instruction is None else instruction
        self.gallery = self._checked(items, skip_unusable)
        self._encoded, self.unusable = {}, {}
        content = content_digest(self.gallery, text, skip_unusable) if self.run else ""
        wanted = list(dict.fromkeys(map(_known, modes)))
        kept = {mode: self._kept(content, mode, text, skip_unusable) for mode in wanted}
        if missing := [mode for mode in wanted if kept[mode] is None]:
            title = f"gallery, {' and '.join(missing)}" if progress else ""
            made = self.encode_modes(self.gallery, missing, batch_size, text, title, skip_unusable)
            kept.update(made)
            # a file that changed meanwhile must not be kept as what it was before
            if self.run is not None and content_digest(self.gallery, text, skip_unusable) == content:
                for mode, encoded in made.items():
                    keep_encoded(self._file(content, mode), encoded)
        self._encoded = {mode: encoded for mode, encoded in kept.items() if encoded is not None}
        for encoded in self._encoded.values():
            self.unusable |= encoded.unusable

    def _file(self, content: str, mode: Mode) -> Path:
        assert self.run is not None, "only a run keeps embeddings"
        key = hashlib.sha256(f"{self.name} {mode} {content}".encode()).hexdigest()[:32]
        return self.run.path / CACHE / f"{key}.pt"

    def _kept(self, content: str, mode: Mode, instruction: str, skip_unusable: bool) -> Encoded | None:
        """Return the embeddings of the gallery that the run kept, unless they are to be made again.

        An item without an embedding is opened again: as for a new gallery, it may be an error. It may also be
        usable by now, for example since a package that reads its format was installed.
        """
        encoded = read_encoded(self._file(content, mode)) if self.run is not None else None
        if encoded is None:
            return None
        unusable: dict[int, str] = {}
        for number in encoded.unusable:
            one_item(self.gallery, number, instruction, unusable if skip_unusable else None)
        # what is wrong names the file, and the same bytes may lie in another folder by now
        return replace(encoded, unusable=unusable) if unusable.keys() == encoded.unusable.keys() else None

    def search(
        self,
        query: Source,
        mode: Mode = "discriminative",
        top_k: int = 8,
        target_mode: Mode | None = None,
        task: str | None = None,
        instruction: str | None = None,
    ) -> Found:
        """Return the gallery items that are most similar to a query.

        Args:
            query: One item; see ``encode``.
            mode: Mode of the query.
            top_k: Maximum number of items.
            target_mode: Mode of the gallery (default: that of the query). After CMA, any pair of modes works.
            task: See ``encode_query``.
            instruction: Instruction in the place of the task's.

        Raises:
            RimeError: If the gallery was not indexed in that mode.
        """
        target_mode = _known(target_mode or mode)
        if target_mode not in self._encoded:
            raise RimeError(
                f"search needs a gallery in mode {target_mode!r}, but indexed is: "
                f"{', '.join(sorted(self._encoded)) or 'nothing'}. Call index(items) first."
            )
        if top_k < 1:
            raise RimeError(f"top_k must be 1 or more, but is {top_k}.")
        if not is_one(query):
            raise RimeError(f"query must be one text, path, picture or Item, not a {type(query).__name__}.")
        text = self.instruction("query", task) if instruction is None else instruction
        encoded = self.encode_full(query, mode, instruction=text)
        gallery = self._encoded[target_mode]
        began = time.perf_counter()
        scores, rows = (gallery.embeddings @ encoded.embeddings[0]).topk(min(top_k, len(gallery.embeddings)))
        search_ms = 1000 * (time.perf_counter() - began)
        rewrites = gallery.rewrites
        places = [place for place in range(len(self.gallery)) if place not in gallery.unusable]
        hits = [
            Hit(places[row], score, rewrites[row] if rewrites else None, self.gallery)
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
        written = encoded.rewrites[0] if encoded.rewrites else None
        return Found(hits, written, 1000 * encoded.seconds, search_ms)

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that the model was never trained on.

        They are known for the tiny base models only. A downloaded one has read other texts: then it is [].
        """
        return unknown_words(self.run.adapter, text) if self.run else []


def _known(mode: Mode) -> Mode:
    if mode not in MODES:
        raise RimeError(f"mode must be {' or '.join(map(repr, MODES))}, but is {mode!r}.")
    return mode
