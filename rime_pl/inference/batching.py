"""Sort items by length, cut them into batches, and open their pictures while the model computes.

Called by the retriever. A batch of similar lengths has little padding; of 500 mixed items in the order of a
user, half of the tokens would be padding.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch

from rime_pl.inference.sources import Source, holds_opened, item_name, media_shapes, one_item, text_of
from rime_pl.processing import RimeProcessor
from rime_pl.types import Item, Prompts

#: A batch has so many tokens at most, with padding; a longer item is a batch of its own.
MAX_TOKENS = 2048
#: Of these, so many are for the words around an item, with an instruction.
AROUND = 16
#: A batch is full with so many pixels: four photos of 12 megapixels, 150 MB before they are scaled down.
MAX_PIXELS = 48_000_000
#: Threads that open pictures at most: each holds the pictures of one batch.
MAX_WORKERS = 4
#: Texts that are counted in tokens at a time.
_COUNTED = 1024


#: Returns an item, or None if it cannot be used.
Opens = Callable[[], Item | None]
#: The items of a batch with their numbers.
Entries = list[tuple[int, Opens]]


@dataclass
class Prepared:
    """A batch that the model can read."""

    numbers: list[int]  # of its items among all
    prompts: Prompts | None  # R rows; None if no item of the batch can be used
    done: int  # items that are done with it: R, and those that cannot be used


@dataclass
class Size:
    """What an item costs."""

    tokens: int  # of its text and its pictures, without the words around them
    pixels: int  # of its pictures, as they are in their files


class Batches:
    """The items as batches in an order of their own: longest first, so the first batch shows if memory lasts.

    The pictures of a batch are opened when it is due. With more than one core, threads do it while the model
    reads the batch before: Pillow and torch do not hold the interpreter while they compute. Threads only open
    files. A sequence that reads an item when it is asked for, and a picture that the user has opened, may
    belong to the user's own thread.

    Args:
        rows: From ``sources.checked``. A sequence that is no list or tuple keeps its order, because each item
            is read once.
        processor: That of the model.
        batch_size: Largest number of items of a batch.
        instruction: Of items without one.
        unusable: Where items that cannot be used are added, number -> what is wrong; None raises it.
    """

    def __init__(
        self,
        rows: Sequence[Source],
        processor: RimeProcessor,
        batch_size: int,
        instruction: str,
        unusable: dict[int, str] | None,
    ) -> None:
        self.rows, self.processor, self.instruction = rows, processor, instruction
        self.unusable = unusable
        found = self._sorted() if isinstance(rows, list | tuple) else self._as_read()
        batches = cut(found, batch_size)
        first = list(islice(batches, 2))
        self.several = len(first) > 1  # whether there is more than one batch
        self._batches = chain(first, batches)

    def __iter__(self) -> Generator[Prepared, None, None]:
        workers = min(MAX_WORKERS, _cores() - 1) if self.several else 0
        if not workers:
            yield from map(self._prepare, self._batches)
            return
        threads = torch.get_num_threads()
        # a thread that opens pictures beside the model needs no helpers: they would take its cores
        pool = ThreadPoolExecutor(workers, "rime-open", torch.set_num_threads, (1,))
        try:
            waiting: deque[Future[Prepared]] = deque()
            for batch in self._batches:
                waiting.append(pool.submit(self._prepare, batch))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # the number that threads start with is one for the whole process

    def _sorted(self) -> Iterator[tuple[int, Opens, Size]]:
        sizes = measured(self.rows, self.processor)
        for number in sorted(range(len(sizes)), key=lambda number: -sizes[number].tokens):
            opens = partial(one_item, self.rows, number, self.instruction, self.unusable)
            yield number, as_it_is(opens()) if holds_opened(self.rows[number]) else opens, sizes[number]

    def _as_read(self) -> Iterator[tuple[int, Opens, Size]]:
        for number in range(len(self.rows)):
            item = one_item(self.rows, number, self.instruction, self.unusable)
            yield number, as_it_is(item), measured([item], self.processor)[0] if item else Size(0, 0)
            del item  # its pictures must not outlive the batch

    def _prepare(self, batch: Entries) -> Prepared:
        items = {number: opens() for number, opens in batch}
        usable = {number: item for number, item in items.items() if item is not None}
        batch.clear()  # the caller still has this list
        names = [item_name(number, len(self.rows)) for number in usable]
        prompts = self.processor.prompts(list(usable.values()), names) if usable else None
        return Prepared(list(usable), prompts, len(items))


def as_it_is(item: Item | None) -> Opens:
    """Return what returns an item that is there already."""
    return lambda: item


def cut(found: Iterable[tuple[int, Opens, Size]], batch_size: int) -> Iterator[Entries]:
    """Yield the items in batches, in their order; see ``MAX_TOKENS`` and ``MAX_PIXELS``."""
    batch: Entries = []
    longest = pixels = 0
    for number, opens, size in found:
        longest = max(longest, size.tokens + AROUND)
        if batch and (
            len(batch) == batch_size
            or (len(batch) + 1) * longest > MAX_TOKENS
            or pixels + size.pixels > MAX_PIXELS
        ):
            yield batch
            batch, longest, pixels = [], size.tokens + AROUND, 0
        batch.append((number, opens))
        pixels += size.pixels
        del opens
    if batch:
        yield batch


def measured(sources: Sequence[Source], processor: RimeProcessor) -> list[Size]:
    """Return the size of each item, from its text and the headers of its pictures; no picture is decoded.

    A picture that cannot be read counts as nothing: it fails when its batch is due.
    """
    texts = [text_of(source) for source in sources]
    tokens: list[int] = []
    for start in range(0, len(texts), _COUNTED):
        rows = processor.tokenizer(texts[start : start + _COUNTED], add_special_tokens=False)["input_ids"]
        tokens += map(len, rows)
    sizes = []
    for source, count in zip(sources, tokens, strict=True):
        media = [processor.media.size_of(*shape) for shape in media_shapes(source)]
        visual, pixels = (sum(numbers) for numbers in zip(*media, strict=True)) if media else (0, 0)
        sizes.append(Size(count + visual, pixels))
    return sizes


def up_to(prompts: Prompts, token: int) -> Prompts:
    """Return prompts without the columns behind the last one that holds a token.

    Attention is causal, so what is read there is exactly the same. The embedding of the discriminative mode
    is read before the words that ask for a rewrite.
    """
    columns = (prompts.input_ids == token).any(dim=0).nonzero()
    end = int(columns[-1]) + 1 if len(columns) else prompts.input_ids.shape[1]
    return replace(
        prompts, input_ids=prompts.input_ids[:, :end], attention_mask=prompts.attention_mask[:, :end]
    )


def _cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
