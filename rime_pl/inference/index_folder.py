"""The folder of an index: `index.json` says what it is, and parts in Parquet hold both vectors of each item.

index.py writes it, search.py reads it, and so does whatever else reads Parquet: pandas, LanceDB, DuckDB.
A part appears whole or not at all. While `building.json` is there, the index is not complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder, write_json, write_text
from rime_pl.run_lock import holder
from rime_pl.types import Mode

FORMAT = 1
#: Mode -> its column of vectors.
COLUMNS: dict[Mode, str] = {"discriminative": "disc", "generative": "gen"}
#: Items of a part, which is also one row group.
PART = 512
DTYPES = {"float16": pa.float16(), "float32": pa.float32()}
_AGAIN = "Build the index again with `rime index`."


@dataclass(frozen=True)
class Record:
    """What an index keeps of an item beside its vectors."""

    id: str  # unique in the index: the path below the root, or what a table or a corpus calls it
    digest: bytes  # of all that decides its vectors: text, instruction and the bytes of its media
    media: tuple[str, ...] = ()  # "a/cat.jpg", "manual.pdf#3" (pages count from 1), or "test#57" of a corpus
    text: str = ""
    instruction: str = ""  # its own; items without one have that of the index


@dataclass
class Facts:
    """What index.json holds."""

    model: str  # Retriever.name: all that can change a vector
    dimension: int  # D
    modes: list[Mode]
    instruction: str  # of items without their own
    dtype: str = "float32"
    kind: str = "files"  # how media are found: files below the root, samples of a "corpus", or only "vectors"
    source: str = (
        ""  # what was given: "" for a folder, else the name of a file in the root, or parts of a corpus
    )
    roots: list[str] = field(default_factory=list)  # where the root is: absolute, and as seen from the index
    count: int = 0
    unusable: int = 0
    format: int = FORMAT
    run: str = ""  # where the model was that made it; "" in indices of before 2026-11-28


@dataclass(frozen=True)
class Part:
    """One Parquet file of an index."""

    path: Path
    rows: int
    start: int = 0  # rows of the index before it


class IndexFolder:
    """The files of an index.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def facts_file(self) -> Path:
        return self.path / "index.json"

    @property
    def building(self) -> Path:
        """The file that is there while the index is not complete."""
        return self.path / "building.json"

    @property
    def unusable(self) -> Path:
        """The list of the items that were left out: id and reason, one a line."""
        return self.path / "unusable.jsonl"

    @cached_property
    def facts(self) -> Facts:
        """What index.json says.

        Raises:
            RimeError: If there is no index, or index.json is damaged or of another version.
        """
        if not self.facts_file.is_file():
            raise RimeError(
                f"{self.path} must be an index, with the file index.json, but is not. `rime index` makes one."
            )
        try:
            values = json.loads(self.facts_file.read_text())
        except (ValueError, RecursionError) as error:
            raise RimeError(f"{self.facts_file} is damaged: {error}. {_AGAIN}") from error
        return _facts(values, self.facts_file)

    def refuse_incomplete(self) -> None:
        """Raise a RimeError if the index is being built, or was left half built."""
        if not self.building.is_file():
            return
        if process := holder(RunFolder(self.path)):
            raise RimeError(f"{self} is being built by {process}. Wait until it ends.")
        raise RimeError(f"{self} must be complete, but is not. Give the same `rime index` again.")

    def write_facts(self, facts: Facts) -> None:
        """Write index.json, whole or not at all."""
        write_json(self.facts_file, asdict(facts))
        self.__dict__.pop("facts", None)

    def write_unusable(self, reasons: Iterable[tuple[str, str]]) -> None:
        """Write the list of the items that were left out, from their ids and reasons."""
        lines = (json.dumps({"id": id, "reason": why}, ensure_ascii=False) for id, why in reasons)
        write_text(self.unusable, "".join(f"{line}\n" for line in lines))

    def parts(self) -> list[Part]:
        """Return the parts in the order of their names.

        Raises:
            RimeError: If one is damaged, or of another shape than index.json says.
        """
        found: list[Part] = []
        start = 0
        for path in sorted(self.path.glob("part-*.parquet")):
            rows = _checked_part(path, self.facts)
            found.append(Part(path, rows, start))
            start += rows
        return found

    def state(self) -> list[tuple[str, int, int]]:
        """Return name, size and time of the files, which another build changes."""
        files = [self.facts_file, *sorted(self.path.glob("part-*.parquet"))]
        try:
            return [(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in files]
        except FileNotFoundError:  # one went meanwhile
            return []

    def next_part(self, parts: Sequence[Part]) -> Path:
        """Return the name of a part behind all others."""
        number = int(parts[-1].path.stem.rpartition("-")[2]) + 1 if parts else 0
        return self.path / f"part-{number:05d}.parquet"


def _facts(values: Any, file: Path) -> Facts:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise RimeError(f"{file}: 'format' must be {FORMAT}, but is {found!r:.90}. {_AGAIN}")
    kinds: dict[str, Any] = {
        **{"model": str, "dimension": int, "modes": list, "instruction": str, "dtype": str, "kind": str},
        **{"source": str},
        **{"roots": list, "count": int, "unusable": int, "format": int},
    }
    values = {"run": "", **values}
    kinds["run"] = str
    wrong = [name for name, kind in kinds.items() if type(values.get(name)) is not kind]
    if not wrong:
        facts = Facts(**{name: values[name] for name in kinds})
        good = {
            "modes": facts.modes and set(facts.modes) <= set(COLUMNS),
            "dtype": facts.dtype in DTYPES,
            "kind": facts.kind in ("files", "corpus", "vectors"),
            "roots": all(isinstance(root, str) for root in facts.roots),
            "dimension": facts.dimension > 0,
        }
        wrong = [name for name, right in good.items() if not right]
        if not wrong:
            return facts
    raise RimeError(f"{file} is damaged: {wrong[0]!r} cannot be {values.get(wrong[0])!r:.90}. {_AGAIN}")


def schema(facts: Facts) -> pa.Schema:
    """Return the columns of a part."""
    vector = pa.list_(DTYPES[facts.dtype], facts.dimension)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            *(pa.field(COLUMNS[mode], vector, nullable=False) for mode in facts.modes),
            pa.field("rewrite", pa.string()),
            pa.field("media", pa.list_(pa.string()), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("instruction", pa.string(), nullable=False),
            pa.field("digest", pa.binary(), nullable=False),
        ]
    )


