"""How instruction and text of an item are joined: in our own places, or letter for letter as officially.

Called by the readers of all benchmarks. Our prompt puts media first and the text directly behind them, so an
official text is what follows the mark of the medium.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.types import Item, Medium

#: Mark of a picture in stored instructions; also where the item has no picture (WebQA, EDIS).
PLACEHOLDER = "<|image_1|>"

Layout: TypeAlias = Literal[
    "picture query",  # picture, newline, instruction, text, newline
    "text query",  # instruction, text, newline
    "dialogue query",  # as "text query", and one more newline (VisDial)
    "picture",  # picture, newline, instruction, caption if there is one, newline
    "crop",  # as "picture", without the last newline
    "clip",  # clip or page, space, instruction, text
    "words",  # instruction, text
    "raw",  # the text only
]


def without_mark(instruction: str) -> str:
    r"""Return a stored instruction without the mark of its picture and the newline after it.

    >>> without_mark("<|image_1|>\nRepresent the given image. ")
    'Represent the given image. '
    """
    return instruction.replace(PLACEHOLDER, "").lstrip("\n")


def official_text(layout: Layout, instruction: str, text: str | None = None) -> str:
    r"""Return the official text behind the mark of the medium.

    Args:
        layout: Which of the official layouts; see :data:`Layout`.
        instruction: As it is stored, without the mark of a picture. A space at its end stays.
        text: Text or caption; None if there is none.

    Example:
        >>> official_text("picture query", "Which is it?", "A or \nB")
        '\nWhich is it? A or\nB\n'
        >>> official_text("clip", "Find it:", "a dog")
        ' Find it: a dog'
    """
    if layout == "raw":
        return text or ""
    if layout in ("text query", "dialogue query"):
        return f"{instruction} {text or ''}\n" + ("\n" if layout == "dialogue query" else "")
    if layout in ("clip", "words"):
        return (" " if layout == "clip" else "") + (f"{instruction} {text}" if text else instruction)
    joined = (
        f"\n{instruction} {text}"
        if text or (text is not None and layout == "picture")
        else f"\n{instruction}"
    )
    # the official code removes one space before each newline, and then adds the last newline
    return joined.replace(" \n", "\n") + ("" if layout == "crop" else "\n")


def item_of(
    options: ReadOptions,
    layout: Layout,
    instruction: str,
    text: str | None = None,
    media: tuple[Medium, ...] = (),
) -> Item:
    """Return an item with its words where ``options.wording`` wants them.

    Args:
        options: How tasks are read.
        layout: See :func:`official_text`.
        instruction: See :func:`official_text`.
        text: Text or caption; None if there is none.
        media: Pictures, clips and pages, or their paths.
    """
    if options.wording == "official" or layout == "raw":
        return Item(official_text(layout, instruction, text), media)
    return Item((text or "").strip(), media, instruction=instruction.strip())
