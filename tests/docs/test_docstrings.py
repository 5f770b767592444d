"""Losses and metrics say what a user must know: shapes, errors, source, and an example that runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "rime_pl/losses").glob("*.py"), *(ROOT / "rime_pl/metrics").glob("*.py")])
Definition = ast.FunctionDef | ast.ClassDef
#: A shape such as (B, D) or (N,), or that there is none.
SHAPE = re.compile(
    r"\((?:[A-Z]\w*|\d+|min\(.*?\)|\.\.\.)(?:,(?: [\w.*+ ]+(?:\(.*?\))?)?)+\)|[Ss]calar|any (?:equal )?shape"
)


def definitions() -> dict[str, tuple[Path, Definition]]:
    """Return every public function and class by its name."""
    return {
        node.name: (path, node)
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


def raising() -> set[str]:
    """Return the names of all functions and classes of these packages that raise, also by what they call."""
    every = {
        node.name: node
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    found = {
        name for name, node in every.items() if any(isinstance(one, ast.Raise) for one in ast.walk(node))
    }
    while True:
        more = {name for name, node in every.items() if calls(node) & found} - found
        if not more:
            return found
        found |= more


def calls(node: ast.AST) -> set[str]:
    """Return the names that are called."""
    return {
        one.func.id for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
    }


def lacks(whole: str, node: Definition, raises: set[str]) -> list[str]:
    """Return what the docstring of a definition lacks, which stands in the text ``whole``."""
    text = ast.get_docstring(node) or ""
    source = ast.get_source_segment(whole, node) or ""
    kept = source if isinstance(node, ast.ClassDef) else text  # a dataclass has the shapes beside its fields
    wanted = {
        "shapes": "Tensor" not in source or SHAPE.search(kept) is not None,
        "Raises": node.name not in raises or "Raises:" in text,
        "Source": "Source:" in text,
        "Example": ">>>" in text,
    }
    return [name for name, there in wanted.items() if not there]


@pytest.mark.parametrize("name", definitions())
def test_a_docstring_has_all(name: str) -> None:
    path, node = definitions()[name]
    missing = lacks(path.read_text(), node, raising())
    assert not missing, f"{path.relative_to(ROOT)}: {name} lacks {', '.join(missing)}"


def test_what_is_missing_is_found() -> None:
    text = 'def bare(x: Tensor) -> Tensor:\n    """Return x."""\n    raise ValueError'
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.FunctionDef)
    assert lacks(text, node, {"bare"}) == ["shapes", "Raises", "Source", "Example"]
    assert {"check_temperature", "info_nce", "anchored_reward"} <= raising()
