"""What comes back from an endpoint: bytes that may hold anything, an answer, and in it the rewrite.

Called by client.py for each response and by jobs.py for each answer.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rime_pl.teacher.cache import Answer

_THOUGHTS = re.compile(r"^\s*+(?:<think(?:ing)?>)?(.*?)</think(?:ing)?>", re.S)
_TAGGED = re.compile(r"<(answer|rewrite)>(.*?)(?:</\1>|$)", re.S)
_GENERATIVE = re.compile(r"<gen_emb>.*", re.S)
_PREFIX = re.compile(
    r"^\s*(?:\*\*)?(?:rewrite|rewritten (?:query|text)|answer|description)(?:\*\*)?:\s*", re.I
)
_QUOTES = (('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("`", "`"))


class Garbled(ValueError):
    """A response that holds no answer."""


def read_response(content: bytes) -> Answer:
    """Return the answer in a response of chat completions.

    Raises:
        Garbled: If it holds none; the message says why.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"it is no JSON: {content[:60]!r}") from error
    if not isinstance(body, dict):
        raise Garbled(f"it is no JSON object: {content[:60]!r}")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Garbled(f"it has no choice with a message: {json.dumps(body)[:90]}")
    finish = choice.get("finish_reason")
    refusal = message.get("refusal")
    text = _text(message.get("content"))
    if isinstance(refusal, str) and refusal.strip() and not text.strip():
        text, finish = refusal, "refusal"
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    tokens = [_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    return Answer(text, finish if isinstance(finish, str) else "stop", *tokens)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    raise Garbled(f"its content is no text: {json.dumps(content)[:60]}")


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def split_response(text: str) -> tuple[str, str] | None:
    """Return the thoughts of a response and the answer behind them; None if nothing marks the answer.

    Known are </think>, <answer> and <rewrite>; a <gen_emb> ends the answer.

    >>> split_response("<think>A ring, so it is red.</think><answer>A red ring.<gen_emb>")
    ('A ring, so it is red.', 'A red ring.')
    >>> split_response("It is red because it is a ring.")
    """
    text = _GENERATIVE.sub("", text)
    thoughts = _THOUGHTS.match(text)
    rest = text[thoughts.end() :] if thoughts else text
    tagged = _TAGGED.search(rest)
    if tagged:
        before = thoughts[1] if thoughts else rest[: tagged.start()]
        return before.strip(), tagged[2].strip()
    return (thoughts[1].strip(), rest.strip()) if thoughts else None


def rewrite_in(text: str) -> str:
    """Return the rewrite in an answer, on one line, without thoughts, tags, quotes and a title before it.

    >>> rewrite_in('<think>Hm.</think> Rewrite: "A red ring,\\nleft of a star."')
    'A red ring, left of a star.'
    """
    split = split_response(text)
    text = _PREFIX.sub("", split[1] if split else text).strip()
    for first, last in _QUOTES:
        inner = text[1:-1]
        if (
            len(text) > 1
            and text[0] == first
            and text[-1] == last
            and first not in inner
            and last not in inner
        ):
            text = inner.strip()
    return text if _is_listed(text) else " ".join(text.split())


def _is_listed(text: str) -> bool:
    """Return whether line breaks mean something, so that the filter of the format must see them."""
    return bool(LIST.search(text))


#: A line that begins like a list, a heading, a table, a code block or JSON.
LIST = re.compile(r"^[ \t]*(?:[-*\u2022]\s|\d+[.)]\s|#{1,6}\s|\||```|[{\[]\s*(?:[\"{\[]|$))", re.M)
