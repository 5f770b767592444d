"""Turn pairs into batches: prompts and rewrites become tokens, images become patches.

Called by the data module for training and evaluation and by the retriever for search. It wraps the Hugging
Face processor of the checkpoint; only the chat layout is ours, from prompts.py.

Shape legend: R rows, P prompt tokens, C completion tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from rime_pl.errors import DataError, RimeError
from rime_pl.prompts import IMAGE_TOKEN, PromptConfig, chat_prompt, completion
from rime_pl.types import Batch, Completions, EvalBatch, Item, Pair, Prompts, Rows, Side, content_hash

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
        #: Mode tokens that the checkpoint lacks; an already trained checkpoint has both.
        self.new_tokens = [token for token in modes if token not in self.tokenizer.get_vocab()]
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": modes}, replace_extra_special_tokens=False
        )
        self.disc_id, self.gen_id, self.turn_end_id, self.image_id = self.tokenizer.convert_tokens_to_ids(
            [*modes, "<|im_end|>", IMAGE_TOKEN]
        )
        self.pad_id: int = self.tokenizer.pad_token_id
        special = {i: t.content for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids: list[int] = sorted(special)
        self.special_pattern = re.compile("|".join(map(re.escape, special.values())))

    @classmethod
    def from_pretrained(cls, name_or_path: str, prompt: PromptConfig) -> RimeProcessor:
        """Load the processor of a checkpoint and add the mode tokens of ``prompt``.

        Raises:
            RimeError: If there is no processor at ``name_or_path``.
        """
        try:
            processor = AutoProcessor.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise RimeError(
                "model.backbone.name_or_path must be a Hugging Face name or a folder, but no processor could "
                f"be loaded from {name_or_path!r} ({error}). `rime base` makes the tiny base model."
            ) from error
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
        """Return what must be equal in training and in use, as JSON."""
        return {"prompt": asdict(self.prompt), "disc_token_id": self.disc_id, "gen_token_id": self.gen_id}

    # -- tokens ---------------------------------------------------------------------------------------

    def prompts(self, items: Sequence[Item], keys: Sequence[str] | None = None) -> Prompts:
        """Return the items as left-padded prompts with the patches of all their images.

        Args:
            items: R items.
            keys: Names of the rows for the error message.

        Returns:
            R prompts; ``pixel_values`` is None if no item has an image.

        Raises:
            DataError: If a text or an instruction contains a special token.
        """
        for field in ("text", "instruction"):
            self._refuse_special([getattr(item, field) for item in items], field, keys)
        images = [image for item in items for image in item.images]
        pixel_values = grid = None
        tokens_per_image: list[int] = []
        if images:
            features = self.processor.image_processor(images=images, return_tensors="pt")
            pixel_values, grid = features["pixel_values"], features["image_grid_thw"]
            tokens_per_image = (grid.prod(-1) // self.processor.image_processor.merge_size**2).tolist()
        texts, start = [], 0
        for item in items:
            counts = tokens_per_image[start : start + len(item.images)]
            start += len(item.images)
            texts.append(chat_prompt(self.prompt, item.text, item.instruction, counts))
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ids, mask = _pad(rows, self.pad_id, side="left")
        return Prompts(ids, mask, pixel_values, grid, torch.tensor([len(item.images) for item in items]))

    def completions(self, rewrites: Sequence[str | None], keys: Sequence[str] | None = None) -> Completions:
        """Return the rewrites as right-padded completions; None becomes the empty rewrite.

        Args:
            rewrites: R texts.
            keys: Names of the rows for the error message.

        Raises:
            DataError: If a rewrite is longer than ``prompt.max_rewrite_tokens`` or contains a special token.
        """
        self._refuse_special([rewrite or "" for rewrite in rewrites], "rewrite", keys)
        texts = [completion(self.prompt, rewrite or "") for rewrite in rewrites]
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for number, row in enumerate(rows):
            if len(row) - 2 > self.prompt.max_rewrite_tokens:
                name = keys[number] if keys else f"row {number}"
                raise DataError(
                    f"{name}: field 'rewrite' must have at most {self.prompt.max_rewrite_tokens} tokens, but "
                    f"has {len(row) - 2}. Shorten it or raise model.backbone.prompt.max_rewrite_tokens."
                )
        ids, mask = _pad(rows, self.pad_id, side="right")
        return Completions(ids, mask)

    def _refuse_special(self, texts: Sequence[str], field: str, keys: Sequence[str] | None) -> None:
        """Raise a DataError, because the model would read it as an image, a turn's end or a mode token."""
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

    def training_batch(self, pairs: Sequence[Pair], position: int = 0) -> Batch:
        """Return B pairs of one task as a training batch."""
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
            distractor=torch.tensor([pair.query is None for pair in pairs]),
            datasets=[pair.dataset if side == "query" else "" for pair in pairs],
            galleries=[pair.gallery for pair in pairs],
            keys=[pair.key for pair in pairs],
            items=[item.thumbnail() for item in items],  # full ones would go through the pipe of the workers
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
