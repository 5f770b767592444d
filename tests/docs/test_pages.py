"""Pages are copied for the site with links that lead somewhere there."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from docs.site import build, pages
from docs.site.pages import ROOT, Pages


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, and a rendered tutorial with a picture."""
    rendered = tmp_path_factory.mktemp("rendered")
    link = "![a plot](plot.png) [the loss](../../rime_pl/losses/alignment.py) [words](../glossary.md)"
    (rendered / "01_first.md").write_text(f"# First\n\n{link}\n")
    (rendered / "plot.png").write_bytes((ROOT / "docs/results/claims-sft.png").read_bytes())
    folder = tmp_path_factory.mktemp("site")
    Pages(folder).copy(rendered)
    return folder


def test_every_link_leads_to_a_page_of_the_site(copied: Path) -> None:
    dead = []
    for page in copied.rglob("*.md"):
        if page.relative_to(copied).parts[0] == "source":
            continue
        prose: list[str] = []
        pages.outside_code(page.read_text(), lambda text, kept=prose: kept.append(text) or text)
        links = [match[1] for text in prose for match in pages.LINK.finditer(text)]
        dead += [
            (page.name, link)
            for link in links
            if link and ":" not in link and not (page.parent / link).exists()
        ]
    assert not dead


def test_a_file_of_the_source_becomes_a_page(copied: Path) -> None:
    text = (copied / "source/rime_pl/modules/cma.py.md").read_text()
    assert text.startswith("# rime_pl/modules/cma.py\n") and "class CMAModule" in text
    assert "](source/rime_pl/modules/cma.py.md)" in (copied / "readme.md").read_text()


def test_a_rendered_tutorial_has_its_place(copied: Path) -> None:
    text = (copied / "tutorials/01_first.md").read_text()
    assert "(plot.png)" in text and "(../source/rime_pl/losses/alignment.py.md)" in text
    assert "(../glossary.md)" in text and (copied / "tutorials/plot.png").is_file()
    sections = {name: found for one in build.navigation(copied) for name, found in one.items()}
    assert sections["Tutorials"] == [
        {"Tutorials": "tutorials/index.md"},
        {"First": "tutorials/01_first.md"},
    ]
    assert {"README": "readme.md"} in sections["Project"] and sections["Start"] == "index.md"


def test_each_page_of_docs_is_in_the_navigation(copied: Path) -> None:
    inside = str(build.navigation(copied))
    found = [page.relative_to(copied) for page in copied.rglob("*.md")]
    assert not [page for page in found if page.parts[0] != "source" and str(page) not in inside]


@pytest.mark.parametrize("module", ["pages", "build", "imports"])
def test_examples_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"docs.site.{module}"))
    assert result.attempted > 0 and result.failed == 0
