"""Takes the placeholders of media out of a text: where media stand in a prompt is our prompt's matter.

Called by the builders of data sets whose texts hold them.
"""

from __future__ import annotations

import re

from rime_pl.datamodules.builders.sources.drafts import Refused

_PLACEHOLDER = re.compile(r"<(?:\|(?:image|video)_\d+\||image|video)>")


def without_placeholders(text: str, media: int) -> tuple[str, tuple[str, ...]]:
    r"""Return the text without placeholders, and what was repaired.

    Args:
        text: The text, with ``<|image_1|>``, ``<image>`` or ``<video>`` for each medium.
        media: Number of media that there are.

    Raises:
        Refused: If the text has more placeholders than there are media, and there are some.

    >>> without_placeholders("<image>\nWhat is it?\n", 1)
    ('What is it?', ())
    >>> without_placeholders("<|image_1|>\nWhich is bluer?", 0)
    ('Which is bluer?', ('placeholder without a medium, dropped',))
    """
    pieces = [piece.strip() for piece in _PLACEHOLDER.split(text)]
    count = len(pieces) - 1
    if count > media > 0:
        raise Refused("placeholder mismatch", f"{count} placeholders stand for {media} media: {text!r:.90}.")
    notes: tuple[str, ...] = ()
    if count > media:
        notes = ("placeholder without a medium, dropped",)
    elif count < media:
        notes = ("medium without a placeholder, put first",)
    return " ".join(piece for piece in pieces if piece), notes
