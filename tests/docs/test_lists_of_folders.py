"""CONTRIBUTING.md says who imports whom, and README lists the files: both are compared with the source."""

from __future__ import annotations

import re

import pytest

from docs.site.imports import between_rooms, imports, modules
from tests.docs.named import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
NAME = re.compile(r"`([^`]+)`")
#: What starts everything; and the package itself, which hands on `load`.
STARTS = {"__main__", "__init__"}


def rows() -> list[tuple[list[str], str]]:
    """Return the names of each row of the table without folder and ending, and its last column."""
    table = PAGE.partition("| folder | content |")[2].partition("\n\n")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return [([_module(name) for name in NAME.findall(row[0])], row[2]) for row in cells]


def _module(name: str) -> str:
    return name.removeprefix("rime_pl/").rstrip("/").removesuffix(".py")


def everybody() -> set[str]:
    return set(NAME.findall(PAGE.partition("Everybody may import ")[2].partition(", so the table")[0]))


def top_level() -> set[str]:
    return {name.split(".")[1] for name in modules() if name.count(".")}


OURS = [(names, last) for names, last in rows() if set(names) <= top_level() and "everything" not in last]


@pytest.mark.parametrize(("names", "last"), OURS, ids=[names[0] for names, _ in OURS])
def test_a_row_names_what_the_source_imports(names: list[str], last: str) -> None:
    graph = between_rooms(imports(), {f"rime_pl.{name}": name for name in top_level()})
    found = set().union(*(graph.get(name, set()) for name in names)) - set(names) - everybody()
    assert found == set(NAME.findall(last)), "CONTRIBUTING.md, the table of folders"
    assert found or last.strip() == "nothing"


def test_each_module_has_one_row() -> None:
    listed = [name for names, _ in rows() for name in names if name in top_level()]
    assert sorted(listed) == sorted(top_level() - STARTS)


def test_the_files_of_readme_are_all() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Files")[2].partition("## ")[0]
    listed = re.findall(r"(?<![\w/.])(\w+)(?:\.py|/)", tree)
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"rime_pl"}
    assert sorted(set(listed) & top_level()) == sorted(top_level() - {"__init__"}) and folders <= set(listed)
    files = re.findall(r"\w+\.py", tree)
    assert files and [name for name in files if not (ROOT / "rime_pl" / name).exists()] == []
