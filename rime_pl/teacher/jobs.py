"""The whole work of `rime rewrite`, in order: look at all pairs, ask for what is missing, judge, hand on.

Equal content is asked for once. rime_pl/commands/rewrite.py calls it, and writing.py takes the pairs from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from rime_pl.datamodules.faults import first_lines
from rime_pl.errors import DataError, RimeError
from rime_pl.prompts import MAX_MEDIA
from rime_pl.teacher import wording
from rime_pl.teacher.cache import Answer, Answers
from rime_pl.teacher.client import Client, Failure
from rime_pl.teacher.filters import Verdict, judge
from rime_pl.teacher.request import Request, make_request
from rime_pl.teacher.responses import split_response
from rime_pl.teacher.settings import Filters, Price, Teacher, Way
from rime_pl.teacher.sources import Source
from rime_pl.types import Item, Pair, Side

SIDES: tuple[Side, ...] = get_args(Side)
#: What becomes of a side that no teacher is asked about.
HAS_ONE, NO_THOUGHTS, NO_ANSWER = "has a rewrite", "no chain of thought", "no marked answer"
TOO_MANY = "too many pictures"
NEW = "new rewrite"
#: Failures in a row at which nobody goes on; the first number counts as long as nothing was answered.
_IN_A_ROW = (5, 20)


class Job(NamedTuple):
    """Where a request comes from: one of the sides with this content."""

    number: int  # of the pair
    side: Side
    prompt_tokens: int  # estimate


@dataclass(frozen=True)
class Order:
    """What is to be done.

    Args:
        way: Where rewrites come from.
        sides: Sides that get them.
        teacher, filters, price: Settings.
        again: Whether sides that have a rewrite get a new one.
        limit: Largest number of pairs, evenly spaced; None for all.
    """

    way: Way
    sides: tuple[Side, ...]
    teacher: Teacher
    filters: Filters
    price: Price
    again: bool = False
    limit: int | None = None


@dataclass
class Spent:
    """What was asked for, and what it has cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answered: int = 0
    estimated: int = 0  # answers whose tokens the endpoint does not tell


