"""How many content words of the reference rewrite a generated rewrite contains.

Called by callbacks/retrieval_recall.py for every evaluated item.
"""

from __future__ import annotations

import re

#: Words that say nothing about an item.
_FUNCTION_WORDS = (
    "a an and are as at be by for from has have in into is it its no of on one or that the their there "
    "this to was were which who with"
)


def content_words(text: str) -> set[str]:
    """Return the distinct lower-case words and numbers of a text, without function words.

    Source: ours.

    Example:
        >>> sorted(content_words("The red ring, left of a 2nd ring."))
        ['2nd', 'left', 'red', 'ring']
    """
    return set(re.findall(r"\w+", text.lower())) - set(_FUNCTION_WORDS.split(" "))


def slot_scores(rewrite: str, reference: str) -> tuple[float, float]:
    """Return recall and F1 of the reference's content words in a rewrite.

    In plain terms: recall falls when a word is missing, F1 also when a word is too many.

    ``recall = |W and V| / |V|``, ``F1 = 2 |W and V| / (|W| + |V|)``; W in the rewrite, V in the reference

    Args:
        rewrite: The generated rewrite; may be empty.
        reference: The reference rewrite.

    Returns:
        Recall and F1, each from 0 to 1. If the reference has no content words, both are 1 if the rewrite has
        none either, else 0.

    Source: precision and recall of sets of words, as in SQuAD (arXiv 1606.05250).

    Example:
        >>> slot_scores("a red ring", "the red square")
        (0.5, 0.5)
    """
    written, wanted = content_words(rewrite), content_words(reference)
    if not wanted:
        return (1.0, 1.0) if not written else (0.0, 0.0)
    both = len(written & wanted)
    return both / len(wanted), 2 * both / (len(written) + len(wanted))
