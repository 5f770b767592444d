"""Which files are tables of pairs, and which state of a table a corpus was built from.

Used by the builder of your own data and by `rime run`, which imports nothing heavy to find a corpus.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

#: Ends of the names of tables.
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def table_hash(table: Path) -> str:
    """Return the SHA-256 hash of a table, which corpus.json keeps; the files that it names do not count."""
    with table.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
