"""The corpora of a run: the first one is trained on and evaluated, further ones are trained on with a weight.

Used by datamodule.py and by checking.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.remote import CacheSettings, is_remote
from rime_pl.datamodules.samples import Samples
from rime_pl.datamodules.shards import of_tasks, read_split
from rime_pl.errors import DataError, RimeError


@dataclass(frozen=True)
class Corpora:
    """Corpora with their weights, as ``data.path`` names them.

    Args:
        weights: Path of each corpus -> how often its training pairs come in a pass.
        cache: Where the files of remote corpora are kept.
    """

    weights: dict[str, float]
    cache: CacheSettings = CacheSettings()

    @classmethod
    def of(cls, path: str | Mapping[str, float], cache: CacheSettings = CacheSettings()) -> Corpora:
        """Return the corpora of ``data.path``.

        Raises:
            RimeError: If none is named, one is named twice or a weight is not above 0.
        """
        weights = {path: 1.0} if isinstance(path, str) else dict(path)
        if not weights:
            raise RimeError("data.path must name a corpus, but is empty.")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise RimeError(
                    f"data.path must give weights greater than 0, but that of {name} is {weight}."
                )
        places = [_place(name) for name in weights]
        if twice := sorted(
            {name for name, place in zip(weights, places, strict=True) if places.count(place) > 1}
        ):
            raise RimeError(f"data.path must name each corpus once, but {', '.join(twice)} are the same.")
        cache.check()
        return cls(weights, cache)

    @property
    def first(self) -> str:
        """The corpus that is evaluated, and whose captions and test splits count."""
        return next(iter(self.weights))

    @cached_property
    def data_hash(self) -> str:
        """The SHA-256 hash of all shards of the corpora; for one corpus that of its corpus.json."""
        hashes = [str(read_corpus(path, self.cache)["data_hash"]) for path in self.weights]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, Any]:
        """The splits of the first corpus."""
        splits: dict[str, Any] = read_corpus(self.first, self.cache)["splits"]
        return splits

    def split(self, name: str, tasks: Sequence[str] | None = None) -> Samples:
        """Return a split of the first corpus; see ``read_split``."""
        return read_split(self.first, name, tasks, cache=self.cache)

    def refuse_missing_splits(self, tests: bool) -> None:
        """Raise a DataError unless the first corpus has the splits to validate and to test with."""
        remedy = {"val": "", "test": ", or set data.test_modes to [] for no test"}
        for split in ("val", "test") if tests else ("val",):
            if split not in self.splits:
                raise DataError(
                    f"{self.first}: a training needs the split {split!r}, but the corpus has only "
                    f"{sorted(self.splits)}. Build it again with rows of this split{remedy[split]}."
                )

    def train(self, tasks: Sequence[str] | None) -> Samples:
        """Return the training samples of all corpora.

        Raises:
            DataError: If a corpus has no training split, or one that is damaged.
            RimeError: If no corpus has one of the tasks.
        """
        found = Samples([])
        for path, prefix in zip(self.weights, self._prefixes(), strict=True):
            if "train" not in (splits := read_corpus(path, self.cache)["splits"]):
                raise DataError(
                    f"Training needs a corpus with the split 'train', but {path} has only {sorted(splits)}. "
                    "Set data.path to another corpus. To evaluate on this one, use `rime STAGE test`."
                )
            found += read_split(path, "train", prefix=prefix, cache=self.cache)
        where = f"{self.first}/train" if len(self.weights) == 1 else "the corpora of data.path"
        return of_tasks(found, tasks, where)

    def facts(self) -> dict[str, dict[str, float]]:
        """Return what the manifest of a run says of several corpora, {} for one."""
        return {"corpora": self.weights} if len(self.weights) > 1 else {}

    def _prefixes(self) -> list[str]:
        """Return what stands before the names of samples: "" for the first corpus, and then its folder."""
        names = [Path(path).name for path in self.weights]
        others = [
            name if names.count(name) == 1 else path
            for name, path in zip(names[1:], [*self.weights][1:], strict=True)
        ]
        return ["", *(f"{name}/" for name in others)]


def _place(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())