def table_of(
    facts: Facts,
    records: Sequence[Record],
    vectors: Mapping[Mode, Tensor],
    rewrites: Sequence[str | None],
) -> pa.Table:
    """Return the rows of a part.

    Args:
        facts: Of the index.
        records: N items.
        vectors: mode -> (N, D) float, for the modes of the index.
        rewrites: N texts; None where there is none.
    """
    columns: dict[str, Any] = {
        "id": [record.id for record in records],
        "rewrite": list(rewrites),
        "media": [list(record.media) for record in records],
        "text": [record.text for record in records],
        "instruction": [record.instruction for record in records],
        "digest": [record.digest for record in records],
    }
    for mode in facts.modes:
        flat = vectors[mode].numpy().astype(facts.dtype).ravel()
        columns[COLUMNS[mode]] = pa.FixedSizeListArray.from_arrays(pa.array(flat), facts.dimension)
    names = schema(facts)
    return pa.table([pa.array(columns[one.name], one.type) for one in names], schema=names)


def write_part(path: Path, table: pa.Table) -> None:
    """Write a part, whole or not at all."""
    half_written = path.with_suffix(".half")
    vectors = set(COLUMNS.values())
    others = [name for name in table.column_names if name not in vectors]
    try:
        pq.write_table(  # vectors are noise: to compress them costs time and saves nothing
            table,
            half_written,
            row_group_size=max(1, len(table)),
            use_dictionary=False,
            compression={name: "zstd" if name in others else "none" for name in table.column_names},
        )
        half_written.replace(path)
    finally:
        half_written.unlink(missing_ok=True)


def read_columns(part: Part, names: Sequence[str] | None) -> pa.Table:
    """Return some columns of a part; None for all.

    Raises:
        RimeError: If its bytes are damaged.
    """
    with told(part.path):
        return pq.read_table(part.path, columns=None if names is None else list(names), partitioning=None)


def records_of(part: Part) -> list[Record]:
    """Return what a part keeps of its items beside the vectors."""
    table = read_columns(part, ("id", "digest", "media", "text", "instruction"))
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return [Record(id, digest, tuple(media), text, own) for id, digest, media, text, own in rows]


def vectors_of(table: pa.Table, mode: Mode) -> Tensor:
    """Return the vectors of a mode in a table, (N, D) float32."""
    column = table[COLUMNS[mode]]
    size = column.type.list_size
    found = [chunk.flatten().to_numpy() for chunk in column.chunks]
    flat = np.concatenate(found) if found else np.empty(0, np.float32)
    return torch.from_numpy(flat.astype(np.float32)).view(-1, size)


def read_blocks(parts: Sequence[Part], mode: Mode) -> Iterator[Tensor]:
    """Yield the vectors of a mode, (n, D) float32, a row group at a time; no other column is read."""
    for part in parts:
        with told(part.path):
            file = pq.ParquetFile(part.path)
            for group in range(file.num_row_groups):
                yield vectors_of(file.read_row_group(group, columns=[COLUMNS[mode]]), mode)


def _checked_part(path: Path, facts: Facts) -> int:
    """Return the number of rows of a part, from its footer.

    Raises:
        RimeError: If it is no part of this index.
    """
    with told(path):
        file = pq.ParquetFile(path)
        found, rows = file.schema_arrow, int(file.metadata.num_rows)
    for wanted in schema(facts):
        if wanted.name not in found.names or found.field(wanted.name).type != wanted.type:
            there = found.field(wanted.name).type if wanted.name in found.names else "not there"
            raise RimeError(
                f"{path}: column {wanted.name!r} must be {wanted.type}, as index.json says, but is {there}. "
                f"{_AGAIN}"
            )
    return rows


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises into a RimeError that names the file."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine; damaged data have no number
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RimeError(
            f"{path} cannot be read as Parquet: {reason:.200}. Remove the file; `rime index` makes it again."
        ) from error
