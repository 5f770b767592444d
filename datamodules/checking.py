"""Checks a table or a corpus before anything is trained on it: every fault at once, and what is in it.

Called by ``rime shards check`` and `rime doctor`. Nothing is written.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import track

from rime_pl.datamodules.builders.folder import Pictures, deal, missing_splits
from rime_pl.datamodules.builders.table import SPLITS, read_table
from rime_pl.datamodules.faults import Fault
from rime_pl.datamodules.shards import ShardReader, is_as_built, read_corpus, read_split
from rime_pl.errors import DataError, RimeError
from rime_pl.prompts import IMAGE_SLOT, IMAGE_TOKEN, MAX_IMAGES, TURN_END, TURN_START, PromptConfig
from rime_pl.types import Item, Pair

if TYPE_CHECKING:  # transformers takes seconds, and most checks need no processor
    from rime_pl.datamodules.datamodule import RimeDataModule
    from rime_pl.processing import RimeProcessor

_CHARACTERS = 4  # of a token, where no processor counts
#: Faults of samples that a run leaves out as broken, up to ``data.max_broken_share``.
_BROKEN = {
    *("broken sample", "special token", "too many pictures"),
    *("over-long instruction", "over-long text", "over-long rewrite"),
}
_COMPARED = ("train", "val", "test")  # no content may be in two of these
_SPECIAL = re.compile(
    "|".join(
        re.escape(token)
        for token in (
            *(IMAGE_TOKEN, TURN_START, TURN_END, *IMAGE_SLOT.split("{pads}")),
            *(PromptConfig.disc_token, PromptConfig.gen_token),
        )
    )
)


@dataclass(frozen=True)
class Limits:
    """What a training takes.

    Args:
        batch_size: Number of pairs in a training batch.
        max_text_tokens: Largest number of tokens of a text, and of an instruction.
        max_rewrite_tokens: Largest number of tokens of a rewrite.
        max_images: Largest number of pictures of an item.
    """

    batch_size: int = 32
    max_text_tokens: int = 512
    max_rewrite_tokens: int = PromptConfig.max_rewrite_tokens
    max_images: int = MAX_IMAGES


@dataclass
class Counts:
    """What a split holds of one task."""

    pairs: int = 0
    with_pictures: int = 0
    annotated: int = 0  # with a rewrite on both sides, as the losses need it
    half_annotated: int = 0
    contents: set[str] = field(default_factory=set)  # of targets


@dataclass
class Checked:
    """The result of a check: counts of each split and task, faults, and notes on how a table was read."""

    counts: dict[tuple[str, str], Counts] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """The number of faults that stop a build or a training, or make a result wrong."""
        return sum(fault.level == "problem" for fault in self.faults)

    def of_split(self, split: str) -> dict[str, Counts]:
        """Return the counts of each task of a split."""
        return {task: counts for (name, task), counts in self.counts.items() if name == split}

    def pairs(self, split: str) -> int:
        """Return the number of good pairs of a split."""
        return sum(counts.pairs for counts in self.of_split(split).values())


def check_table(
    table: Path,
    media: Path | None = None,
    limits: Limits = Limits(),
    processor: RimeProcessor | None = None,
    shares: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
) -> Checked:
    """Return every fault of a table of pairs; each picture is decoded.

    Args:
        table: CSV or JSONL file, as for ``rime shards folder``.
        media: Folder of the pictures; that of the table if None.
        limits: What the training will take.
        processor: Counts tokens and knows the special ones; None estimates 4 characters a token.
        shares: Shares of the contents in val and test, for rows without a split.
        seed: Seed of that split.

    Raises:
        DataError: If the table as a whole cannot be read.
    """
    found = read_table(table, media)
    rows = deal(found.rows, seed, *shares)
    check = _Check(limits, processor, found.faults, found.notes, joint="_")
    pictures = Pictures(found.faults)
    everything = [(split, row) for split in SPLITS for row in rows[split]]
    for row in found.faulty:
        check.texts(row.where, row.pair)
    for split, row in track(
        everything, f"pictures of {table.name}", transient=True, disable=not sys.stdout.isatty()
    ):
        check.texts(row.where, row.pair)
        if check.many_images(row.where, {side: len(files) for side, files in row.files.items()}):
            continue
        for pair in pictures.pairs(split, [row]):
            if pair is not None:
                check.add(split, row.where, pair)
    try:
        missing_splits(table, {split: check.found.pairs(split) for split in SPLITS})
    except RimeError as error:
        said = str(error).removeprefix(f"{table}: ")
        found.faults.append(Fault("missing split", table.name, said))
    return check.finished(table.name)


def check_corpus(path: Path, limits: Limits = Limits(), processor: RimeProcessor | None = None) -> Checked:
    """Return every fault of a finished corpus; each sample is read and each picture decoded.

    Args:
        path: Corpus folder.
        limits: What the training will take.
        processor: Counts tokens and knows the special ones; None estimates 4 characters a token.

    Raises:
        DataError: If the folder is no finished corpus.
    """
    corpus = read_corpus(path)
    check = _Check(limits, processor, [], [], joint=".")
    for split, about in corpus["splits"].items():
        for name, pair in track(
            _samples(path, split, check.found.faults, limits.max_images),
            f"split {split}",
            about.get("samples"),
            transient=True,
            disable=not sys.stdout.isatty(),
        ):
            check.texts(name, pair)
            check.add(split, name, pair)
    for split in _COMPARED[1:]:
        if check.found.pairs("train") and not check.found.pairs(split):
            said = f"split {split!r} must have samples, because a training validates and tests, but has none."
            check.found.faults.append(Fault("missing split", str(path), said))
    return check.finished(str(path))


def check_training(data: RimeDataModule) -> Checked:
    """Return every fault of the corpus of a run that has not started; what its settings allow is a warning.

    Args:
        data: With a processor, or None to estimate 4 characters a token; not set up.
    """
    prompt = data.prompt
    most = prompt.max_text_tokens or sys.maxsize, prompt.max_rewrite_tokens, prompt.image_limit
    limits = Limits(data.batch_size, *most)
    found = Checked()
    try:
        found = check_corpus(Path(data.path), limits, data.processor)
        data.plan_training()
    except RimeError as error:
        found.faults.append(Fault("refused", "this run", str(error)))
    allowed = {"small task", "no annotation"}  # the run itself refuses them, or needs no rewrites
    if data.too_long == "cut":
        allowed |= {"over-long text", "over-long rewrite"}
    if data.rewrites == "none":
        allowed.add("over-long rewrite")
    broken = {fault.where for fault in found.faults if fault.kind in _BROKEN - allowed}
    # where: "val-000000.tar/key"
    of_split = Counter(where.partition("/")[0].rpartition("-")[0] for where in broken)
    if all(count <= data.max_broken_share * found.pairs(split) for split, count in of_split.items()):
        allowed |= _BROKEN
    found.faults = [replace(one, level="warning") if one.kind in allowed else one for one in found.faults]
    return found


def _samples(path: Path, split: str, faults: list[Fault], max_images: int) -> Iterator[tuple[str, Pair]]:
    try:
        entries = read_split(path, split)
    except DataError as error:
        faults.append(Fault("broken split", f"{path}, split {split!r}", str(error)))
        return
    for shard in sorted({entry.shard for entry in entries}):
        if not is_as_built(shard):
            said = "the tar must be as it was built, but its bytes have changed. Copy it or build it again."
            faults.append(Fault("changed tar", shard.name, said))
    reader = ShardReader(entries, max_images=max_images)
    for number, entry in enumerate(entries):
        try:
            yield entry.name, reader.read(number)
        except DataError as error:
            faults.append(Fault("broken sample", entry.name, str(error).removeprefix(f"{entry.name}: ")))


class _Check:
    """Looks at good pairs one by one, and at the end at all of them together."""

    def __init__(
        self,
        limits: Limits,
        processor: RimeProcessor | None,
        faults: list[Fault],
        notes: list[str],
        joint: str,
    ) -> None:
        self.limits, self.processor, self.joint = limits, processor, joint
        self.found = Checked({}, faults, notes)
        #: content of a target -> split -> content of a query -> its first row
        self._contents: dict[str, dict[str, dict[str, str]]] = {}
        self._special = processor.special_pattern if processor else _SPECIAL

    def add(self, split: str, where: str, pair: Pair) -> None:
        """Count a good pair."""
        counts = self.found.counts.setdefault((split, pair.dataset), Counts())
        rewritten = _rewritten(pair)
        counts.pairs += 1
        counts.with_pictures += any(item.images for item in _sides(pair).values())
        counts.annotated += len(rewritten) == 2
        counts.half_annotated += pair.query is not None and len(rewritten) == 1
        counts.contents.add(pair.target.content_id)
        if split in _COMPARED:
            queries = self._contents.setdefault(pair.target.content_id, {}).setdefault(split, {})
            queries.setdefault(pair.query.content_id if pair.query else "", where)

    def texts(self, where: str, pair: Pair) -> None:
        """Look at the texts of a pair, whether its pictures are good or not."""
        if pair.query is not None and len(rewritten := _rewritten(pair)) == 1:
            said = (
                f"only the {rewritten[0]} has a rewrite: the pair does not count as annotated. Add the other."
            )
            self._tell("half annotated", where, said, warning=True)
        for name, item in _sides(pair).items():
            self._texts(where, name, item)

    def many_images(self, where: str, counts: dict[str, int]) -> bool:
        """Return whether a side of a row has too many pictures; it is told."""
        most = {side: count for side, count in counts.items() if count > self.limits.max_images}
        for side, count in most.items():
            said = (
                f"field '{side}{self.joint}image' names {count} pictures, but max_images is "
                f"{self.limits.max_images}. Use fewer, or train with a higher limit and give --max_images."
            )
            self._tell("too many pictures", where, said)
        return bool(most)

    def _texts(self, where: str, side: str, item: Item) -> None:
        limits = self.limits
        for name, text, most, option in (
            ("text", item.text, limits.max_text_tokens, "max_text_tokens"),
            ("instruction", item.instruction, limits.max_text_tokens, "max_text_tokens"),
            ("rewrite", item.rewrite or "", limits.max_rewrite_tokens, "max_rewrite_tokens"),
        ):
            field = f"field '{side}{self.joint}{name}'"
            if token := self._special.search(text):
                said = f"must not contain {token.group()!r}, because it is a special token of the model."
                self._tell("special token", where, f"{field} {said} Remove it.")
            if (tokens := self._tokens(text)) > most:
                about = "" if self.processor else "about "
                said = (
                    f"{field} has {about}{tokens} tokens, but {option} is {most}. Shorten it, set "
                    f"data.too_long to cut, or train with a higher limit and give --{option} here."
                )
                self._tell(f"over-long {name}", where, said)

    def _tokens(self, text: str) -> int:
        if self.processor is None:
            return -(-len(text) // _CHARACTERS)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tell(self, kind: str, where: str, says: str, warning: bool = False) -> None:
        self.found.faults.append(Fault(kind, where, says, "warning" if warning else "problem"))

    def finished(self, name: str) -> Checked:
        """Look at all pairs together and return what was found."""
        self._shared_contents()
        training = self.found.of_split("train")
        for task, counts in training.items():
            self._size_of_task(f"{name}, task {task!r}", counts)
        pairs = self.found.pairs("train")
        annotated = sum(counts.annotated for counts in training.values())
        if pairs and not annotated:
            said = (
                "no training pair has rewrites on both sides, so SFT and CMA have nothing to teach. Add some."
            )
            self._tell("no annotation", name, said)
        elif annotated < pairs:
            said = (
                f"{annotated} of {pairs} training pairs have rewrites on both sides. SFT and CMA take the "
                "others only with data.require_rewrites false."
            )
            self._tell("few annotations", name, said, warning=True)
        if not pairs:
            said = "there is no training pair, so it can be evaluated, but not trained on."
            self._tell("no train split", name, said, warning=True)
        return self.found

    def _size_of_task(self, where: str, counts: Counts) -> None:
        size = self.limits.batch_size
        if counts.pairs < size:
            said = (
                f"a batch of {size} holds one task, but there are only {counts.pairs} training pairs. Add "
                f"some, or train with data.batch_size {counts.pairs} or less and give --batch_size here."
            )
            self._tell("small task", where, said)
        elif len(counts.contents) < size:
            said = (
                f"a batch of {size} pairs has equal targets, because there are only {len(counts.contents)} "
                "contents. Equal targets are no negatives of each other."
            )
            self._tell("few contents", where, said, warning=True)

    def _shared_contents(self) -> None:
        """Tell each content that is a target in two splits; it is a problem if the query is the same, too."""
        for content, splits in self._contents.items():
            for first, second in itertools.combinations([name for name in _COMPARED if name in splits], 2):
                same = splits[first].keys() & splits[second].keys()
                query = min(same) if same else next(iter(splits[second]))
                other = splits[first].get(query) or next(iter(splits[first].values()))
                said = (
                    f"content {content!r:.90} is a target in split {second!r} and, at {other}, in {first!r}."
                    + (" The query has the same content, too: move both into one split." if same else "")
                )
                self._tell("content in two splits", splits[second][query], said, warning=not same)


def _sides(pair: Pair) -> dict[str, Item]:
    return {**({} if pair.query is None else {"query": pair.query}), "target": pair.target}


def _rewritten(pair: Pair) -> list[str]:
    return [name for name, item in _sides(pair).items() if (item.rewrite or "").strip()]
