"""Queries with known answers from a split of a corpus: how often each way to search finds them.

Called by `rime search --calibrate` on the validation split, and by benchmarks/search.py on the test split.

Shape legend: Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rime_pl.datamodules.eval_plan import gallery_of
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.errors import DataError
from rime_pl.inference.adaptive import Asked, margins
from rime_pl.inference.index_folder import COLUMNS
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.metrics.retrieval import recall_at, retrieval_ranks
from rime_pl.metrics.top_k import top_k
from rime_pl.run_folder import headline_tasks
from rime_pl.types import Item, Mode, Side, content_hash


class Sides(Sequence[Item]):
    """One side of some samples of a split, each read when it is asked for.

    Args:
        entries: Index of the split.
        numbers: Which samples.
        side: Their side.
        max_media: Largest number of media of an item.
    """

    def __init__(self, entries: Samples, numbers: Sequence[int], side: Side, max_media: int) -> None:
        self.reader = ShardReader(entries, max_media=max_media)
        self.numbers, self.side = numbers, side

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        pair = self.reader.read(self.numbers[index], self.side)
        item = pair.query if self.side == "query" else pair.target
        assert item is not None, "only samples with a query are asked"
        return item


@dataclass(frozen=True)
class Split:
    """The queries and the galleries of a split."""

    queries: Sides
    targets: Sides
    tasks: list[str]  # of the Q queries
    galleries: list[str]  # of the Q queries
    relevant: Tensor  # (Q,) int64 content_hash of the right target
    target_galleries: list[str]  # of the targets
    contents: Tensor  # int64 content_hash of each target


def read_labelled(corpus: Path, split: str, max_media: int, settings: Mapping[str, Any]) -> Split:
    """Return the queries of a run's headline tasks in a split, and the distinct targets of their galleries.

    Args:
        corpus: Its folder.
        split: Its name.
        max_media: Largest number of media of an item.
        settings: Of the run.

    Raises:
        DataError: If the split has no query of the tasks of the run.
    """
    named = (settings.get("data") or {}).get("tasks")
    entries = read_split(corpus, split, named)
    tasks = headline_tasks(settings, {one.dataset for one in entries if one.has_query})
    queries = [n for n, one in enumerate(entries) if one.has_query and one.dataset in tasks]
    if not queries:
        raise DataError(f"{corpus}: split {split!r} must have queries of {named or 'a task'}, but has none.")
    wanted = {entries[number].gallery for number in queries}
    targets = [number for number in gallery_of(entries) if entries[number].gallery in wanted]
    return Split(
        Sides(entries, queries, "query", max_media),
        Sides(entries, targets, "target", max_media),
        [entries[number].dataset for number in queries],
        [entries[number].gallery for number in queries],
        torch.tensor([content_hash(entries[number].target_content) for number in queries]),
        [entries[number].gallery for number in targets],
        torch.tensor([content_hash(entries[number].target_content) for number in targets]),
    )


@dataclass(frozen=True)
class Vectors:
    """Both vectors of the queries and targets of a split; the numbers of its targets by gallery."""

    split: Split
    queries: dict[Mode, Tensor]  # mode -> (Q, D) float32
    targets: dict[Mode, Tensor]
    of_gallery: dict[str, Tensor]  # gallery -> numbers of its targets, int64

    def asked_by_gallery(self) -> dict[str, Tensor]:
        """Return gallery -> numbers of its queries, int64."""
        galleries = self.split.galleries
        return {
            name: torch.tensor([n for n, gallery in enumerate(galleries) if gallery == name])
            for name in self.of_gallery
        }

    def ranks(self, mode: Mode, target_mode: Mode) -> Tensor:
        """Return the rank (Q,) int64 of each query's right target in its gallery; see retrieval_ranks."""
        found = torch.zeros(len(self.split.tasks), dtype=torch.int64)
        for name, asked in self.asked_by_gallery().items():
            mine = self.of_gallery[name]
            found[asked] = retrieval_ranks(
                self.queries[mode][asked],
                self.targets[target_mode][mine],
                self.split.contents[mine],
                self.split.relevant[asked],
            )
        return found

    def margins(self) -> Tensor:
        """Return the discriminative margin (Q,) of each query in its gallery."""
        found = torch.zeros(len(self.split.tasks))
        for name, asked in self.asked_by_gallery().items():
            targets = self.targets["discriminative"][self.of_gallery[name]]
            found[asked] = margins(top_k(self.queries["discriminative"][asked], [targets], 2)[0])
        return found

    def two_step_ranks(self, mode: Mode, target_mode: Mode, candidates: int) -> Tensor:
        """Return the ranks (Q,) of a two-step search; behind the candidates if it is none of them."""
        found = torch.zeros(len(self.split.tasks), dtype=torch.int64)
        for name, asked in self.asked_by_gallery().items():
            mine = self.of_gallery[name]
            rows = top_k(
                self.queries["discriminative"][asked], [self.targets["discriminative"][mine]], candidates
            )[1]  # (q, candidates)
            contents, relevant = self.split.contents[mine], self.split.relevant[asked]
            for query, near in zip(asked.tolist(), rows, strict=True):
                at = asked.tolist().index(query)
                right = relevant[at : at + 1]
                one = retrieval_ranks(
                    self.queries[mode][query : query + 1],
                    self.targets[target_mode][mine][near],
                    contents[near],
                    right,
                )
                found[query] = one[0]
        return found

    def asked(self, target_mode: Mode) -> Asked:
        """Return what an adaptive search with a threshold needs to be measured."""
        never = recall_at(self.ranks("discriminative", "discriminative"), 1)
        always = recall_at(self.ranks("generative", target_mode), 1)
        return Asked(self.margins(), never, always, self.split.tasks)


def embed_labelled(
    retriever: Retriever, split: Split, batch_size: int = 64, progress: bool = False
) -> Vectors:
    """Return both vectors of all queries and targets of a split."""
    found = {
        side: retriever.encode_modes(items, MODES, batch_size, progress=f"{side}" if progress else "")
        for side, items in (("queries", split.queries), ("targets", split.targets))
    }
    of_gallery = {
        name: torch.tensor([n for n, gallery in enumerate(split.target_galleries) if gallery == name])
        for name in sorted(set(split.target_galleries))
    }
    assert set(found["queries"]) == set(COLUMNS)
    queries, targets = (
        {mode: one.embeddings for mode, one in found[side].items()} for side in ("queries", "targets")
    )
    return Vectors(split, queries, targets, of_gallery)