@dataclass
class Jobs:
    """All sides that get a rewrite, and what has become of them.

    Args:
        order: What is to be done.
        source: The pairs.
        answers: Of this and earlier runs.
    """

    order: Order
    source: Source
    answers: Answers
    keys: dict[tuple[int, Side], str] = field(default_factory=dict)  # of the request of a side
    jobs: dict[str, Job] = field(default_factory=dict)  # by key
    left: dict[tuple[int, Side], str] = field(default_factory=dict)  # sides that are not asked about -> why
    broken: dict[int, str] = field(default_factory=dict)  # pairs that cannot be read
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # by key
    failures: dict[str, Failure] = field(default_factory=dict)  # by key
    spent: Spent = field(default_factory=Spent)
    faults: Counter[str] = field(default_factory=Counter)  # of single tries
    dropped: Counter[str] = field(default_factory=Counter)  # filter -> answers that it has dropped
    _in_a_row: int = 0

    def __post_init__(self) -> None:
        order = self.order
        self.prompts = {
            side: wording.prompt(
                *(side, order.filters.max_rewrite_tokens, order.way == "distil"),
                own=order.teacher.prompt_file(side),
            )
            for side in SIDES
        }

    # -- look -----------------------------------------------------------------------------------------

    def look(self, each: Callable[[], object] = lambda: None) -> None:
        """Look at every pair once: what is asked, and what is known already.

        Raises:
            DataError: If too many pairs cannot be read.
        """
        asked = [number for number in range(len(self.source)) if self.source.is_asked(number)]
        step = -(-len(asked) // self.order.limit) if self.order.limit else 1
        chosen = frozenset(asked[::step])
        for number in range(len(self.source)):
            each()
            try:
                pair = self.source.read(number)
            except DataError as error:
                self.broken[number] = str(error)
                continue
            if number in chosen:
                for side, item in sides_of(pair):
                    if side in self.order.sides:
                        self._add(number, side, item)
        share, broken = self.order.teacher.max_failed_share, self.broken
        if len(broken) > share * len(self.source):
            raise DataError(
                f"At most {share:g} of the pairs may be unreadable (--teacher.max_failed_share), but "
                f"{len(broken)} of {len(self.source)} are:\n{first_lines(broken.values())}"
            )

    def _add(self, number: int, side: Side, item: Item) -> None:
        thoughts = self._thoughts(item)
        marked = split_response(item.rewrite or "") is not None  # a whole response in the place of a rewrite
        if item.rewrite and not self.order.again and not (marked and self.order.way != "write"):
            self.left[number, side] = HAS_ONE
        elif self.order.way == "extract":
            self._extract(number, side, item)
        elif self.order.way == "distil" and not thoughts:
            self.left[number, side] = NO_THOUGHTS
        elif len(item.media) > MAX_MEDIA:
            self.left[number, side] = TOO_MANY
        else:
            request = self._request(number, side, item)
            self.keys[number, side] = request.key
            if request.key not in self.jobs:
                self.jobs[request.key] = Job(number, side, request.prompt_tokens)
                if answer := self.answers.known.get(request.key):
                    self.verdicts[request.key] = self._judge(side, item.instruction, answer)

    def _extract(self, number: int, side: Side, item: Item) -> None:
        split = next(filter(None, map(split_response, (item.cot or "", item.rewrite or ""))), None)
        if split is None:
            self.left[number, side] = NO_ANSWER
            return
        key = f"{number} {side}"
        self.keys[number, side] = key
        self.verdicts[key] = self._judge(side, item.instruction, Answer(split[1]))

    def _thoughts(self, item: Item) -> str:
        """Return the chain of thought of an item in plain words; of a whole response also its answer."""
        if self.order.way != "distil":
            return ""
        text = item.cot or ""
        if not text.strip() and split_response(item.rewrite or ""):
            text = item.rewrite or ""
        return plain(text)

    def _request(self, number: int, side: Side, item: Item) -> Request:
        name = f"{self.source.name(number)} ({side})"
        return make_request(item, name, self.prompts[side], self.order.teacher, self._thoughts(item))

    def _judge(self, side: Side, instruction: str, answer: Answer) -> Verdict:
        verdict = judge(answer, self.prompts[side], instruction, self.order.filters)
        if verdict.rewrite is None:
            self.dropped[verdict.dropped_by] += 1
        return verdict

    def outcome(self, number: int, side: Side) -> tuple[str, str]:
        """Return what has become of a side, as it is counted, and the reason; "" if it is not looked at."""
        if (reason := self.left.get((number, side))) is not None:
            return reason, reason
        if (key := self.keys.get((number, side))) is None:
            return "", ""
        if failure := self.failures.get(key):
            return f"failed: {failure.kind}", failure.says
        if (verdict := self.verdicts.get(key)) is None:
            return "not asked", "not asked"
        if verdict.rewrite is None:
            return f"dropped: {verdict.dropped_by}", verdict.reason
        return NEW, ""

    def rewrite(self, number: int, side: Side) -> str | None:
        """Return the new rewrite of a side, if it has one."""
        verdict = self.verdicts.get(self.keys.get((number, side), ""))
        return verdict.rewrite if verdict else None

    # -- ask ------------------------------------------------------------------------------------------

    @property
    def missing(self) -> list[Job]:
        """The requests without an answer."""
        return [job for key, job in self.jobs.items() if key not in self.answers.known]

    def mean_completion(self) -> float | None:
        """Return the mean number of tokens of the answers that are known; None if none says it."""
        known = [self.answers.known[key].completion_tokens for key in self.jobs if key in self.answers.known]
        counts = [count for count in known if count is not None]
        return sum(counts) / len(counts) if counts else None

    def ask(self, after_each: Callable[[], None]) -> None:
        """Ask for all that is missing; what is answered is kept at once.

        Raises:
            RimeError: If the endpoint is of no use, too many requests fail, or the cost reaches its limit.
            StoppedError: If somebody stopped it.
        """
        client = Client(self.order.teacher)
        self.faults = client.faults

        def answered(request: Request, answer: Answer) -> None:
            self._in_a_row = 0
            self.answers.add(request.key, self.order.teacher.model, answer)
            self._count(request, answer)
            side = self.jobs[request.key].side
            self.verdicts[request.key] = self._judge(side, request.instruction, answer)
            after_each()
            self._refuse_cost()

        def failed(request: Request, failure: Failure) -> None:
            self._in_a_row += 1
            self.failures[request.key] = failure
            after_each()
            self._refuse_failures()

        client.ask(self._requests(), answered, failed)

    def _requests(self) -> Iterator[Request]:
        for job in self.missing:
            item = dict(sides_of(self.source.read(job.number)))[job.side]
            yield self._request(job.number, job.side, item)

    def _count(self, request: Request, answer: Answer) -> None:
        told = answer.prompt_tokens is not None and answer.completion_tokens is not None
        self.spent.answered += 1
        self.spent.estimated += not told
        self.spent.prompt_tokens += answer.prompt_tokens or (0 if told else request.prompt_tokens)
        self.spent.completion_tokens += answer.completion_tokens or (0 if told else len(answer.text) // 4 + 1)

    @property
    def cost(self) -> float:
        """What this command has cost so far."""
        return self.order.price.of(self.spent.prompt_tokens, self.spent.completion_tokens)

    def _refuse_cost(self) -> None:
        limit = self.order.price.limit
        if limit is not None and self.cost >= limit and self.missing:
            raise RimeError(
                f"The cost must stay below --price.limit {limit:g}, but has reached {self.cost:.4f}. "
                f"{self.kept()} Raise the limit to go on."
            )

    def _refuse_failures(self) -> None:
        share, total, failed = self.order.teacher.max_failed_share, len(self.jobs), len(self.failures)
        row = _IN_A_ROW[1 if self.spent.answered else 0]
        if failed > share * total:
            allowed = f"At most {share:g} of the requests may fail (--teacher.max_failed_share)"
            rule = f"{allowed}, but {failed} of {total}"
        elif self._in_a_row >= row:
            rule = f"Some requests must succeed, but the last {self._in_a_row}"
        else:
            return
        raise RimeError(f"{rule} have failed for good:\n{self.failed_lines()}\n{self.kept()}")

    def kept(self) -> str:
        """Return where the answers are."""
        if not self.answers.known:
            return "Nothing was answered."
        return f"{len(self.answers.known)} answers are in {self.answers.path}, and none is asked for again."

    def failed_lines(self) -> str:
        """Return the first requests that failed for good, each with its reason."""
        return first_lines(
            f"{self.source.name(job.number)} ({job.side}): {self.failures[key].says}"
            for key, job in self.jobs.items()
            if key in self.failures
        )


def sides_of(pair: Pair) -> Sequence[tuple[Side, Item]]:
    """Return the sides of a pair; a gallery item without a query has one."""
    target: tuple[Side, Item] = ("target", pair.target)
    return [("query", pair.query), target] if pair.query is not None else [target]


def plain(text: str) -> str:
    """Return a response without the tags around its parts.

    >>> plain("<think>It is a ring.</think><answer>A red ring.<gen_emb>")
    'It is a ring.\\nA red ring.'
    """
    split = split_response(text)
    return "\n".join(part for part in split if part) if split else text.strip()


def with_rewrite(item: Item, rewrite: str) -> Item:
    """Return an item with a new rewrite. A whole response that stood there becomes its chain of thought."""
    cot = item.cot
    if split_response(cot or ""):
        cot = plain(cot or "")
    elif not (cot or "").strip() and split_response(item.rewrite or ""):
        cot = plain(item.rewrite or "")
    return replace(item, rewrite=rewrite, cot=cot)
