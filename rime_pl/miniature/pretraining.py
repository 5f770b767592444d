"""The training of the tiny base model: its tower on words, its decoder on copying and on captions.

Called by tiny.py beside it, which makes the untrained model. Everything here is about words as tokens, so the
tokenizer must be trained before.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor, get_cosine_schedule_with_warmup
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from rime_pl.errors import DataError
from rime_pl.prompts import PromptConfig
from rime_pl.types import Medium
from rime_pl.visual_inputs import MediaProcessor, VisualInputs

#: A content word stands in the captions of at most this share of the pictures; the others frame them.
_CONTENT = 0.5
#: A name is a content word of at most this share of the pictures.
_NAME = 0.02  # in a corpus of few words none is so rare; then all content words are names
#: Share of the pairs of captions whose shared names are replaced.
_RENAMED = 0.8


def content_words(processor: Qwen3VLProcessor, samples: Sequence[tuple[Medium, list[str]]]) -> dict[int, int]:
    """Return the content words of the captions, as tokens -> number of pictures whose captions hold them.

    Raises:
        DataError: If there is none, because all captions are alike.
    """
    held = (set(processor.tokenizer("\n".join(captions))["input_ids"]) for _, captions in samples)
    counts = Counter(word for words in held for word in words)
    found = {word: counts[word] for word in sorted(counts) if counts[word] <= _CONTENT * len(samples)}
    if not found:
        raise DataError(
            "The captions split must describe different things, but no word of it tells pictures apart."
        )
    return found


def names(processor: Qwen3VLProcessor, samples: Sequence[tuple[Medium, list[str]]]) -> list[int]:
    """Return the content words that name few pictures each, as tokens; these are learned by copying."""
    counts = content_words(processor, samples)
    return [word for word, count in counts.items() if count <= _NAME * len(samples)] or [*counts]


class ShownMedia:
    """The media of the captions, prepared once, and what the frozen tower sees in each, computed once.

    One is shown a dozen times, and preparing it and running the tower take half of a caption's time.

    Args:
        processor: Its image and video processors turn media into patches, as in the stages.
        media: Pictures, clips and pages.
    """

    def __init__(self, processor: Qwen3VLProcessor, media: Iterable[Medium]) -> None:
        self._prepare = MediaProcessor(processor, PromptConfig())
        self.prepared = [self._prepare([one], [f"caption {n}"]) for n, one in enumerate(media)]
        #: number of a medium -> its visual tokens, and those of each deeper layer; each (tokens, D)
        self._seen: dict[int, tuple[Tensor, ...]] = {}

    def slot(self, row: int) -> str:
        """Return the place of a medium in a prompt."""
        return self.prepared[row].slots[0]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the patches of the given media, as the tower takes them: a picture like a clip."""
        pixels, grids = zip(*(_patches(self.prepared[row]) for row in rows), strict=True)
        patches = self._prepare.normalised(torch.cat(pixels))
        return {"pixel_values": patches, "image_grid_thw": torch.cat(grids)}

    @torch.no_grad()
    def seen(self, model: Qwen3VLForConditionalGeneration, rows: Sequence[int]) -> dict[str, Any]:
        """Return what the tower of ``model`` sees in the given media, as model inputs.

        The tower must not be trained any more: what it saw first is kept.
        """
        if new := sorted(set(rows) - self._seen.keys()):
            found = model.model.get_image_features(**self.batch(new), return_dict=True)
            tokens = zip(found.pooler_output, *found.deepstack_features, strict=True)
            self._seen.update(zip(new, tokens, strict=True))
        inputs: dict[str, Any] = {"mm_encoder_outputs": {}} if rows else {}
        for kind, clips in (("image", False), ("video", True)):
            if chosen := [row for row in rows if self._is_clip(row) == clips]:
                pooled, *deeper = zip(*(self._seen[row] for row in chosen), strict=True)
                parts: dict[str, Any] = {"pooler_output": pooled, "deepstack_features": deeper}  # by medium
                inputs["mm_encoder_outputs"][kind] = BaseModelOutputWithDeepstackFeatures(**parts)
                inputs[f"{kind}_grid_thw"] = torch.cat([_patches(self.prepared[row])[1] for row in chosen])
        return inputs

    def _is_clip(self, row: int) -> bool:
        seconds = self.prepared[row].seconds
        return seconds is not None and bool(seconds > 0)


def _patches(prepared: VisualInputs) -> tuple[Tensor, Tensor]:
    """Return the patches and the grid of one medium."""
    assert prepared.pixel_values is not None and prepared.grid_thw is not None, "it was made of one medium"
    return prepared.pixel_values, prepared.grid_thw


