"""Takes the placeholders of media out of a text: where media stand in a prompt is our prompt's matter.

Called by the builders of data sets whose texts hold them.
"""

from __future__ import annotations

from rime_pl.datamodules.builders.sources.drafts import Refused


def without_placeholders(text: str, placeholder: str, media: int) -> tuple[str, tuple[str, ...]]:
    r"""Return the text without placeholders, and what was repaired.

    Args:
        text: The text.
        placeholder: What stands for a medium.
        media: Number of media that there are.

    Raises:
        Refused: If the text has more placeholders than there are media, and there are some.

    >>> without_placeholders("<image>\nWhat is it?\n", "<image>", 1)
    ('What is it?', ())
    >>> without_placeholders("<image>\nWhich is bluer?", "<image>", 0)
    ('Which is bluer?', ('placeholder without a medium, dropped',))
    """
    count = text.count(placeholder)
    if count > media > 0:
        raise Refused("placeholder mismatch", f"{count} x {placeholder!r} stand for {media} media.")
    notes: tuple[str, ...] = ()
    if count > media:
        notes = ("placeholder without a medium, dropped",)
    elif count < media:
        notes = ("medium without a placeholder, put first",)
    pieces = [piece.strip() for piece in text.split(placeholder)]
    return " ".join(piece for piece in pieces if piece), notes
