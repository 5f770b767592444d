"""``rime shards openmoji|scenes|folder``: build a corpus folder.

The options of a builder are the arguments of its ``build`` function.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rime_pl.datamodules.builders import folder
from rime_pl.datamodules.builders.openmoji import builder as openmoji
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.datamodules.shards import read_corpus

BUILDERS: dict[str, Callable[..., None]] = {
    "openmoji": openmoji.build,
    "scenes": scenes.build,
    "folder": folder.build,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per builder."""
    builders = parser.add_subparsers(dest="builder", required=True, metavar="|".join(BUILDERS))
    for name, build in BUILDERS.items():
        summary, helps = _documented(build)
        options = builders.add_parser(name, help=summary, description=summary)
        kinds = typing.get_type_hints(build)
        for parameter in inspect.signature(build).parameters.values():
            required = parameter.default is inspect.Parameter.empty
            default = None if required else parameter.default
            options.add_argument(
                f"--{parameter.name.replace('_', '-')}",
                type=_plain(kinds[parameter.name]),
                required=required,
                default=default,
                help=helps.get(parameter.name, "") + ("" if default is None else f" (default {default})"),
            )


def run(args: argparse.Namespace) -> int:
    """Build and say what is there now."""
    build = BUILDERS[args.builder]
    build(**{name: getattr(args, name) for name in inspect.signature(build).parameters})
    corpus = read_corpus(args.output)
    table = Table(title=f"{args.output}  ({corpus['licence']})")
    for column in ("split", "task", "samples"):
        table.add_column(column, justify="right" if column == "samples" else "left")
    for split, about in corpus["splits"].items():
        for task, samples in about["tasks"].items():
            table.add_row(split, task, str(samples))
    Console().print(table)
    return 0


def _plain(kind: Any) -> Callable[[str], Any]:
    """The type to parse an option with; ``X | None`` is parsed as X."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if kind not in (int, float, str, Path):
        raise TypeError(f"a builder's argument of type {kind} cannot be given on the command line")
    return typing.cast(Callable[[str], Any], kind)


def _documented(build: Callable[..., None]) -> tuple[str, dict[str, str]]:
    """Summary line and the ``Args:`` section of a docstring."""
    text = inspect.getdoc(build) or ""
    helps: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition("Args:\n")[2].partition("\n\n")[0].splitlines():
        head, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            names = [name.strip() for name in head.split(",")]
            helps |= dict.fromkeys(names, rest)
        else:
            helps |= {name: f"{helps[name]} {line.strip()}" for name in names}
    return text.splitlines()[0], {name: words.replace("%", "%%") for name, words in helps.items()}
