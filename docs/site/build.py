"""`make docs`: copy the pages, make the reference from the code, and build the site.

python -m docs.site.build writes build/site/html. A fault of the site, such as a dead link, ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from docs.site import api, commands, drawing, settings
from docs.site.pages import ROOT, Pages, title_of

#: Section -> its pages, in order; a folder stands for those in it that are not named before.
SECTIONS: dict[str, list[str]] = {
    "Tutorials": ["tutorials/index.md", "tutorials"],
    "How-to": ["how-to/your-own-data.md", "how-to/use-a-model.md", "how-to"],
    "Explanation": ["explanation"],
    "Reference": [
        "reference/settings.md",
        "reference/commands.md",
        "reference/metrics.md",
        "reference",
        "glossary.md",
    ],
    "Python API": ["api"],
    "Results": ["results/claims.md", "results/numbers.md", "results"],
    "Decisions": ["decisions/index.md", "decisions"],
    "Project": ["readme.md", "contributing.md", "changelog.md", "security.md"],
}
#: Pages that the navigation calls otherwise than by their first heading.
TITLES = {"readme.md": "README", "decisions/index.md": "All decisions"}


def generate(pages: Pages) -> None:
    """Write the pages that are made from the code."""
    pages.write("reference/settings.md", settings.page())
    pages.write("reference/commands.md", commands.page())
    drawing.main(pages.folder / "explanation")
    for name in api.PAGES:
        pages.write(f"api/{name}.md", api.page(name))


def navigation(folder: Path) -> list[dict[str, Any]]:
    """Return the navigation over the pages that are there; each page is called by its first heading."""
    nav: list[dict[str, Any]] = [{"Start": "index.md"}]
    for section, places in SECTIONS.items():
        found: list[str] = []
        for place in places:
            inside = sorted((folder / place).glob("*.md")) if (folder / place).is_dir() else [folder / place]
            found += [str(path.relative_to(folder)) for path in inside if path.is_file()]
        named = [
            {TITLES.get(page) or title_of((folder / page).read_text()): page} for page in dict.fromkeys(found)
        ]
        nav += [{section: named}] if named else []
    return nav


def in_toml(value: Any) -> str:
    """Return lists, tables and texts as one line of TOML.

    >>> in_toml([{"A": "a.md"}, {"B": [{"C": "c.md"}]}])
    '[{"A" = "a.md"}, {"B" = [{"C" = "c.md"}]}]'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {in_toml(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(in_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def build(project: Path, rendered: Path | None = None) -> Path:
    """Build the site in a folder, and return the folder of its pages in HTML.

    Args:
        project: Folder for everything that is made; it is emptied before.
        rendered: Folder of the rendered tutorials.

    Raises:
        SystemExit: If the site has a fault; zensical has told it.
    """
    shutil.rmtree(project, ignore_errors=True)
    pages = Pages(project / "pages")
    pages.copy(rendered)
    generate(pages)
    own = f'docs_dir = "pages"\nsite_dir = "html"\nnav = {in_toml(navigation(pages.folder))}\n'
    look = (
        (Path(__file__).parent / "zensical.toml").read_text().replace("[project]\n", f"[project]\n{own}", 1)
    )
    (project / "zensical.toml").write_text(look)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=project, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    if done.returncode:
        raise SystemExit(f"the site has a fault (see above); its pages are in {pages.folder}")
    return project / "html"


def main() -> None:
    """Build the site from the command line."""
    parser = argparse.ArgumentParser(description="Build the site of rime_pl.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build/site", help="Folder; it is emptied before"
    )
    parser.add_argument("--tutorials", type=Path, default=ROOT / "build/tutorials", help="Rendered tutorials")
    given = parser.parse_args()
    html = build(given.output, given.tutorials)
    print(f"built {html}; look at it with: python -m http.server --directory {html}")


if __name__ == "__main__":
    main()
