"""Copies the pages of the repository to where the site is built, so that every link leads somewhere there.

Called by build.py. A link to a file that is no page, such as a module, leads to a page with that file's text,
because the site knows no host that shows the repository.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Pages outside docs/ and their places in the site.
OUTSIDE = {
    "README.md": "readme.md",
    **{f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")},
}
#: What is copied from docs/ as it is.
COPIED = {".md", ".png", ".svg", ".css", ".json"}
#: Languages of the files that have a page of their own.
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")
LIST = re.compile(r"^(\s*)([-*]|\d+\.) ")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Return the text with ``change`` applied to all of it but code.

    >>> outside_code("a `a` a", str.upper)
    'A `a` A'
    """
    parts, last = [], 0
    for match in CODE.finditer(text):
        parts += [change(text[last : match.start()]), match.group()]
        last = match.end()
    return "".join([*parts, change(text[last:])])


def with_room_for_lists(text: str) -> str:
    """Return the page with an empty line before each list, which Python-Markdown needs and GitHub does not.

    >>> with_room_for_lists("We have:\\n- one\\n- two")
    'We have:\\n\\n- one\\n- two'
    """
    lines: list[str] = []
    fenced = in_list = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        item = not fenced and LIST.match(line) is not None
        if item and not in_list and lines and lines[-1].strip():
            lines.append("")
        in_list = item or (in_list and (line.startswith("  ") or not line.strip()))
        lines.append(line)
    return "\n".join(lines) + ("\n" if text.endswith("\n") else "")


class Pages:
    """The pages of the site, in a folder that the site is built from.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: set[Path] = set()  # files of the repository that pages link to

    def copy(self, rendered: Path | None = None) -> None:
        """Copy docs/, the pages of OUTSIDE and the tutorials that were rendered, with their links changed.

        Args:
            rendered: Folder of the rendered tutorials; None, or a folder that is not there, for none.
        """
        for name, place in OUTSIDE.items():
            if (ROOT / name).is_file():
                self._page(ROOT / name, place)
        for path in sorted((ROOT / "docs").rglob("*")):
            inside = path.relative_to(ROOT / "docs")
            if (
                path.suffix in COPIED
                and inside.parts[0] != "site"
                and not inside.name.endswith(".template.md")
            ):
                self._page(path, str(inside))
        for path in sorted(rendered.rglob("*")) if rendered is not None and rendered.is_dir() else ():
            if path.suffix in COPIED:  # their links are those of a page in docs/tutorials
                place = Path("tutorials") / path.relative_to(rendered)
                self._page(path, str(place), ROOT / "docs" / place)
        self._page_of_decisions()
        for source in sorted(self.sources):
            self.write(f"source/{source}.md", _source_page(source))

    def write(self, place: str, text: str) -> None:
        """Write a page."""
        target = self.folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def _page(self, path: Path, place: str, written_at: Path | None = None) -> None:
        """Copy a file; the links of a page are relative to itself, or to ``written_at``."""
        if path.suffix == ".md":
            at = written_at or path
            changed = outside_code(path.read_text(), lambda text: self._links(text, at, Path(place)))
            self.write(place, with_room_for_lists(changed))
        else:
            (self.folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.folder / place)

    def _links(self, text: str, path: Path, place: Path) -> str:
        def changed(match: re.Match[str]) -> str:
            link, anchor = match[1], match[2] or ""
            if not link or "://" in link or link.startswith("mailto:"):
                return match[0]
            found = Path(os.path.normpath(path.parent / link))
            there = Path(os.path.relpath(self._place_of(found.relative_to(ROOT)), place.parent))
            return f"]({there.as_posix()}{anchor})"

        return LINK.sub(changed, text)

    def _place_of(self, path: Path) -> str:
        """Return where the site has a file of the repository."""
        if str(path) in OUTSIDE:
            return OUTSIDE[str(path)]
        if path.parts[0] == "docs" and (ROOT / path).is_dir():
            return str(Path(*path.parts[1:], "index.md"))
        if path.parts[0] == "docs" and path.suffix in COPIED:
            return str(Path(*path.parts[1:]))
        if (ROOT / path).is_file():
            self.sources.add(path)
        return f"source/{path}.md"

    def _page_of_decisions(self) -> None:
        """Write the list of the decisions, each with its first heading."""
        rows = [
            f"- [{title_of(path.read_text())}]({path.name})"
            for path in sorted((ROOT / "docs/decisions").glob("0*.md"))
        ]
        words = "Read here why things are as they are. Each page has the context, the decision and its price."
        self.write("decisions/index.md", "\n".join(["# Decisions", "", words, "", *rows, ""]))


def title_of(text: str) -> str:
    """Return the first heading of a page.

    >>> title_of("# 1. A title\\n\\nText")
    '1. A title'
    """
    return next(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))


def _source_page(path: Path) -> str:
    """Return a page with the text of a file of the repository."""
    language = LANGUAGES.get(path.suffix, "text")
    fence = "`" * 5
    return f"# {path}\n\n{fence}{language}\n{(ROOT / path).read_text().rstrip()}\n{fence}\n"
