"""A task of a public benchmark as its reader returns it: what to embed, and which candidates are right.

Readers make it from the files of the official layout. `rime eval` embeds and ranks it.

Shape legend: Q queries, N candidates of the task, each with a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rime_pl.types import Item

#: What the official report holds in the place of a task whose files are there, but cannot be used.
UNUSABLE = "READ_ERROR"
#: What the official result files call a candidate; numbers stay numbers.
Name: TypeAlias = str | int


@dataclass(frozen=True)
class BenchmarkTask:
    """One task. Items are read when they are asked for; their media may be paths.

    An item may have neither text nor media: a few candidates of OK-VQA are the empty string, and count.
    """

    benchmark: str  # "mmeb-v2", "mrmr" or "uvrb"
    name: str  # key of the task in the official report
    modality: str  # folder of its result files, such as "image", "video" or "visdoc"
    group: str  # what the official averages group by, such as "I-CLS"
    metric: str  # the main one, such as "hit@1" or "ndcg_linear@5"
    queries: Sequence[Item]  # Q
    candidates: Sequence[Item]  # N
    names: Sequence[Name]  # N, all distinct
    #: Q: place of a right candidate -> its grade, in the order of the official files
    labels: Sequence[Mapping[int, float]]
    #: Q: places of the candidates that a query is ranked against; None: all N
    pools: Sequence[Sequence[int]] | None = None
    categories: Sequence[str] = ()  # Q or none: what the queries are averaged by, such as "Art"
    info: Sequence[Mapping[str, Any]] = ()  # Q or none: lines of the official info file
    version: str = ""  # of the data, such as "page sets fixed (2025-11)"
    notes: Sequence[str] = field(default=())  # what differs from the official counts


@dataclass(frozen=True)
class MissingTask:
    """A task that has no scores, and why. Its place in the report holds ``code`` instead of them."""

    benchmark: str
    name: str
    modality: str
    group: str
    code: str  # "FILE_N/A": no annotations; "DIR_N/A": no folder of pictures, frames or pages; or UNUSABLE
    reason: str  # what is missing, and where it was looked for, or what is wrong

    def __str__(self) -> str:
        return f"{self.name} {'failed' if self.code == UNUSABLE else 'is missing'}: {self.reason}"
