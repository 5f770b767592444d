"""Options that have no effect next to others: one table for `rime index`, `rime search` and `rime demo`.

An option that changes nothing looks as if it had worked. So it is refused by name before a model is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rime_pl.datamodules.corpus_file import CORPUS_FILE
from rime_pl.errors import RimeError
from rime_pl.inference.table_items import TABLES
from rime_pl.options.parser import COMMON

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Conflict:
    """Options that have no effect in a case.

    Args:
        options: Their names; one that is given by its place is in capital letters.
        holds: Whether the case is there, from the values of all options.
        case: The case, and the reason, behind "has no effect".
    """

    options: tuple[str, ...]
    holds: Callable[[Values], bool]
    case: str


def _is_corpus(values: Values) -> bool:
    return (Path(values["source"]) / CORPUS_FILE).is_file()


def _is_table(values: Values) -> bool:
    source = Path(values["source"])
    return source.is_file() and source.suffix.lower() in TABLES


def _has_index(values: Values) -> bool:
    return values["index"] is not None


_TAKES_ITS_PLACE = "next to --instruction, which takes its place"

INDEX = (
    Conflict(
        ("SOURCE", "splits", "galleries", "mode", "batch_size", "part_size"),
        lambda values: values["from_parquet"] is not None,
        "next to --from_parquet, whose vectors are there already",
    ),
    Conflict(
        ("splits", "galleries"),
        lambda values: bool(values["source"]) and not _is_corpus(values),
        "because the source is no corpus",
    ),
    Conflict(
        ("media",),
        lambda values: bool(values["source"]) and not _is_table(values),
        "because the source is no table",
    ),
    Conflict(("task",), lambda values: values["instruction"] is not None, _TAKES_ITS_PLACE),
)

_OF_AN_INDEX = ("media", "target_mode", "strategy", "candidates", "threshold", "faiss")
_OF_A_SEARCH = ("mode", "images", "top_k", "output", "task", "instruction", "batch_size")
SEARCH = (
    Conflict(
        ("QUERY", "query_media", "index", *_OF_A_SEARCH, *_OF_AN_INDEX),
        lambda values: values["calibrate"],
        "next to --calibrate, which chooses the threshold of a run and searches nothing",
    ),
    Conflict(
        _OF_AN_INDEX,
        lambda values: not _has_index(values),
        "without --index FOLDER. `rime index` makes one",
    ),
    Conflict(("images", "batch_size"), _has_index, "next to --index, whose items are embedded already"),
    Conflict(
        ("task",),
        lambda values: _has_index(values) and values["instruction"] is not None,
        _TAKES_ITS_PLACE,
    ),
    Conflict(
        ("candidates",),
        lambda values: values["strategy"] != "two-step",
        "unless --strategy is two-step, which ranks them again",
    ),
    Conflict(
        ("threshold",),
        lambda values: values["strategy"] != "adaptive",
        "unless --strategy is adaptive, which compares margins with it",
    ),
    Conflict(
        ("mode",),
        lambda values: values["strategy"] == "adaptive" and values["mode"] == "discriminative",
        "next to --strategy adaptive, which writes rewrites",
    ),
)

DEMO = (
    Conflict(("media",), lambda values: not _has_index(values), "without --index FOLDER, whose media it has"),
    Conflict(("batch_size",), _has_index, "next to --index, whose items are embedded already"),
    Conflict(
        ("task",),
        lambda values: _has_index(values) and values["instruction"] is not None,
        _TAKES_ITS_PLACE,
    ),
)


def refuse_ignored(
    conflicts: Sequence[Conflict], function: Callable[..., Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a command, unless some are given that would be ignored.

    Args:
        conflicts: Those of the command.
        function: The command; an argument is given if it is not the default of its signature.
        arguments: From the parser.

    Raises:
        RimeError: If some would be; it names all of the first conflict.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {one.name: "" if one.default is one.empty else one.default for one in parameters}
    values, plain = _flat(arguments), _flat(defaults)
    for conflict in conflicts:
        named = {option: option.lower() for option in conflict.options}
        given = [option for option, name in named.items() if values[name] != plain[name]]
        if given and conflict.holds(values):
            told = ", ".join(option if option.isupper() else f"--{option}" for option in given)
            has, them = ("has", "it") if len(given) == 1 else ("have", "them")
            raise RimeError(f"{told} {has} no effect {conflict.case}. Leave {them} out.")
    return arguments


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in arguments.items() if name != COMMON}
    return own | (vars(arguments[COMMON]) if COMMON in arguments else {})
