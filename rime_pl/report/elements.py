"""HTML as elements, so that no text of a run becomes markup: the writer escapes every text and attribute.

Called by table.py and by the files of report/page, which make the page of `rime report`.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, tostring

#: Control characters, halves of surrogate pairs and non-characters: no HTML page may hold them.
_NOT_ALLOWED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def el(tag: str, *children: Element | str, **attributes: str) -> Element:
    """Return an element with these children, in order.

    Args:
        tag: Name of the element.
        children: Elements and texts.
        attributes: ``class_`` stands for ``class``, and ``aria_label`` for ``aria-label``.

    >>> html(el("p", "a < b, ", el("b", "<script>"), class_="note"))
    '<p class="note">a &lt; b, <b>&lt;script&gt;</b></p>'
    """
    element = Element(tag, {name.strip("_").replace("_", "-"): clean(v) for name, v in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + clean(child)
        else:
            element.text = (element.text or "") + clean(child)
    return element


def clean(text: str) -> str:
    """Return a text with U+FFFD in the place of each character that a page may not hold."""
    return _NOT_ALLOWED.sub("\ufffd", text)


def html(element: Element) -> str:
    """Return an element as HTML of ASCII characters, so that it is read alike in every encoding."""
    return tostring(element, encoding="us-ascii", method="html").decode("ascii")