def pretrain_vision(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    shown: ShownMedia,
    samples: Sequence[tuple[Medium, list[str]]],
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    rng: random.Random,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the vision tower to tell which content words the captions of a picture hold.

    Real towers come pre-trained, too. Without this step, a few minutes of captioning teach colours, but no
    shapes. A word's score is its best match with a visual token, so one token that shows it is enough. Words
    are compared by their rows of the embedding table, so that a visual token means words to the decoder, too.
    A softmax over all words learns hundreds of rare ones; the fewer pictures have a word, the more it counts.

    Source: caption words as classes, with inverse document frequency, arXiv 2411.03313.
    """
    counts = content_words(processor, samples)
    places = {word: place for place, word in enumerate(counts)}
    wanted = torch.zeros(len(samples), len(places))
    for row, (_, captions) in enumerate(samples):
        for word in set(processor.tokenizer("\n".join(captions))["input_ids"]) & places.keys():
            wanted[row, places[word]] = math.log(len(samples) / counts[word])
    wanted = torch.nn.functional.normalize(wanted, p=1, dim=1)
    table: Tensor = model.model.language_model.embed_tokens.weight
    rows_of = torch.tensor([*places])
    bias = torch.nn.Parameter(torch.zeros(len(places)))
    parameters = [*model.model.visual.parameters(), table, bias]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    for step in range(num_steps):
        rows = [rng.randrange(len(samples)) for _ in range(batch_size)]
        words = table[rows_of]
        seen = visual_tokens(model, shown.batch(rows))
        matches = (torch.cat(seen) @ words.T + bias).split([len(tokens) for tokens in seen])
        scores = torch.stack([of_medium.logsumexp(0) for of_medium in matches])
        loss = torch.nn.functional.cross_entropy(scores, wanted[rows])
        _update(loss, parameters, optimizer, schedule)
        on_step(step, float(loss.detach()))


def visual_tokens(model: Qwen3VLForConditionalGeneration, features: dict[str, Tensor]) -> list[Tensor]:
    """Return the (tokens, D) visual tokens of each medium with all that the decoder adds to them later."""
    seen = model.model.get_image_features(**features, return_dict=True)
    return [sum(parts) for parts in zip(seen.pooler_output, *seen.deepstack_features, strict=True)]


def pretrain(
    model: Qwen3VLForConditionalGeneration,
    batches: Iterable[tuple[dict[str, Any], Tensor]],
    num_steps: int,
    learning_rate: float,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the decoder on ``num_steps`` batches; the vision tower is frozen, as in the stages.

    Args:
        model: The tiny base model.
        batches: Model inputs and labels (-100 where there is no loss).
        num_steps: Length of the training.
        learning_rate: Its peak.
        on_step: Called with the number and the loss of each step, for the progress bar.
    """
    model.model.visual.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    model.train()
    for step, (inputs, labels) in enumerate(itertools.islice(batches, num_steps)):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        _update(loss, trained, optimizer, schedule)
        on_step(step, float(loss.detach()))
    model.requires_grad_(True)
    model.eval()


def _update(loss: Tensor, parameters: Sequence[Tensor], optimizer: Optimizer, schedule: LRScheduler) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def copy_batches(
    processor: Qwen3VLProcessor, words: Sequence[int], batch_size: int, rng: random.Random
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield batches of random texts, to be answered with those of ``words`` in them.

    One to four of them stand in a row, with up to three other words on either side. Nothing but copying
    answers this. A large model copies words that it has never seen; a small one has to learn that on many
    random words, because captions of a thousand things are learned by heart sooner.
    """
    tokenizer = processor.tokenizer
    others = sorted(set(range(len(tokenizer))) - set(words) - set(tokenizer.all_special_ids))
    while True:
        before, size, after = rng.randint(0, 3), rng.randint(1, 4), rng.randint(0, 3)
        prompts, answers = [], []
        for _ in range(batch_size):
            answers.append(rng.choices(words, k=size))
            prompts.append([*rng.choices(others, k=before), *answers[-1], *rng.choices(others, k=after)])
        yield _batch(processor, prompts, answers, {})


def caption_batches(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    shown: ShownMedia,
    samples: Sequence[tuple[Medium, list[str]]],
    words: Sequence[int],
    batch_size: int,
    rng: random.Random,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield batches of media, or captions in place of a third of them, to be answered with a caption."""
    tokenizer = processor.tokenizer
    while True:
        rows: list[int] = []
        texts, answers, read = [], [], []
        for row in rng.choices(range(len(samples)), k=batch_size):
            captions = samples[row][1]
            other, answer = rng.choice(captions), rng.choice(captions)
            read.append(rng.random() < 0.35)
            rows += [] if read[-1] else [row]
            texts.append(other if read[-1] else shown.slot(row))
            answers.append(answer)
        features = shown.seen(model, rows)
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        completions = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for row, reads in enumerate(read):
            if reads and rng.random() < _RENAMED:
                prompts[row], completions[row] = _renamed(prompts[row], completions[row], words, rng)
        yield _batch(processor, prompts, completions, features)


def _renamed(
    prompt: list[int], completion: list[int], words: Sequence[int], rng: random.Random
) -> tuple[list[int], list[int]]:
    """Put random ones of ``words`` in place of those that two captions share, the same ones in both."""
    shared = sorted(set(prompt) & set(completion) & set(words))
    other = dict(zip(shared, rng.sample(words, len(shared)), strict=True))
    return [other.get(word, word) for word in prompt], [other.get(word, word) for word in completion]


def _batch(
    processor: Qwen3VLProcessor,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    features: dict[str, Any],
) -> tuple[dict[str, Any], Tensor]:
    """Return model inputs, with the chat layout around prompts and answers, and labels (-100: no loss)."""
    tokenizer = processor.tokenizer
    parts = ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"]
    start, between, end = tokenizer(parts, add_special_tokens=False)["input_ids"]
    prompts = [[*start, *prompt, *between] for prompt in prompts]
    answers = [[*answer, *end] for answer in answers]
    length = max(len(p) + len(c) for p, c in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : stop] = torch.tensor(answer)
        mask[row, :stop] = 1
    kinds = (ids == processor.image_token_id).int() + 2 * (ids == processor.video_token_id).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **features}, labels
