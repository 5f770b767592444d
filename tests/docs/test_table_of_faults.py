"""The table of faults in docs/reference/data-format.md is exact: each fault names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/reference/data-format.md"
HEAD = "| fault | where it enters | what happens | test |"


def rows() -> list[list[str]]:
    """The cells of each fault."""
    lines = PAGE.read_text().split(HEAD)[1].splitlines()[2:]
    table = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_each_fault_names_tests_that_exist() -> None:
    files = {path.name: path for path in TESTS.rglob("test_*.py")}
    known = {
        f"{name}::{node.name}"
        for name, path in files.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    wrong = []
    for fault, *_, tests in rows():
        named = re.findall(r"`(test_\w+\.py::test_\w+)`", tests)
        wrong += [f"{fault}: {test}" for test in named if test not in known] + [fault] * (not named)
    assert not wrong


def test_each_fault_has_a_place_and_an_end() -> None:
    table = rows()
    assert len(table) > 30 and all(len(cells) == 4 and all(cells) for cells in table)
    ends = (
        "counted",
        "stop",
        "tried again",
        "the first frame",
        "what is there",
        "as a person",
        "a picture",
        "compared",
    )
    assert not [cells for cells in table if not cells[2].startswith(ends)]
