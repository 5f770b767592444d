"""Build a corpus folder (WebDataset shards): a demo corpus, or one from your own table and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.builders.openmoji import builder as openmoji
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.shards import read_corpus

#: ``rime shards NAME``: the options are the arguments of the function.
SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "openmoji": openmoji.build,
    "scenes": scenes.build,
    "folder": folder.build,
}


def run(name: str, options: dict[str, Any]) -> int:
    """Build a corpus and print what is in it.

    Args:
        name: A key of ``SUBCOMMANDS``.
        options: Arguments of its function.
    """
    SUBCOMMANDS[name](**options)
    corpus = read_corpus(options["output"])
    table = Table(title=f"{options['output']}  ({corpus['licence']})")
    for column in ("split", "task", "samples"):
        table.add_column(column, justify="right" if column == "samples" else "left")
    for split, about in corpus["splits"].items():
        for task, samples in about["tasks"].items():
            table.add_row(split, task, str(samples))
    Console().print(table)
    return 0
