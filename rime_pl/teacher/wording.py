"""The words that a teacher is given: one prompt for each side, and how an item is put before it.

Called by request.py and jobs.py. docs/how-to/rewrites-by-a-teacher.md tells people what a good rewrite is.
"""

from __future__ import annotations

from pathlib import Path

from rime_pl.errors import RimeError
from rime_pl.types import Item, Side

_COMMON = """\
Write one to three complete sentences, at most {words} words. They must be understood without the picture \
and without the text that you are given. Use plain, concrete words. Begin with what matters most. Copy \
names, numbers and short texts exactly if they tell this one from similar ones. Write in English, but keep \
names and quotations as they are. Do not explain, do not list steps, do not address anybody, do not guess \
what cannot be known, and do not write about the task itself. Reply with the sentences only."""
_OF_SIDE: dict[Side, str] = {
    "query": """\
You help a search engine. You get one query: a task, a text, pictures, or several of these. Describe the \
item that answers it, as if you had it before you. Work out first, silently, what is asked: resolve who or \
what a word refers to, carry out a comparison, a count or a requested change, and name the result. The \
answer has to stand in your sentences, never only the question. """,
    "target": """\
You help a search engine. You get one item of a collection: a text, pictures, or both, sometimes with a \
task that says how to look at it. Describe this item so that whoever looks for it finds it: what it is or \
says, its main parts, their kind, number, colour and place, what happens, and what is written in it if it \
can be read. """,
}
_DISTIL = """\
Someone has thought about it before you, and you get these thoughts, too. They are long and may contain \
detours. Keep their result and the facts that lead to it, and nothing of how they got there. """


def prompt(side: Side, max_rewrite_tokens: int, distil: bool, own: Path | None = None) -> str:
    """Return what the teacher is told before it sees an item.

    Args:
        side: Which side the item is on.
        max_rewrite_tokens: Largest number of tokens of a rewrite.
        distil: Whether the teacher also gets a chain of thought.
        own: Text file of the user in the place of our words.

    Raises:
        RimeError: If that file cannot be read or is empty.
    """
    if own is None:
        words = max(
            5, int(max_rewrite_tokens * 0.6) // 5 * 5
        )  # a word has about 1.3 tokens, and room is left
        return _OF_SIDE[side] + (_DISTIL if distil else "") + _COMMON.format(words=words)
    try:
        text = own.read_text(encoding="utf-8-sig").strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise RimeError(f"--teacher.{side}_prompt must be a text file in UTF-8, but {own} is not.") from error
    if not text:
        raise RimeError(f"--teacher.{side}_prompt must hold a prompt, but {own} is empty.")
    return text


def about(item: Item, thoughts: str = "") -> str:
    """Return an item in words, behind its pictures.

    >>> print(about(Item("Make it night.", instruction="Find the changed picture.")))
    Task: Find the changed picture.
    Text: Make it night.
    """
    parts = (("Task", item.instruction), ("Text", item.text), ("Thoughts", thoughts))
    return "\n".join(f"{name}: {text.strip()}" for name, text in parts if text.strip())
