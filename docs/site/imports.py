"""Who imports whom, read from the source with ast, without importing it. Called by drawing.py."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Folder -> the package that it is installed as.
FOLDERS = {"rime_pl": "rime_pl", "datamodules": "rime_pl.datamodules", "callbacks": "rime_pl.callbacks"}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return every module by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


@cache
def imports() -> Graph:
    """Return for each module the modules of ours that it imports, anywhere in the file."""
    known = modules()
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= whole & known.keys() or {node.module} & known.keys()
    return {name: found - {name} for name, found in graph.items()}


def between_rooms(graph: Graph, rooms: dict[str, str]) -> Graph:
    """Return who imports whom among rooms.

    Args:
        graph: Who imports whom among modules.
        rooms: Module or package -> its room; the longest name counts. What has no room is left out.
    """

    def room(name: str) -> str | None:
        fitting = [one for one in rooms if name == one or name.startswith(f"{one}.")]
        return rooms[max(fitting, key=len)] if fitting else None

    found: Graph = defaultdict(set)
    for name, targets in graph.items():
        here = room(name)
        if here is not None:
            found[here] |= {there for target in targets if (there := room(target)) not in (None, here)}  # type: ignore[misc]
    return dict(found)


def without_detours(graph: Graph) -> Graph:
    """Return the graph without an edge that a longer way says as well; the graph must have no circle.

    >>> without_detours({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    {'a': {'b'}, 'b': {'c'}, 'c': set()}
    """

    def reached(name: str) -> set[str]:
        return graph[name].union(*(reached(one) for one in graph[name]))

    return {
        name: {one for one in ones if not any(one in reached(other) for other in ones - {one})}
        for name, ones in graph.items()
    }


def layers(graph: Graph) -> dict[str, int]:
    """Return the layer of each room: 0 imports nothing, every other is above all that it imports.

    Raises:
        ValueError: If rooms import each other in a circle, which is named.
    """
    found: dict[str, int] = {}

    def layer(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"Rooms import each other: {' -> '.join([*above, name])}.")
        if name not in found:
            found[name] = 1 + max((layer(one, (*above, name)) for one in graph[name]), default=-1)
        return found[name]

    for name in graph:
        layer(name, ())
    return found
