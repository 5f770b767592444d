"""Looks at the pairs of a corpus, one by one and at the end all together: what a training would stumble over.

Used by checking.py beside it, which reads the pairs from a table, a corpus or the settings of a run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rime_pl.datamodules.faults import Fault
from rime_pl.prompts import (
    IMAGE_TOKEN,
    MAX_MEDIA,
    TURN_END,
    TURN_START,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    PromptConfig,
)
from rime_pl.types import Item, Pair, frames_of

if TYPE_CHECKING:  # transformers takes seconds, and most checks need no processor
    from rime_pl.processing import RimeProcessor

_CHARACTERS = 4  # of a token, where no processor counts
_SMALLEST = 8  # pixels of a side; a patch of Qwen's vision towers has 14 or 16
#: No content may be in two of these splits.
COMPARED = ("train", "val", "test")
SPECIAL = re.compile(
    "|".join(
        re.escape(token)
        for token in (
            *(IMAGE_TOKEN, VIDEO_TOKEN, TURN_START, TURN_END, VISION_START, VISION_END),
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
        max_media: Largest number of pictures of an item.
        of_run: Whether these are the settings of a run.
        cut: Whether the run cuts texts and rewrites that are too long.
    """

    batch_size: int = 32
    max_text_tokens: int = 512
    max_rewrite_tokens: int = PromptConfig.max_rewrite_tokens
    max_media: int = MAX_MEDIA
    of_run: bool = False  # they are the settings of a run, and no options of the check
    cut: bool = False  # the run cuts texts and rewrites that are too long

    def raised(self, setting: str, option: str) -> str:
        """Return what to do about a limit: a setting of the run, or of the training that is to come."""
        higher = f"train with a higher {setting} and give --{option} here"
        return f"raise {setting}" if self.of_run else higher


#: Those of the recipe 2b.
DEFAULT_LIMITS = Limits()


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
    kept: list[Fault] = field(default_factory=list)  # problems of rows or samples that are counted

    @property
    def faulty_kept(self) -> int:
        """The number of rows or samples that are counted and have a problem all the same."""
        return len({fault.where for fault in self.kept})

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


class PairCheck:
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
        self._added: set[str] = set()
        self._unsure = 0  # texts that an estimate finds short enough, but a tokenizer perhaps not
        #: hash of all that a pair shows -> its first row
        self._shown: dict[bytes, str] = {}
        self._special = processor.special_pattern if processor else SPECIAL

    def add(self, split: str, where: str, pair: Pair) -> None:
        """Count a good pair."""
        counts = self.found.counts.setdefault((split, pair.dataset), Counts())
        rewritten = _rewritten(pair)
        counts.pairs += 1
        self._added.add(where)
        counts.with_pictures += any(item.media for item in _sides(pair).values())
        counts.annotated += len(rewritten) == 2
        counts.half_annotated += pair.query is not None and len(rewritten) == 1
        counts.contents.add(pair.target.content_id)
        if split in COMPARED:
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

    def looks(self, split: str, where: str, pair: Pair) -> None:
        """Look at the decoded pictures of a pair, and whether the same pair was there before."""
        shown = hashlib.sha256(f"{split} {pair.dataset}".encode())
        for side, item in _sides(pair).items():
            shown.update(json.dumps([side, item.instruction, item.text]).encode())
            for image in (frame for medium in item.media for frame in frames_of(medium)):
                shown.update(f"{image.size}".encode() + image.tobytes())
                if min(image.size) < _SMALLEST:
                    said = (
                        f"the picture of the {side} has {image.width} x {image.height} pixels, so there is "
                        "hardly anything to see."
                    )
                    self._tell("tiny picture", where, said, warning=True)
        first = self._shown.setdefault(shown.digest(), where)
        if first != where:
            said = f"texts and pictures are those of {first}, too: the pair counts twice. Delete one."
            self._tell("repeated pair", where, said, warning=True)

    def many_media(self, where: str, counts: dict[str, int]) -> bool:
        """Return whether a side of a row has too many pictures; it is told."""
        most = {side: count for side, count in counts.items() if count > self.limits.max_media}
        for side, count in most.items():
            said = (
                f"field '{side}{self.joint}image' names {count} pictures, but max_media is "
                f"{self.limits.max_media}. Use fewer, or "
                f"{self.limits.raised('model.backbone.prompt.max_media', 'max_media')}."
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
            tokens = self._tokens(text)
            self._unsure += self.processor is None and most < 2 * tokens <= 2 * most
            if tokens > most:
                about = "" if self.processor else "about "
                said = f"{field} has {about}{tokens} tokens, but {option} is {most}."
                cut = name != "instruction" and limits.cut
                more = limits.raised(f"model.backbone.prompt.{option}", option)
                choices = "" if name == "instruction" else "set data.too_long to cut, or "
                remedy = "It is cut there." if cut else f"Shorten it, {choices}{more}."
                self._tell(f"over-long {name}", where, f"{said} {remedy}")

    def _tokens(self, text: str) -> int:
        if self.processor is None:
            return -(-len(text) // _CHARACTERS)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tell(self, kind: str, where: str, says: str, warning: bool = False) -> None:
        self.found.faults.append(Fault(kind, where, says, "warning" if warning else "problem"))

    def finished(self, name: str) -> Checked:
        """Look at all pairs together and return what was found."""
        self._shared_contents()
        self.found.kept = [f for f in self.found.faults if f.where in self._added and f.level == "problem"]
        if self._unsure:
            said = (
                f"{self._unsure} of the texts may be too long: their tokens were estimated, and are "
                "more than half of what a limit allows. Give --base, the base model of the training, to "
                "count them."
            )
            self._tell("estimated length", name, said, warning=True)
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
            for first, second in itertools.combinations([name for name in COMPARED if name in splits], 2):
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
