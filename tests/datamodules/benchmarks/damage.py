"""Changes of rows that lie in files, for tests of faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet

from tests.datamodules.benchmarks.official_copies import write_lines, write_parquet

Rows = list[dict[str, Any]]
PARQUET = "test-00000-of-00001.parquet"


def edit(file: Path, change: Callable[[Rows], object]) -> None:
    """Change the rows of a file, Parquet or JSON lines."""
    if file.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(file).to_pylist()
        change(rows)
        write_parquet(file, rows)
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    write_lines(file, rows)


def put(row: int, **fields: Any) -> Callable[[Rows], object]:
    return lambda rows: rows[row].update(fields)


def drop(field: str) -> Callable[[Rows], object]:
    return lambda rows: [row.pop(field) for row in rows]
