"""A matplotlib figure as an inline SVG that has a title and a description, and that needs no font file.

Called by the files beside it. Text stays text, so that it can be selected, searched and read aloud.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import matplotlib
from matplotlib.figure import Figure

from rime_pl.report.elements import el

_RULES: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "rime", "text.parse_math": False},
    **{"font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"]},  # or else the browser's
}
#: References to another element of the picture, as an attribute holds them.
_REFERENCE = re.compile(r"(url\(#|^#)")


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """Give a figure of this size, in inches, that is drawn by the rules of the page."""
    with matplotlib.rc_context(_RULES):
        yield Figure(figsize=(width, height), layout="constrained")


def inline(figure: Figure, title: str, description: str) -> Element:
    """Return a figure as an SVG element whose width is that of its place.

    Args:
        figure: From :func:`drawing`, still inside it.
        title: What the picture shows, for people who do not see it.
        description: What can be read from it, in numbers.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = fromstring(file.getvalue())
    # different pictures of a page must have different ids, and equal numbers give an equal page
    picture = f"p{hashlib.sha256(f'{title}{file.getvalue()}'.encode()).hexdigest()[:8]}-"
    ids = {"aria_labelledby": f"{picture}title", "aria_describedby": f"{picture}text"}
    parts = [el("title", title, id=f"{picture}title"), el("desc", description, id=f"{picture}text")]
    parts += [_plain(child, picture) for child in drawn if _name(child.tag) != "metadata"]
    return el("svg", *parts, viewBox=drawn.attrib["viewBox"], role="img", **ids)


def _plain(element: Element, picture: str) -> Element:
    """Return an element without namespaces, which HTML does not need, and with ids of its own picture."""
    kept = Element(_name(element.tag))
    for name, value in element.attrib.items():
        name = _name(name)
        kept.set(name, f"{picture}{value}" if name == "id" else _REFERENCE.sub(rf"\g<1>{picture}", value))
    kept.text, kept.tail = element.text, element.tail
    kept.extend(_plain(child, picture) for child in element if _name(child.tag) != "style")
    return kept


def _name(tag: str) -> str:
    return tag.rpartition("}")[2]
