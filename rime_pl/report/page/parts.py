"""The small parts that the sections of the page share. Called by the files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from rime_pl.errors import RimeError
from rime_pl.report.elements import el
from rime_pl.report.page.facts import RunFacts


def of_each(runs: Sequence[RunFacts], of_run: Callable[[RunFacts], list[Element]]) -> list[Element]:
    """Return a part for each run, under its name if there are several.

    A run whose files lack what the part needs gets a sentence that says so.
    """
    parts = []
    for run in runs:
        try:
            content = of_run(run)
        except (RimeError, KeyError, TypeError, ValueError) as error:
            content = [el("p", f"This part cannot be shown: {error}", class_="fault")]
        heading = [el("h3", run.heading)] if len(runs) > 1 else []
        parts.append(el("div", *heading, *content, class_="run"))
    return parts


def figure(picture: Element, caption: str = "") -> Element:
    """Return a picture with the words below it."""
    return el("figure", picture, *([el("figcaption", caption)] if caption else []))


def details(summary: str, *content: Element) -> Element:
    """Return a part that is folded until a reader opens it; that needs no script."""
    return el("details", el("summary", summary), *content)


def percent(share: float) -> str:
    """Return a share in words.

    >>> percent(0.874)
    '87.4 %'
    """
    return f"{100 * share:.1f} %"


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested values by their dotted names, each as a text.

    >>> flat({"data": {"tasks": ["a"], "path": "data/x"}, "seed": 0})
    {'data.tasks': '["a"]', 'data.path': 'data/x', 'seed': '0'}
    """
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = told(value)
    return found


def told(value: Any) -> str:
    """Return a value as a text: a string as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
