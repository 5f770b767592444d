"""Makes Markdown of our docstrings where they are written in another way: examples, and names of functions.

Loaded by griffe, as zensical.toml says.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def in_markdown(text: str) -> str:
    """Return a docstring with its examples as blocks of code, and with names in place of Sphinx roles."""
    lines: list[str] = []
    indent: str | None = None  # of the example that is open
    for line in ROLE.sub(r"`\1`", text).splitlines():
        if indent is None and line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```python")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    return "\n".join([*lines, *([] if indent is None else [f"{indent}```"])])


class Docstrings(Extension):
    """Changes each docstring when griffe has read it."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = in_markdown(obj.docstring.value)
