"""Reads what the tiny base model of a corpus is made from: media with captions, and texts.

Called by `rime base`. A built-in corpus has a split "captions". Of any other corpus the training pairs serve,
and no other split is opened: what a base model has seen may not be tested.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rime_pl.bars import track
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.faults import counted, first_lines
from rime_pl.datamodules.index_writer import MEDIA, TEXT
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader, of_tasks, read_split
from rime_pl.datamodules.tar_files import TarFiles
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.errors import DataError, RimeError
from rime_pl.media import thinned
from rime_pl.types import Clip, Item, Medium, Pair, Side, frames_of, with_frames

SPLIT = "captions"
#: Pixels of the longer side of a picture, at least: two patches of the tiny base model.
_SMALLEST = 24
#: A picture with more pairs keeps the captions of so many.
_CAPTIONS = 8
#: A caption is cut here: a model of 3 million parameters does not learn to write more.
_WORDS, _LETTERS = 40, 240
#: Training pairs whose words the tokenizer learns, about.
_TOKENIZER_PAIRS = 4000
#: Frames of a clip.
_FRAMES = 4
_ANY_MEDIUM = sum(MEDIA.values())


@dataclass
class Captions:
    """Media with their captions, texts for the tokenizer, and what a user should know of both."""

    samples: list[tuple[Medium, list[str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_pictures: bool = False  # the corpus has texts only; each picture is a blank sheet


def read_captions(
    data: Path, tasks: Collection[str] | None, picture_side: int, most: int, seed: int
) -> Captions:
    """Return the captions that a corpus has: those of the split "captions", or else of its training pairs.

    Args:
        data: Corpus folder.
        tasks: Tasks of the training split that are used; None for all.
        picture_side: Pixels of the longer side of a picture of the training pairs, at most.
        most: Largest number of pictures of the training pairs; of more, some are chosen.
        seed: Seed of that choice.

    Raises:
        DataError: If the corpus has no split "train", or no sample that can be read.
        RimeError: If it has no such task, or pictures but none with a text.
    """
    words = read_words(data, tasks)
    if SPLIT in read_corpus(data)["splits"]:
        found = _of_split(data)
    else:
        entries = of_tasks(read_split(data, "train"), tasks or None, data)
        found = _of_training(entries, data, picture_side, most, seed)
    found.texts += words
    return found


def read_words(data: Path, tasks: Collection[str] | None) -> list[str]:
    """Return texts of the training pairs, for the tokenizer only: a downloaded one would know their words.

    Raises:
        RimeError: If the corpus has no such task.
    """
    entries = read_split(data, "train")
    known = {entries.tasks[code] for code in np.unique(entries.task_codes()).tolist()}
    if unknown := set(tasks or ()) - known:
        raise RimeError(f"--tasks {' '.join(sorted(unknown))}: no such task in {data}.")
    reader = TextReader(of_tasks(entries, tasks or None, data))
    pairs = read_texts(reader, _TOKENIZER_PAIRS, "reading words")
    return [text for pair in pairs for text in _texts(pair)]


def _of_split(data: Path) -> Captions:
    """Return the pictures of the split "captions" as they are, each with the lines of its text."""
    reader = ShardReader(read_split(data, SPLIT))
    pairs = [reader.read(n) for n in track(range(len(reader)), "reading captions")]
    samples = [(pair.query.media[0], pair.target.text.split("\n")) for pair in pairs if pair.query]
    return Captions(samples, [text for pair in pairs for text in _texts(pair)])


def _of_training(entries: Samples, data: Path, side: int, most: int, seed: int) -> Captions:
    """Return the pictures of the training pairs, each with the texts that stand for it."""
    modality = entries.column("modality")
    query, target = modality & 15, modality >> 4
    asks = ((query & _ANY_MEDIUM) > 0) & ((query & TEXT) == 0) & (target == TEXT)  # a picture finds a text
    found = ((target & _ANY_MEDIUM) > 0) & ((query == TEXT) | ((target & TEXT) > 0))
    if not (asks | found).any():
        if ((query | target) & _ANY_MEDIUM).any():
            raise RimeError(
                f"{data}: a tiny base model is made from training pairs with a picture on one side and text "
                "for it, on the other side or beside the target, but none is such a pair. Name a base model "
                "with --base (BASE= for make), such as Qwen/Qwen2-VL-2B-Instruct."
            )
        return _of_texts(entries, most)
    contents = np.where(asks, entries.column("query_content"), entries.column("target_content"))
    rows = _chosen(np.flatnonzero(asks | found), contents, most, seed)
    pictures: dict[int, Medium] = {}
    captions: dict[int, dict[str, None]] = {}  # keys in order, each once
    broken, tars = [], TarFiles()
    whole, texts = ShardReader(entries, tars=tars), TextReader(entries, tars=tars)
    for row in track(rows.tolist(), "reading captions"):
        content, shown = int(contents[row]), _side(bool(asks[row]))
        try:
            pair = (texts if content in pictures else whole).read(row, shown)
        except DataError as error:
            broken.append(str(error))
            continue
        item = pair.query if shown == "query" else pair.target
        assert item is not None  # the index says that there is one, and the reader has compared it
        pictures.setdefault(content, _small(item.media[0], side))
        captions.setdefault(content, {}).update(dict.fromkeys(_captions(pair, shown)))
    result = Captions([(pictures[content], [*captions[content]]) for content in pictures])
    result.texts = [text for _, several in result.samples for text in several]
    if not result.samples:
        raise DataError(f"{data}: no training pair with a picture can be read:\n{first_lines(broken)}")
    of = counted(len(entries), "training pair", "training pairs")
    result.notes.append(f"{len(pictures)} pictures with {len(result.texts)} captions, from {of}")
    if broken:
        were = counted(len(broken), "sample is broken and was", "samples are broken and were")
        result.notes.append(f"{were} left out:\n{first_lines(broken)}")
    return result


def _of_texts(entries: Samples, most: int) -> Captions:
    """Return the texts of pairs without any picture, each pair behind a blank sheet."""
    pairs = [*read_texts(TextReader(entries), most)]
    blank = Image.new("RGB", (_SMALLEST, _SMALLEST), "white")
    samples: list[tuple[Medium, list[str]]] = []
    for pair in pairs:
        sides = [shortened(item.text) for item in (pair.query, pair.target) if item]
        samples.append((blank, [*dict.fromkeys(sides)]))
    texts = [text for _, several in samples for text in several]
    note = (
        f"no pictures, texts of {len(samples)} of {counted(len(entries), 'training pair', 'training pairs')}"
    )
    return Captions(samples, texts, [note], without_pictures=True)


def _chosen(rows: NDArray[np.intp], contents: NDArray[np.int64], most: int, seed: int) -> NDArray[np.intp]:
    """Return the rows of at most ``most`` contents, a few of each, in the order of the split."""
    names, numbers = np.unique(contents[rows], return_inverse=True)
    kept = np.zeros(len(names), bool)
    kept[np.random.default_rng(seed).permutation(len(names))[:most]] = True
    order = np.argsort(numbers, kind="stable")
    starts = np.searchsorted(numbers[order], numbers[order], "left")
    few = np.empty(len(rows), bool)
    few[order] = np.arange(len(rows)) - starts < _CAPTIONS
    chosen: NDArray[np.intp] = rows[kept[numbers] & few]
    return chosen


def _side(asks: bool) -> Side:
    return "query" if asks else "target"


def _captions(pair: Pair, shown: Side) -> Iterator[str]:
    """Yield the texts for the picture on one side: its own, and that of the other side if it is only text."""
    if shown == "query":
        yield shortened(pair.target.text)
        return
    if pair.query and pair.query.text.strip() and not pair.query.media:
        yield shortened(pair.query.text)
    if pair.target.text.strip():
        yield shortened(pair.target.text)


def shortened(text: str) -> str:
    """Return the first words of a text on one line.

    >>> shortened("a red  mug\\nwith a chip")
    'a red mug with a chip'
    """
    return " ".join(text.split()[:_WORDS])[:_LETTERS].rstrip()


def _small(medium: Medium, side: int) -> Medium:
    """Return a medium with small pictures, and of a clip some of its frames."""
    if isinstance(medium, Clip):
        medium = thinned(medium, _FRAMES)
    return with_frames(medium, [_small_picture(frame, side) for frame in frames_of(medium)])


def _small_picture(frame: Image.Image, side: int) -> Image.Image:
    picture = frame.convert("RGB")
    picture.thumbnail((side, side))
    longer = max(picture.size)
    if longer >= _SMALLEST:
        return picture
    width, height = (max(1, round(length * _SMALLEST / longer)) for length in picture.size)
    return picture.resize((width, height))


def _texts(pair: Pair) -> list[str]:
    items: list[Item] = [pair.target, *([pair.query] if pair.query else [])]
    return [f"{item.instruction} {item.text}\n{item.rewrite or ''}" for item in items]
