"""Chooses the hard negatives of the pairs of one task and gallery, by one mode pair or by several.

The command embeds the items and calls ``mine``. Nothing here knows a model.

Shape legend: Q queries of a chunk, N candidates, K nearest ones, D embedding width.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from rime_pl.datamodules.mining.identical import Compared, Identical
from rime_pl.datamodules.mining.items import Asked, Catalogue, Group
from rime_pl.datamodules.mining.nearest import BLOCK, nearest
from rime_pl.datamodules.mining.rules import (
    ALREADY,
    CONTENT,
    LEFT,
    NOT_LOOKED_AT,
    RULES,
    Rules,
    judge,
    lowest_scores,
)
from rime_pl.types import Mode

#: Names of modes in a mode pair, "query-target".
_MODES: dict[str, Mode] = {"disc": "discriminative", "gen": "generative"}
_MOST_QUERIES = 1024  # of a chunk
_SCORES = 1 << 24  # that a chunk holds at once


def modes_of(pair: str) -> tuple[Mode, Mode]:
    """Return the mode of the query and that of the target in a mode pair.

    >>> modes_of("gen-disc")
    ('generative', 'discriminative')
    """
    query, target = pair.split("-")
    return _MODES[query], _MODES[target]


class Choice(NamedTuple):
    """A candidate that the rules leave, as its best mode pair sees it."""

    item: int  # number in the catalogue
    modes: str  # such as "gen-disc"
    rank: int  # among the candidates that are no right answer, from 1
    score: float
    lowest: float  # score of the lowest right answer in the same mode pair


@dataclass
class Embedded:
    """The embeddings of the queries or the targets of a group; items that cannot be embedded are left out."""

    place: dict[int, int]  # number of an item -> its row
    vectors: dict[Mode, Tensor]  # (rows, D) float32, L2-normalised, on the CPU

    def has(self, numbers: Sequence[int]) -> bool:
        """Return whether all of these items have an embedding."""
        return all(number in self.place for number in numbers)


@dataclass
class Mined:
    """What has come out for the pairs of a group."""

    chosen: dict[int, list[Choice]] = field(default_factory=dict)  # row of a pair -> its negatives
    verdicts: dict[str, Counter[int]] = field(default_factory=dict)  # mode pair -> verdict -> candidates
    not_measured: list[int] = field(default_factory=list)  # rows with an item that has no embedding
    candidates: int = 0

    def counts(self, modes: str) -> dict[str, int]:
        """Return how many candidates each rule has dropped in a mode pair, by its name in ``RULES``."""
        return {rule: self.verdicts[modes][number] for number, rule in enumerate(RULES, 1)}

    def looked_at(self, modes: str) -> int:
        """Return how many candidates were looked at in a mode pair."""
        return self.verdicts[modes].total() - self.verdicts[modes][NOT_LOOKED_AT]


def mine(
    group: Group,
    catalogue: Catalogue,
    embedded: tuple[Embedded, Embedded],
    mode_pairs: Sequence[str],
    rules: Rules,
    keep: bool = False,
    query_pictures: bool = False,
    device: torch.device | None = None,
    each: Callable[[int], object] = lambda count: None,
) -> Mined:
    """Return the hard negatives of the pairs of a group.

    Every mode pair ranks the candidates by its own scores and compares them with the lowest right answer in
    the same mode pair, because the scores of two pairs are not on one scale. The candidates that any pair
    leaves are taken in turns, the nearest of each pair first. No two have the same content, text or pictures.

    Args:
        group: The pairs and the candidates.
        catalogue: Knows which items are the same.
        embedded: Of ``group.queries`` and of ``group.targets``, in the modes that the mode pairs name.
        mode_pairs: Such as "gen-disc".
        rules: The limits.
        keep: Whether the negatives that a pair has already stay, so that none is taken again.
        query_pictures: Whether a candidate may have the pictures of the query.
        device: Device that computes the scores.
        each: Called with the number of queries that are done.
    """
    mined = Mined(verdicts={modes: Counter() for modes in mode_pairs})
    queries, targets = embedded
    usable = [asked for asked in group.asked if asked.query in queries.place and targets.has(asked.answers)]
    mined.not_measured = sorted({asked.row for asked in group.asked} - {asked.row for asked in usable})
    each(len(mined.not_measured))
    candidates = [number for number in group.targets if number in targets.place]
    mined.candidates = len(candidates)
    identical = Identical(catalogue, candidates, group.asked, keep, query_pictures)
    places = torch.tensor([targets.place[number] for number in candidates], dtype=torch.int64)
    whole = torch.equal(places, torch.arange(len(group.targets)))  # then nothing is copied
    gallery = {mode: rows if whole else rows[places] for mode, rows in targets.vectors.items()}
    for chunk, compared in _chunks(usable, identical, rules.last_rank):
        left = [
            _left(chunk, embedded, gallery, modes, compared, rules, device, mined.verdicts[modes])
            for modes in mode_pairs
        ]
        for row, asked in enumerate(chunk):
            found = _in_turns([of_pair[row] for of_pair in left], candidates, identical)
            mined.chosen[asked.row] = _sampled(found, rules, catalogue.entries[asked.row].key)
        each(len(chunk))
    return mined


def _chunks(
    asked: Sequence[Asked], identical: Identical, last_rank: int
) -> Iterator[tuple[Sequence[Asked], Compared]]:
    """Yield the pairs in chunks whose scores fit into ``_SCORES``; many right answers make a chunk small."""
    waiting = [asked[start : start + _MOST_QUERIES] for start in range(0, len(asked), _MOST_QUERIES)][::-1]
    while waiting:
        chunk = waiting.pop()
        compared = identical.of(chunk)
        if len(chunk) > 1 and len(chunk) * (last_rank + compared.most + BLOCK) > _SCORES:
            half = len(chunk) // 2
            waiting += [chunk[half:], chunk[:half]]
        else:
            yield chunk, compared


def _left(
    chunk: Sequence[Asked],
    embedded: tuple[Embedded, Embedded],
    gallery: Mapping[Mode, Tensor],
    modes: str,
    compared: Compared,
    rules: Rules,
    device: torch.device | None,
    verdicts: Counter[int],
) -> list[list[Choice]]:
    """Return for each query the candidates that a mode pair leaves; all verdicts are counted."""
    query_mode, target_mode = modes_of(modes)
    asking, answering = embedded
    queries = asking.vectors[query_mode][[asking.place[asked.query] for asked in chunk]]  # (Q, D)
    owner = torch.tensor([row for row, asked in enumerate(chunk) for _ in asked.answers])
    places = [answering.place[number] for asked in chunk for number in asked.answers]
    answers = answering.vectors[target_mode][places]
    lowest = lowest_scores(queries, answers, owner)  # (Q,)
    k = rules.last_rank + compared.most
    scores, rows = (found.cpu() for found in nearest(queries, gallery[target_mode], k, device))
    verdict = judge(scores, compared.rules_of(rows), lowest, rules)  # (Q, K)
    values, counts = verdict.unique(return_counts=True)
    verdicts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    ranks = ((verdict < CONTENT) | (verdict > ALREADY)).cumsum(1)  # of those that are no right answer
    found: list[list[Choice]] = [[] for _ in chunk]
    for row, column in (verdict == LEFT).nonzero().tolist():
        found[row].append(
            Choice(
                int(rows[row, column]),
                modes,
                int(ranks[row, column]),
                float(scores[row, column]),
                float(lowest[row]),
            )
        )
    return found


def _in_turns(
    lists: Sequence[Sequence[Choice]], candidates: Sequence[int], identical: Identical
) -> list[Choice]:
    """Return the choices of all mode pairs, the first of each pair first, without repetitions."""
    taken: set[tuple[int, int]] = set()
    found: list[Choice] = []
    for choice in chain.from_iterable(zip_longest(*lists)):
        if choice is None:
            continue
        codes = identical.codes_of(choice.item)
        if taken.isdisjoint(codes):
            taken.update(codes)
            found.append(choice._replace(item=candidates[choice.item]))
    return found


def _sampled(found: list[Choice], rules: Rules, key: str) -> list[Choice]:
    if rules.sampling == "top" or len(found) <= rules.num_negatives:
        return found[: rules.num_negatives]
    numbers = random.Random(f"mine {rules.seed} {key}").sample(range(len(found)), rules.num_negatives)
    return [found[number] for number in sorted(numbers)]
