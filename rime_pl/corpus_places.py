"""Finds the corpus that a person names, the table that it is built from, and its tiny base model.

Called by `rime run` and by pipeline.py. Nothing is built here.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

from rime_pl.datamodules.builders.table_file import TABLES, table_hash
from rime_pl.errors import RimeError

#: Corpora that can be built without further input.
BUILT_IN = ("openmoji", "scenes", "mini")
#: The file of a base model that is written last.
BASE_MARKER = "processor_config.json"
#: The file in which `rime base` keeps the corpus of a base model.
BASE_RECORD = "rime_base.json"


def find_corpus(corpus: str) -> tuple[Path, Path | None]:
    """Return the folder of a corpus, and the table that it is built from if a table or its folder is given.

    A corpus is a built-in one, one below data/, or the folder given. That of a table lies below data/ under
    the name of the table, or of its folder if that was given.

    Raises:
        RimeError: If it is not built in and not there, or was built from another table.
    """
    below, given = Path("data") / corpus, Path(corpus)
    if corpus in BUILT_IN:
        return below, None
    if (given / "corpus.json").is_file():
        return given, None
    if table := _table(given):
        name = (given if given.is_dir() else table.with_suffix("")).resolve().name
        if name in BUILT_IN:
            raise RimeError(
                f"--corpus {corpus}: {name} is the name of a built-in corpus. Rename the {_what(given)}."
            )
        _refuse_other_table(Path("data") / name, table)
        return Path("data") / name, table
    if (below / "corpus.json").is_file():
        return below, None
    raise RimeError(
        f"--corpus {corpus}: no corpus.json in {corpus} or in {below}, and no table. Give "
        f"{' or '.join(BUILT_IN)}, a CSV, TSV, JSONL or Parquet file of pairs or its folder, or build your "
        f"own: rime shards folder --table pairs.csv --media pictures --output {below}"
    )


def _what(given: Path) -> str:
    return "folder" if given.is_dir() else "table"


def _table(given: Path) -> Path | None:
    """Return the table that was given, or the one in the folder that was given; None if there is none.

    Raises:
        RimeError: If the folder has several.
    """
    if given.is_file():
        return given
    tables = sorted(path for path in given.glob("*") if path.suffix.lower() in TABLES and path.is_file())
    if len(tables) > 1:
        some = ", ".join(path.name for path in tables[:5])
        raise RimeError(
            f"--corpus {given}: the folder must hold one table, but has {some}. Give the table itself."
        )
    return tables[0] if tables else None


def _refuse_other_table(corpus: Path, table: Path) -> None:
    """Raise if a finished corpus was built from another table, or from an earlier state of this one."""
    if not (corpus / "corpus.json").is_file():
        return
    arguments = _about(corpus).get("arguments")
    about = arguments if isinstance(arguments, dict) else {}
    hashed = about.get("table_sha256")  # corpora of an earlier version have none
    if about.get("table") == table.name and hashed in (None, table_hash(table)):
        return
    changed = f"an earlier state of {table}" if about.get("table") == table.name else "something else"
    raise RimeError(
        f"--corpus: {corpus} must be built from {table}, but was built from {changed}. Build it again: rime "
        f"shards folder --table {table} --output {corpus}, or train on it as it is: --corpus {corpus}"
    )


def find_tiny_base(corpus: Path, seed: int = 0) -> Path:
    """Return where the tiny base model of a corpus and seed lies or will lie, or the next number after it.

    It is models/tiny-<corpus> for seed 0, else models/tiny-<corpus>-seed<seed>. A model that was made from
    other shards of the same name is never taken, because it may have seen what this corpus tests. Nor is one
    of another seed, or of an earlier version, which has no record of its shards.
    """
    wanted = _about(corpus).get("data_hash")
    name = f"models/tiny-{corpus.name}" + (f"-seed{seed}" if seed else "")
    for number in count(1):
        folder = Path(name + (f"-{number}" if number > 1 else ""))
        if not (folder / BASE_MARKER).is_file():
            return folder
        made_from, made_with = _made_from(folder)
        if made_with == seed and wanted in (None, made_from):
            return folder
    raise AssertionError("count never ends")


def _made_from(base: Path) -> tuple[str | None, object]:
    """Return hash of the shards and seed that a tiny base model was made with; no hash if it keeps none."""
    if not (base / BASE_RECORD).is_file():
        return None, 0
    record = _object(base / BASE_RECORD)
    made_from = record.get("data_hash")
    return made_from if isinstance(made_from, str) else "", record.get("seed", 0)


def _about(corpus: Path) -> dict[str, Any]:
    """Return corpus.json, {} if the corpus is not built yet; whoever reads the corpus checks it."""
    return _object(corpus / "corpus.json") if (corpus / "corpus.json").is_file() else {}


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RimeError(
            f"{file}: malformed JSON ({error}). Remove {file.parent} and make it again."
        ) from error
    return content if isinstance(content, dict) else {}
