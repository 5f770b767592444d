"""Turn pairs into batches: prompts and rewrites become tokens, media become patches.

Called by the data module for training and evaluation and by the retriever for search. It wraps the Hugging
Face processor of the checkpoint; only the chat layout is ours, from prompts.py.

Shape legend: R rows, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from rime_pl.errors import DataError, RimeError
from rime_pl.prompts import (
    IMAGE_TOKEN,
    LATENT_TOKEN,
    TURN_END,
    TURN_START,
    VIDEO_TOKEN,
    PromptConfig,
    chat_prompt,
    completion,
    refuse_many_media,
)
from rime_pl.types import (
    Batch,
    Completions,
    EvalBatch,
    FurtherRows,
    Item,
    Pair,
    Prompts,
    Rows,
    Side,
    content_hash,
)
from rime_pl.visual_inputs import MediaProcessor

#: Saved with every adapter: where the two embeddings are read, and the prompt layout of an item.
CONTRACT_FILE = "rime.json"


class RimeProcessor:
    """A Hugging Face processor with the two mode tokens and the chat layout of this project.

    Args:
        processor: ``Qwen3VLProcessor``, ``Qwen2VLProcessor`` or one with the same interface.
        prompt: Chat layout and budget of a rewrite.
    """

    def __init__(self, processor: Any, prompt: PromptConfig) -> None:
        self.processor = processor
        self.prompt = prompt
        self.tokenizer = processor.tokenizer
        modes = [prompt.disc_token, prompt.gen_token]
        learned = [*modes, LATENT_TOKEN] if prompt.num_latent_tokens else modes
        #: Learned tokens that the checkpoint lacks; an already trained checkpoint has them.
        self.new_tokens = [token for token in learned if token not in self.tokenizer.get_vocab()]
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": learned}, replace_extra_special_tokens=False
        )
        #: Tokens whose rows of the table are trained: those of both modes, and the latent one if it is used.
        self.learned_ids: list[int] = self.tokenizer.convert_tokens_to_ids(learned)
        self.disc_id, self.gen_id, self.turn_end_id, self.image_id, self.video_id = (
            self.tokenizer.convert_tokens_to_ids([*modes, TURN_END, IMAGE_TOKEN, VIDEO_TOKEN])
        )
        self.pad_id: int = self.tokenizer.pad_token_id
        special = {i: t.content for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids: list[int] = sorted(special)
        self.special_pattern = re.compile("|".join(map(re.escape, special.values())))
        self.media = MediaProcessor(processor, prompt)

    @classmethod
    def from_pretrained(cls, name_or_path: str, prompt: PromptConfig) -> RimeProcessor:
        """Load the processor of a checkpoint and add the mode tokens of ``prompt``.

        Raises:
            RimeError: If there is no processor at ``name_or_path``.
        """
        try:
            processor = AutoProcessor.from_pretrained(name_or_path)
        except Exception as error:  # damaged files fail in any place of transformers
            raise RimeError(
                "model.backbone.name_or_path must be a Hugging Face name or a folder, but no processor could "
                f"be loaded from {name_or_path!r} ({error}). `rime base` makes the tiny base model."
            ) from error
        tokenizer = processor.tokenizer
        needed = {"a token for padding": tokenizer.pad_token_id}
        needed |= {token: tokenizer.get_vocab().get(token) for token in (TURN_START, TURN_END, IMAGE_TOKEN)}
        if missing := [name for name, number in needed.items() if number is None]:
            raise RimeError(
                f"{name_or_path}: the tokenizer must have {', '.join(needed)}, but lacks "
                f"{', '.join(missing)}. Its files are not complete: copy the folder again. A base model "
                "must be of Qwen-VL's family."
            )
        return cls(processor, prompt)

    @classmethod
    def from_adapter(cls, folder: str | Path) -> RimeProcessor:
        """Load the processor saved with an adapter, with the prompt layout of its training."""
        contract = Path(folder) / CONTRACT_FILE
        if not contract.is_file():
            raise RimeError(
                f"{folder} must be the adapter folder of a run (<run>/<stage>/adapter), but it has no "
                f"{CONTRACT_FILE}."
            )
        return cls.from_pretrained(str(folder), PromptConfig(**json.loads(contract.read_text())["prompt"]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files of the processor into ``folder``."""
        self.processor.save_pretrained(folder)

    def contract(self) -> dict[str, Any]:
        """Return what must be equal in training and in use, as JSON.

        A setting that is None is left out, so that adapters from before it existed are still equal.
        """
        prompt = {name: value for name, value in asdict(self.prompt).items() if value is not None}
        return {"prompt": prompt, "disc_token_id": self.disc_id, "gen_token_id": self.gen_id}

    # -- one pair -------------------------------------------------------------------------------------

    def check(
        self, pair: Pair, sides: Sequence[Side] = ("query", "target"), cut: bool = False
    ) -> tuple[Pair, list[str]]:
        """Return a pair that fits into a batch, so that no pair can make a whole batch fail.

        Args:
            pair: A pair from a shard; its media are decoded.
            sides: The sides that the batch will hold.
            cut: Whether texts and rewrites that are too long are cut; otherwise they are errors. An
                instruction is never cut.

        Returns:
            The pair, and which texts were cut, such as "train-000000.tar/x (query): text".

        Raises:
            DataError: If a side is missing, if it has too many media, or if a text is too long or contains
                a special token.
        """
        shortened: list[str] = []
        for side in sides:
            item = _query(pair) if side == "query" else pair.target
            checked: dict[str, Any] = {side: self._checked(item, f"{pair.key} ({side})", cut, shortened)}
            pair = replace(pair, **checked)
        if len(sides) > 1:
            for kind in ("hard_negatives", "positives"):
                items = tuple(
                    self._checked(item, f"{pair.key} ({kind}[{number}])", cut, shortened)
                    for number, item in enumerate(getattr(pair, kind))
                )
                further: dict[str, Any] = {kind: items}
                pair = replace(pair, **further)
        return pair, shortened

    def _checked(self, item: Item, name: str, cut: bool, shortened: list[str]) -> Item:
        """Return an item that fits into a batch; what is cut is added to ``shortened``."""
        refuse_many_media(len(item.media), self.prompt.media_limit, name)
        for field in ("instruction", "text", "rewrite"):
            text = getattr(item, field) or ""
            self._refuse_special([text], field, [name])
            fitting = self._within(field, text, name, cut)
            if fitting != text:
                changes: dict[str, Any] = {field: fitting}
                item = replace(item, **changes)
                shortened.append(f"{name}: {field}")
        return item

    def _within(self, field: str, text: str, name: str, cut: bool = False) -> str:
        """Return the text, or its beginning if it is longer than ``prompt`` allows and may be cut."""
        limit = self.prompt.max_rewrite_tokens if field == "rewrite" else self.prompt.max_text_tokens
        # a token has at least one byte, and the tokenizer's normal form (NFC) at most triples the bytes
        if limit is None or 3 * len(text.encode()) <= limit:
            return text
        length = len(self._tokens(text))
        if length <= limit:
            return text
        if not cut or field == "instruction":
            raise _too_long(name, field, limit, length)
        return self._cut(text.strip(), limit)

    def _cut(self, text: str, limit: int) -> str:
        """Return the first ``limit`` tokens of a text, up to the end of a word."""
        places = self._tokens(text).offsets
        for _, end in reversed(places[:limit]):
            short = text[:end]
            if not text[end : end + 1].isspace():
                whole_words = short.rpartition(" ")[0]
                short = whole_words if 2 * len(whole_words) > end else short  # some scripts have no spaces
            if len(self._tokens(short := short.rstrip())) <= limit:
                return short
        return ""

    def _tokens(self, text: str) -> Any:
        """Return the tokens of one text and their places; a call of the tokenizer costs more for one text."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)

    # -- tokens ---------------------------------------------------------------------------------------

    def prompts(self, items: Sequence[Item], keys: Sequence[str] | None = None) -> Prompts:
        """Return the items as left-padded prompts with the patches of all their media.

        Args:
            items: R items.
            keys: Names of the rows for the error message.

        Returns:
            R prompts; ``pixel_values`` is None if no item has a medium.

        Raises:
            DataError: If an item has too many media or a clip that cannot be read, if a text or an
                instruction contains a special token, or if an instruction is too long. A text that is too
                long is cut, with a warning.
        """
        for field in ("text", "instruction"):
            self._refuse_special([getattr(item, field) for item in items], field, keys)
        names = list(keys) if keys else [f"row {number}" for number in range(len(items))]
        items = [self._bounded(item, name) for item, name in zip(items, names, strict=True)]
        media = [medium for item in items for medium in item.media]
        owners = [names[number] for number, item in enumerate(items) for _ in item.media]
        seen = self.media(media, owners)
        slots = iter(seen.slots)
        texts = [
            chat_prompt(self.prompt, item.text, item.instruction, [next(slots) for _ in item.media])
            for item in items
        ]
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids, mask = _pad(rows, self.pad_id, side="left")
        counts = torch.tensor([len(item.media) for item in items])
        return Prompts(ids, mask, seen.pixel_values, seen.grid_thw, counts, seen.seconds)

    def _bounded(self, item: Item, name: str) -> Item:
        """Return an item whose text is not too long; those of a corpus were checked before."""
        refuse_many_media(len(item.media), self.prompt.media_limit, name)
        self._within("instruction", item.instruction, name)
        text = self._within("text", item.text, name, cut=True)
        if text == item.text:
            return item
        limit = self.prompt.max_text_tokens
        warnings.warn(f"{name}: the text has more than {limit} tokens and is cut there.", stacklevel=3)
        return replace(item, text=text)

    def cuts(self, item: Item) -> bool:
        """Return whether ``prompts`` cuts the text of an item, because it is too long."""
        return self._within("text", item.text, "", cut=True) != item.text

    def completions(self, rewrites: Sequence[str | None], keys: Sequence[str] | None = None) -> Completions:
        """Return the rewrites as right-padded completions; None becomes the empty rewrite.

        Args:
            rewrites: R texts.
            keys: Names of the rows for the error message.

        Raises:
            DataError: If a rewrite is longer than ``prompt.max_rewrite_tokens`` or contains a special token.
        """
        self._refuse_special([rewrite or "" for rewrite in rewrites], "rewrite", keys)
        texts = [completion(self.prompt, rewrite) for rewrite in rewrites]
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for number, row in enumerate(rows):
            if len(row) - 2 > self.prompt.max_rewrite_tokens:
                name = keys[number] if keys else f"row {number}"
                raise _too_long(name, "rewrite", self.prompt.max_rewrite_tokens, len(row) - 2)
        ids, mask = _pad(rows, self.pad_id, side="right")
        return Completions(ids, mask)

    def _refuse_special(self, texts: Sequence[str], field: str, keys: Sequence[str] | None) -> None:
        """Raise a DataError, because the model would read it as a picture, a turn's end or a mode token."""
        for number, text in enumerate(texts):
            if found := self.special_pattern.search(text):
                name = keys[number] if keys else f"row {number}"
                raise DataError(
                    f"{name}: field {field!r} must not contain {found.group()!r}, because it is a special "
                    "token of the model. Remove it from the text."
                )

    def decode(self, completions: Completions) -> list[str]:
        """Return the texts of the completions, without special tokens."""
        rows = [
            ids[mask.bool()].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)
        ]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    # -- batches --------------------------------------------------------------------------------------

    def rows(self, items: Sequence[Item], keys: Sequence[str]) -> Rows:
        """Return the items with their reference rewrites, as the input of one forward."""
        return Rows(
            prompts=self.prompts(items, keys),
            completions=self.completions([item.rewrite for item in items], keys),
            annotated=torch.tensor([item.rewrite is not None for item in items]),
        )

    def training_batch(self, pairs: Sequence[Pair], position: int = 0, further: bool = False) -> Batch:
        """Return B pairs of one task as a training batch.

        Args:
            pairs: The pairs.
            position: Number of the global batch.
            further: Whether their hard negatives and further positives are in it, too.
        """
        queries, targets = [_query(pair) for pair in pairs], [pair.target for pair in pairs]
        return Batch(
            query=self.rows(queries, [f"{pair.key} (query)" for pair in pairs]),
            target=self.rows(targets, [f"{pair.key} (target)" for pair in pairs]),
            query_content=_hashes(queries),
            target_content=_hashes(targets),
            dataset=pairs[0].dataset,
            keys=[pair.key for pair in pairs],
            query_texts=[" ".join(filter(None, (item.instruction, item.text))) for item in queries],
            position=position,
            further=self.further_rows(pairs) if further else None,
        )

    def further_rows(self, pairs: Sequence[Pair]) -> FurtherRows:
        """Return the hard negatives and further positives of pairs, or one row that counts as unused."""
        found = [
            (row, item, kind == "positives", f"{pair.key} ({kind}[{number}])")
            for row, pair in enumerate(pairs)
            for kind in ("hard_negatives", "positives")
            for number, item in enumerate(getattr(pair, kind))
        ]
        used = bool(found)
        found = found or [(0, pairs[0].target, False, f"{pairs[0].key} (target)")]
        items, names = [one[1] for one in found], [one[3] for one in found]
        rows = self.rows(items, names)
        return FurtherRows(
            rows=replace(rows, annotated=torch.zeros_like(rows.annotated)),
            owner=torch.tensor([one[0] for one in found]),
            content=_hashes(items),
            positive=torch.tensor([one[2] for one in found]),
            rewritten=rows.annotated,
            used=torch.full((len(found),), used),
        )

    def eval_batch(self, side: Side, pairs: Sequence[Pair]) -> EvalBatch:
        """Return one row per pair: its query, or its target as a gallery item."""
        items = [_query(pair) if side == "query" else pair.target for pair in pairs]
        names = [f"{pair.key} ({side})" for pair in pairs]
        return EvalBatch(
            side=side,
            prompts=self.prompts(items, names),
            completions=self.completions([item.rewrite for item in items], names),
            item_ids=torch.tensor([content_hash(f"{side} {pair.key}") for pair in pairs]),
            content_ids=_hashes(items),
            relevant_ids=_hashes([pair.target for pair in pairs]),
            distractor=torch.tensor([pair.distractor for pair in pairs]),
            datasets=[pair.dataset if side == "query" else "" for pair in pairs],
            galleries=[pair.gallery for pair in pairs],
            keys=[pair.key for pair in pairs],
            items=[item.thumbnail() for item in items],  # full ones would go through the pipe of the workers
        )


def _too_long(name: str, field: str, limit: int, length: int) -> DataError:
    setting = "max_rewrite_tokens" if field == "rewrite" else "max_text_tokens"
    cut = "" if field == "instruction" else ", or set data.too_long to cut"
    return DataError(
        f"{name}: field {field!r} must have at most {limit} tokens, but has {length}. Shorten it or raise "
        f"model.backbone.prompt.{setting}{cut}."
    )


def _query(pair: Pair) -> Item:
    if pair.query is None:
        raise DataError(f"{pair.key}: field 'query' must not be null here, because this pair needs a query.")
    return pair.query


def _hashes(items: Sequence[Item]) -> Tensor:
    return torch.tensor([content_hash(item.content_id) for item in items], dtype=torch.int64)


def _pad(rows: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence(
        [torch.ones_like(t) for t in tensors], batch_first=True, padding_value=0, padding_side=side
    )
    return ids, mask
