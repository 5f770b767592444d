"""Which candidates equal a right answer of a query, or a negative that it has already.

Called by choosing.py before any score is compared: an unmarked right answer is the worst negative.

Shape legend: Q queries of a chunk, N candidates, K nearest ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rime_pl.datamodules.mining.items import Asked, Catalogue
from rime_pl.datamodules.mining.rules import ALREADY, CONTENT, PICTURES, TEXT

#: One of the things by which a query is the same as another one, and its code.
QueryKey: TypeAlias = tuple[str, int]
#: What is compared, and the rule that it counts for: a column of ``Compared.codes`` each.
_KINDS = (
    *((0, CONTENT), (3, CONTENT), (1, TEXT), (2, PICTURES)),
    *((0, ALREADY), (3, ALREADY), (1, ALREADY), (2, ALREADY)),
)
_SPREAD = -7046029254386353131  # odd, so that no two queries give a code the same key


@dataclass(frozen=True)
class Compared:
    """What is the same for the queries of a chunk."""

    codes: Tensor  # (N, 4) int64: content, text, pictures and number of each candidate; 0: has none
    keys: list[Tensor]  # of each of ``_KINDS``: keys of queries and codes
    most: int  # candidates that are the same for a query, at most

    def rules_of(self, rows: Tensor) -> Tensor:
        """Return the rule of identity that drops each candidate, (Q, K) int8; 0 for none.

        Args:
            rows: (Q, K) int64, candidates of each query.
        """
        found = torch.zeros(rows.shape, dtype=torch.int8)
        queries = torch.arange(len(rows)).unsqueeze(1)
        for (column, rule), wanted in zip(_KINDS, self.keys, strict=True):
            equal = torch.isin(_keys(self.codes[rows, column], queries), wanted)
            found = found.masked_fill((found == 0) & equal, rule)
        return found


class Identical:
    """Compares the candidates of a group with what is right for its queries.

    A candidate is right for a query if it has

    - the content of the query, of its target, of a further right answer, or of a right answer of another pair
      whose query is the same: of the same content, or of equal text and media. A caption names several;
    - the text of one of these, normalised, if neither has media;
    - the pictures of one of these, whatever its text.

    Args:
        catalogue: Knows the identities.
        candidates: Numbers of the candidates in the catalogue.
        asked: All pairs of the group.
        keep: Whether the negatives that a pair has already count, too.
        query_pictures: Whether a candidate may have the pictures of the query.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        candidates: Sequence[int],
        asked: Sequence[Asked],
        keep: bool = False,
        query_pictures: bool = False,
    ) -> None:
        self.catalogue, self.keep, self.query_pictures = catalogue, keep, query_pictures
        self._row = {number: row for row, number in enumerate(candidates)}
        known = [catalogue.identities[number] for number in candidates]
        self._codes = [(one.content, one.text, one.pictures, row + 1) for row, one in enumerate(known)]
        self.codes = torch.tensor(self._codes, dtype=torch.int64).reshape(-1, 4)
        self._counts = [Counter(codes) for codes in zip(*self._codes, strict=True)] or [Counter()] * 4
        self._answers: dict[QueryKey, set[int]] = {}  # what a query is -> its right answers
        self._contents: dict[QueryKey, set[int]] = {}  # what a query is -> their contents
        for one in asked:
            for key in self._query_keys(one):
                self._answers.setdefault(key, set()).update(one.answers)
                self._contents.setdefault(key, set()).update(one.contents)
        self._right: dict[tuple[int, int], list[set[int]]] = {}  # by content and number of a query
        #: content -> numbers of candidates that have it beside the content of their code
        self._further: dict[int, set[int]] = {}
        for content, numbers in catalogue.further_contents.items():
            if rows := {self._row[number] + 1 for number in numbers if number in self._row}:
                self._further[content] = rows
        self._contents_of: dict[int, set[int]] = {}  # the same by candidate
        for content, rows in self._further.items():
            for row in rows:
                self._contents_of.setdefault(row - 1, set()).add(content)

    def codes_of(self, row: int) -> set[tuple[int, int]]:
        """Return what a candidate shares with others that are the same, as kinds and codes."""
        codes = {(kind, code) for kind, code in enumerate(self._codes[row][:3]) if code}
        return codes | {(0, content) for content in self._contents_of.get(row, ())}

    def of(self, chunk: Sequence[Asked]) -> Compared:
        """Return what is the same for the Q queries of a chunk."""
        owners: list[list[int]] = [[] for _ in _KINDS]
        codes: list[list[int]] = [[] for _ in _KINDS]
        most = 0
        for owner, asked in enumerate(chunk):
            count = 0
            for kind, wanted in enumerate(self._wanted(asked)):
                codes[kind] += wanted
                owners[kind] += [owner] * len(wanted)
                count += sum(self._counts[_KINDS[kind][0]][code] for code in wanted)
            most = max(most, count)
        pairs = zip(codes, owners, strict=True)
        keys = [
            _keys(torch.tensor(c, dtype=torch.int64), torch.tensor(o, dtype=torch.int64)) for c, o in pairs
        ]
        return Compared(self.codes, keys, most)

    def _wanted(self, asked: Asked) -> list[list[int]]:
        """Return the codes of each of ``_KINDS`` that are right for a query, if a candidate has them."""
        name = asked.content, asked.query
        if name not in self._right:
            keys = self._query_keys(asked)
            numbers = set().union(*(self._answers[key] for key in keys))
            contents = {asked.content}.union(*(self._contents[key] for key in keys))
            answers = [self.catalogue.identities[number] for number in numbers]
            texts, pictures = {one.text for one in answers}, {one.pictures for one in answers}
            self._right[name] = self._codes_like(contents, texts, pictures)
        contents, rows, texts, pictures = self._right[name]
        query = self.catalogue.identities[asked.query]
        texts = texts | self._known(1, {query.text})
        if not self.query_pictures:
            pictures = pictures | self._known(2, {query.pictures})
        had = asked.negatives if self.keep else ()
        already = self._codes_like(
            {one.content for one in had}, {one.text for one in had}, {one.pictures for one in had}
        )
        return [list(one) for one in (contents, rows, texts, pictures, *already)]

    def _query_keys(self, asked: Asked) -> list[QueryKey]:
        """Return by what a query is the same as another: its content, all that is embedded, and its text."""
        text = self.catalogue.identities[asked.query].text
        return [("content", asked.content), ("look", asked.query), *([("text", text)] if text else [])]

    def _codes_like(self, contents: set[int], texts: set[int], pictures: set[int]) -> list[set[int]]:
        """Return which of these some candidate has; its further contents are told by its number."""
        further = (self._further[content] for content in contents if content in self._further)
        return [
            self._known(0, contents),
            set().union(*further),
            self._known(1, texts),
            self._known(2, pictures),
        ]

    def _known(self, column: int, codes: set[int]) -> set[int]:
        """Return the codes that some candidate has."""
        return {code for code in codes if code and code in self._counts[column]}


def _keys(codes: Tensor, owners: Tensor) -> Tensor:
    """Return one number for each code and owner; codes are hashes, so no two are equal by chance."""
    return torch.where(codes == 0, 0, codes + (owners + 1) * _SPREAD)
