"""Reads the JSON and YAML files of a run folder; one of another shape than a run writes is refused by name.

Called by run_folder.py. A damaged file then stops no reader with a traceback: `rime runs` lists its run as
damaged, and other commands name the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rime_pl.errors import RimeError
from rime_pl.options.words import read_settings

#: In a shape: numbers, None, and lists and objects of these.
NUMBERS = "numbers"
_GROUPS = ("recall@1", "trace", "rewrite", "oracle", "milliseconds", "crossed")
_RESULTS: dict[str, Any] = {name: {"": NUMBERS} for name in _GROUPS}
_RESULTS |= {"ci": {"": (int | float,)}, "": NUMBERS}
_OF_TASK = _RESULTS | {"modality": {"": str}}
#: File -> what its values must be where they are there. "" stands for every other key of an object, [x] for a
#: list of at least one x, (x,) for any list of x.
SHAPES: dict[str, Any] = {
    "manifest.json": {
        **{"stage": str, "data": str | None, "data_hash": str, "seed": int | None},
        **{"steps": int, "steps_timed": int, "device": {"threads": int | None}},
        "differs_from_recipe": {"": {}},
    },
    "origin.json": {"differs_from_recipe": {"": {}}},
    "summary.json": {
        **{
            "after": _RESULTS,
            "before": _RESULTS,
            "per_task": {"": _OF_TASK},
            "per_task_before": {"": _OF_TASK},
        },
        **{"all_gallery": _RESULTS, "seconds": {"": int | float}, "history": list},
        **{"gallery": int | float, "chance": int | float, "queries": int},
    },
    "ranks.json": [{"task": str, "ranks": {"": int | float}}],
    "config.yaml": {
        "model": {"init_adapter_from": str | None, "backbone": {"name_or_path": str, "prompt": {}}},
        **{"data": {"path": str | dict, "tasks": (str,)}, "recall": {"headline_tasks": (str,)}},
    },
}
#: Objects and lists that may be null.
_NULL = (
    "before",
    "per_task_before",
    "all_gallery",
    "crossed",
    "tasks",
    "headline_tasks",
    "gallery",
    "chance",
)


class Facts(dict[str, Any]):
    """An object of a file. A key that is missing is an error that names the file."""

    def __init__(self, values: dict[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise RimeError(f"{self.file} must hold {key!r}, but does not: it is damaged, or of another version.")


def read_facts(file: Path) -> Any:
    """Return what is in a file of a run folder.

    Raises:
        RimeError: If the file cannot be read, or has another shape than a run writes.
    """
    if file.suffix == ".yaml":
        try:
            value: Any = read_settings(file)
        except RimeError as error:
            raise RimeError(f"{file} is damaged. {error}") from error
    else:
        try:
            value = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise RimeError(f"{file} is damaged: {error}.") from error
    for place, found in _wrong(value, SHAPES.get(file.name, object)):
        raise RimeError(f"{file} is damaged: {place.rstrip('.') or 'it'} cannot be {found!r:.60}.")
    return _facts(value, file)


def _facts(value: Any, file: Path) -> Any:
    if isinstance(value, dict):
        return Facts({name: _facts(one, file) for name, one in value.items()}, file)
    return [_facts(one, file) for one in value] if isinstance(value, list) else value


def _wrong(value: Any, shape: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the places of values that are not of a shape."""
    null = value is None and place.rstrip(".").rpartition(".")[2] in _NULL
    if isinstance(shape, (list, tuple)) and not null:
        if not isinstance(value, list) or (isinstance(shape, list) and not value):
            yield place, value
        for number, one in enumerate(value if isinstance(value, list) else ()):
            yield from _wrong(one, shape[0], f"{place}{number}.")
    elif isinstance(shape, dict) and not null:
        if not isinstance(value, dict):
            yield place, value
        for name, one in value.items() if isinstance(value, dict) else ():
            if (inner := shape.get(name, shape.get(""))) is not None:
                yield from _wrong(one, inner, f"{place}{name}.")
    elif shape == NUMBERS:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for one in inner:
            yield from _wrong(one, NUMBERS, place)
        if not isinstance(value, (dict, list, int, float, type(None))):
            yield place, value
    elif not null and not isinstance(value, shape):
        yield place, value
