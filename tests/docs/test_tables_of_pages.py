"""The tables of docs/reference that name tests, functions and settings: all that they name exists."""

from __future__ import annotations

import ast
import re

import pytest

from docs.site.imports import modules
from docs.site.settings import settings
from tests.docs.named import ROOT, known_tests

REFERENCE = ROOT / "docs/reference"
NAMED_TEST = re.compile(r"`(test_\w+\.py::test_\w+)`")


def rows(page: str) -> list[str]:
    """Return the rows of all tables of a page, without their heads."""
    lines = (REFERENCE / page).read_text().splitlines()
    heads = {number - 1 for number, line in enumerate(lines) if re.match(r"\|[-:| ]+\|$", line)}
    return [
        line
        for number, line in enumerate(lines)
        if line.startswith("|") and number not in heads and number - 1 not in heads
    ]


def functions() -> set[str]:
    """Return every function and class at the top of a module, by its dotted name."""
    return {
        f"{module}.{node.name}"
        for module, path in modules().items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_each_combination_names_tests_that_exist() -> None:
    known, found = known_tests(), rows("tested-combinations.md")
    assert len(found) > 20
    wrong = [row for row in found if not NAMED_TEST.findall(row) or set(NAMED_TEST.findall(row)) - known]
    assert not wrong, "\n".join(wrong)


def test_each_part_of_the_paper_names_functions_and_settings_that_exist() -> None:
    known, names, found = functions(), {one.name for one in settings()}, rows("paper-to-code.md")
    assert len(found) > 15
    for row in found:
        source, function, given, differs = (cell.strip() for cell in row.strip("|").split("|"))
        assert source.startswith(("RIME, abstract", "RIME, model card", "UME-R1", "GRPO", "not in either")), (
            row
        )
        called = re.findall(r"`([\w.]+)`", function)
        assert called and set(called) <= known, f"{set(called) - known} is in no module"
        assert set(re.findall(r"`([\w.]+)`", given)) <= names, row
        assert differs, f"say what differs, or that nothing does: {row}"


@pytest.mark.parametrize("page", ["tested-combinations.md", "paper-to-code.md"])
def test_rows_have_as_many_cells_as_their_head(page: str) -> None:
    table: list[int] = []
    for line in [*(REFERENCE / page).read_text().splitlines(), ""]:
        if line.startswith("|"):
            table.append(line.count("|"))
        else:
            assert len(set(table)) <= 1, f"above {line!r}"
            table = []
