"""A number can be made again: each table of results stands in a section that names its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.named import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/results").glob("*.md"))]
COMMAND = re.compile(
    r"(?:`|^)(?:\S*/)?(?:[A-Z_]+=\S+ )*(?:make|rime|python -m|python) [a-z.\-]", re.MULTILINE
)
NUMBERS = re.compile(r"^\|.*\d\.\d.*\|", re.MULTILINE)


def sections(page: Path) -> list[tuple[str, str]]:
    """Return each section of the second level with its heading; what precedes them counts for all."""
    first, *rest = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    return [("", first), *((part.split("\n")[0], part) for part in rest)]


def without_command(page: Path) -> list[str]:
    """Return the headings of sections that have a table of numbers, but no command."""
    named = COMMAND.search(sections(page)[0][1]) is not None and page.name != "README.md"
    return [
        heading
        for heading, text in sections(page)
        if NUMBERS.search(text) and not (named or COMMAND.search(text))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_table_of_results_names_its_command(page: Path) -> None:
    assert not without_command(page)


def test_a_table_without_a_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Results\n\n## First\n\n| a |\n|---|\n| 0.5 |\n\n## Second\n\n`make x`\n\n| 0.5 |\n")
    assert without_command(page) == ["First"]
