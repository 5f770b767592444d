"""What a rewrite names of what the annotated one names: overlap of content words.

Called by ``rime_pl.callbacks.retrieval_recall`` for every evaluated item.
"""

from __future__ import annotations

import re

#: Words that say nothing about an item.
_FUNCTION_WORDS = (
    "a an and are as at be by for from has have in into is it its no of on one or that the their there "
    "this to was were which who with"
)


def content_words(text: str) -> set[str]:
    """Distinct lower-case words and numbers without function words.

    >>> sorted(content_words("The red ring, left of a 2nd ring."))
    ['2nd', 'left', 'red', 'ring']
    """
    return set(re.findall(r"\w+", text.lower())) - set(_FUNCTION_WORDS.split(" "))


def slot_scores(rewrite: str, reference: str) -> tuple[float, float]:
    """How much of the reference's content words a rewrite names, and how much it names beside them.

    ``recall = |W and V| / |V|``, ``F1 = 2 |W and V| / (|W| + |V|)``; W of the rewrite, V of the reference

    Args:
        rewrite: Generated text; may be empty.
        reference: Annotated text.

    Returns:
        recall and F1, from 0 to 1; 1 where the reference has no content words and the rewrite neither.

    Example:
        >>> slot_scores("a red ring", "the red square")
        (0.5, 0.5)
    """
    written, wanted = content_words(rewrite), content_words(reference)
    if not wanted:
        return (1.0, 1.0) if not written else (0.0, 0.0)
    both = len(written & wanted)
    return both / len(wanted), 2 * both / (len(written) + len(wanted))
