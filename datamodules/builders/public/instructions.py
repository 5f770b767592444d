"""Divides a text of MMEB into the instruction with which it begins, and the rest.

MMEB and the data sets made from it keep both in one string. Called by their builders.
"""

from __future__ import annotations

import re

#: Words that begin a text and say what to do; they become the instruction.
_INSTRUCTIONS = (
    "Represent the given image for classification",
    "Represent the given news image with the following caption for domain classification",
    "Represent the given image for binary classification to determine whether it constitutes hateful speech "
    "or not",
    "Identify the object shown in the image",
    "Identify the scene shown in the image",
    "Represent the given image with the following question",
    "Represent the given dialogue about an image, which is used for image retrieval",
    "Given an image, find a similar everyday image with the described changes",
    "Retrieve an image of this news caption",
    "Find a caption for the news in the given photo",
    "Find me an everyday image that matches the given caption",
    "Find an image caption describing the given everyday image",
    "Find a day-to-day image that looks similar to the provided image",
    "Find a Wikipedia image that answers this question",
    "Represent the given Wikipedia image with related text information",
    "Crop the image to isolate the object labeled as",
    "Crop the image to to isolate the object labeled as",
    "Represent the given cropped image of the object",
    "Represent the given image",
)
_KNOWN = "|".join(map(re.escape, sorted(_INSTRUCTIONS, key=len, reverse=True)))
_BEGINS = re.compile(rf"({_KNOWN})(?:\s*[:.]|(?=\s*[\"\n])|\s*$)")


def split_instruction(text: str, has_media: bool) -> tuple[str, str]:
    r"""Return the instruction with which a text of MMEB begins, "" if none is known, and the rest.

    >>> split_instruction("Find a Wikipedia image that answers this question: Which is bluer?", False)
    ('Find a Wikipedia image that answers this question:', 'Which is bluer?')
    >>> split_instruction("Represent the given image.", True)
    ('Represent the given image.', '')
    """
    found = _BEGINS.match(text)
    if found is None:
        return "", text
    rest = text[found.end() :].strip()
    return (found.group().strip(), rest) if rest or has_media else ("", text)
