"""Corpora built as by `rime shards NAME`, their pairs, and their sources with one record changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_sources as tiny

from rime_pl.commands.shards import SUBCOMMANDS
from rime_pl.datamodules.shards import ShardReader, read_corpus, read_split
from rime_pl.options.parser import arguments
from rime_pl.types import Pair

Splits = dict[str, dict[str, Pair]]


def run(name: str, options: dict[str, Any], output: Path) -> None:
    """Build with the options of the command line; one that is None is not given."""
    given = {"output": output, **{option: value for option, value in options.items() if value is not None}}
    SUBCOMMANDS[name](**arguments(SUBCOMMANDS[name], given))


def pairs_of(corpus: Path) -> Splits:
    """Return the pairs of a corpus: split -> source of a pair and its task -> pair."""
    splits: Splits = {}
    for split in read_corpus(corpus)["splits"]:
        reader = ShardReader(read_split(corpus, split))
        splits[split] = {pair.key.partition("/")[2]: pair for pair in map(reader.read, range(len(reader)))}
    return splits


def refused(tmp_path: Path) -> dict[str, int]:
    counts: dict[str, int] = read_corpus(tmp_path / "corpus")["refused"]
    return counts


def everything(splits: Splits) -> dict[str, Pair]:
    return {key: pair for pairs in splits.values() for key, pair in pairs.items()}


def changed(path: Path, number: int, **values: Any) -> None:
    """Change a record of a JSON file, or of JSON lines."""
    lines = path.suffix == ".jsonl"
    rows = tiny.read_lines(path) if lines else json.loads(path.read_text())
    (rows["images"] if isinstance(rows, dict) else rows)[number].update(values)
    tiny.write_lines(path, rows) if lines else tiny.write_json(path, rows)
