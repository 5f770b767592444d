r"""Reads what a model has written for one side of a UME-R1 or RIME record: reasoning and rewrite.

Called by ume_json.py. Nobody of us has seen a record; the forms are those that the trainers read.
"""

from __future__ import annotations

import re

from rime_pl.datamodules.builders.sources.drafts import Refused

_TAG = re.compile(r"</?(?:think|answer|rewrite|gen_emb|disc_emb|request)>")


def read_response(text: str) -> tuple[str, str | None]:
    r"""Return the rewrite and the chain of thought; the latter is None if there is none.

    Args:
        text: A plain rewrite, ``<rewrite>...</rewrite>``, or ``<think>...</think><answer>...``. What follows
            ``<gen_emb>`` must be white space.

    Raises:
        Refused: If the text has another form, or no rewrite.

    >>> read_response("<think>A cup.</think><answer>A red cup.<gen_emb>")
    ('A red cup.', 'A cup.\nA red cup.')
    >>> read_response("<rewrite>A red cup.</rewrite>")
    ('A red cup.', None)
    """
    written, _, after = text.partition("<gen_emb>")
    if after.replace("</answer>", "").replace("</rewrite>", "").strip():
        raise Refused(
            "unknown form of a response", f"nothing may follow <gen_emb>, but there is {after!r:.60}."
        )
    thought = None
    if found := re.fullmatch(r"\s*<think>(.*?)</think>(.*)", written, re.DOTALL):
        thought, written = found[1].strip(), found[2]
    for tag in ("answer", "rewrite"):
        if found := re.fullmatch(rf"\s*<{tag}>(.*?)(?:</{tag}>\s*)?", written, re.DOTALL):
            written = found[1]
    rewrite = written.strip()
    if tag_left := _TAG.search(f"{thought or ''} {rewrite}"):
        said = f"it must be a rewrite, or reasoning and an answer, but holds {tag_left.group()!r} elsewhere."
        raise Refused("unknown form of a response", said)
    if not rewrite:
        raise Refused("no rewrite in a response", f"there must be a rewrite, but there is {text!r:.90}.")
    return rewrite, f"{thought}\n{rewrite}" if thought else None
