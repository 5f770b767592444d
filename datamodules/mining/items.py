"""What the training split holds, without its pictures: every distinct item once, and who is right for whom.

Mining looks at each sample once to know which items are the same. An item is read again when the model is to
embed it. Called by the command, and by the other files here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, overload

from rime_pl.datamodules.faults import first_lines
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader
from rime_pl.datamodules.stored import StoredReader, look_of, media_digest
from rime_pl.errors import DataError
from rime_pl.types import Item, Pair, content_hash

#: Largest share of the training samples that may be unreadable.
MAX_BROKEN = 0.05
_ENDS = " .,;:!?…'\"()[]"  # punctuation that may stand around the same text


class Identity(NamedTuple):
    """What makes two items the same; 0 where an item has nothing of the kind."""

    look: bytes  # digest of all that is embedded: instruction, text and media
    content: int  # content_hash of its content id
    text: int  # hash of its text, normalised; 0 if it has media, because many targets share a caption
    pictures: int  # hash of the bytes of all its media, in their order


class Place(NamedTuple):
    """Where an item lies: a side of a sample."""

    row: int  # of the training split
    field: Literal["query", "target", "positives"]
    number: int = 0  # among the positives


@dataclass(frozen=True)
class Asked:
    """A training pair; items are numbers in the catalogue."""

    row: int
    query: int
    content: int  # of its query
    answers: tuple[int, ...]  # its target, then its further right answers
    contents: tuple[int, ...]  # of these
    negatives: tuple[Identity, ...]  # that it has already


@dataclass
class Group:
    """The pairs of a task and a gallery: only targets of the same group are candidates."""

    asked: list[Asked] = field(default_factory=list)
    targets: dict[int, None] = field(default_factory=dict)  # the candidates, in the order of the shards

    @property
    def queries(self) -> list[int]:
        """The distinct queries, in the order of the shards."""
        return sorted({asked.query for asked in self.asked})


def normalised(text: str) -> str:
    """Return a text without what does not change its meaning: case, width, spaces, punctuation at its ends.

    >>> normalised("  A  red Ring. ") == normalised("a red ring") != normalised("a red rings")
    True
    >>> normalised("C") == normalised("C++")
    False
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)


def identity_of(item: Item) -> Identity:
    """Return what makes an item the same as another one; its pictures are undecoded, from a StoredReader."""
    pictures = media_digest(item)
    text = normalised(item.text) if not item.media else ""
    return Identity(look_of(item, pictures), content_hash(item.content_id), _code(text), _code(pictures))


def _code(text: str) -> int:
    return content_hash(text) if text else 0


class Catalogue:
    """All items of a training split by number, and the pairs that they form.

    An item that is there twice in a group has one number. Queries and targets have numbers of their own.

    Args:
        entries: Index of the training split.
    """

    def __init__(self, entries: Samples) -> None:
        self.entries = entries
        self.reader = StoredReader(entries)
        self.places: list[Place] = []
        self.identities: list[Identity] = []
        self.groups: dict[tuple[str, str], Group] = {}  # by task and gallery
        self.broken: dict[int, str] = {}  # rows that cannot be read
        self.with_negatives = 0  # pairs that have hard negatives already
        #: content -> targets that have it beside the one in ``identities``: one text may answer many
        self.further_contents: dict[int, set[int]] = {}
        self._numbers: dict[tuple[str, str, bool, bytes], int] = {}  # by group, whether a query, and look

    def look(self, each: Callable[[], object] = lambda: None) -> None:
        """Look at every sample once; ``each`` is called after each.

        Raises:
            DataError: If too many samples cannot be read.
        """
        for row in range(len(self.entries)):
            try:
                self._add(row, self.reader.read(row))
            except DataError as error:
                self.broken[row] = str(error)
            each()
        if len(self.broken) > MAX_BROKEN * len(self.entries):
            raise DataError(
                f"At most {MAX_BROKEN:.0%} of the training samples may be unreadable, but {len(self.broken)} "
                f"of {len(self.entries)} are:\n{first_lines(self.broken.values())}"
            )

    def _add(self, row: int, pair: Pair) -> None:
        name = pair.dataset, pair.gallery
        group = self.groups.setdefault(name, Group())
        targets = [
            (Place(row, "target"), identity_of(pair.target)),
            *((Place(row, "positives", n), identity_of(item)) for n, item in enumerate(pair.positives)),
        ]
        answers = tuple(self._number(name, *target) for target in targets)
        group.targets.update(dict.fromkeys(answers))
        if pair.query is not None:
            query, negatives = identity_of(pair.query), tuple(map(identity_of, pair.hard_negatives))
            number = self._number(name, Place(row, "query"), query)
            contents = tuple(identity.content for _, identity in targets)
            group.asked.append(Asked(row, number, query.content, answers, contents, negatives))
            self.with_negatives += bool(negatives)

    def _number(self, group: tuple[str, str], place: Place, identity: Identity) -> int:
        key = (*group, place.field == "query", identity.look)
        number = self._numbers.setdefault(key, len(self.places))
        if number == len(self.places):
            self.places.append(place)
            self.identities.append(identity)
        elif place.field != "query" and identity.content != self.identities[number].content:
            self.further_contents.setdefault(identity.content, set()).add(number)
        return number

    def stored(self, number: int) -> Item:
        """Return an item with undecoded pictures, to be copied into another sample."""
        return _item(self.reader, self.places[number])

    def name(self, number: int) -> str:
        """Return what an error calls an item, ``<tar>/<key>``."""
        return self.entries[self.places[number].row].name


def _item(reader: ShardReader, place: Place) -> Item:
    if place.field == "positives":
        return reader.read(place.row).positives[place.number]
    pair = reader.read(place.row, place.field)
    item = pair.query if place.field == "query" else pair.target
    assert item is not None, "the catalogue has seen it"
    return item


class StoredItems(Sequence[Item]):
    """Items of a catalogue, each read and decoded when it is asked for.

    Args:
        catalogue: Where they lie.
        numbers: Which ones, in their order.
    """

    def __init__(self, catalogue: Catalogue, numbers: Sequence[int]) -> None:
        self.catalogue, self.numbers = catalogue, numbers
        self._reader = ShardReader(catalogue.entries)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> StoredItems: ...
    def __getitem__(self, index: int | slice) -> Item | StoredItems:
        if isinstance(index, slice):
            return StoredItems(self.catalogue, self.numbers[index])
        return _item(self._reader, self.catalogue.places[self.numbers[index]])

    def place(self, index: int) -> Place:
        """Return where an item lies."""
        return self.catalogue.places[self.numbers[index]]

    def name(self, index: int) -> str:
        """Return what an error calls an item."""
        return self.catalogue.name(self.numbers[index])

    def look(self, index: int) -> bytes:
        """Return the digest of all of an item that decides its embedding."""
        return self.catalogue.identities[self.numbers[index]].look
