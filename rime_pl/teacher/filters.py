"""Decides which answers become rewrites: format, length, repetition and leakage, each with a reason.

The measured gain is the fifth filter; it needs a model, so gains.py has it. jobs.py calls this for each
answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rime_pl.teacher.cache import Answer
from rime_pl.teacher.responses import LIST, rewrite_in
from rime_pl.teacher.settings import CHARACTERS, Filters

#: The filters in the order in which they are tried; an answer counts for the first that drops it.
NAMES = ("format", "length", "repetition", "leakage", "gain")
_LONGEST = 100_000  # characters of an answer that is looked at, thoughts included
_N = 4  # words in a row that may be repeated only so often
_WHOLE = 5  # words of an instruction that is copied as a whole; shorter ones are everyday language
_RUN = 4  # times that one word may not follow itself
_MARKS = ".!?\u3002\uff01\uff1f"
_ENDS = re.compile(rf"(?<![{_MARKS}])[{_MARKS}]++[\"')\u201d\u300d]*+(?=\s|$|[\u3040-\u9fff])")
_BEFORE = re.compile(r"[\w.]*$")
_WORD = 12  # characters before an end that are looked at: no abbreviation is longer
_ABBREVIATIONS = frozenset(
    (
        "mr",
        "mrs",
        "ms",
        "dr",
        "st",
        "no",
        "nos",
        "vs",
        "etc",
        "fig",
        "e.g",
        "i.e",
        "u.s",
        "approx",
        "jr",
        "prof",
    )
)
#: A word, or a character of a script that puts no spaces between words.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff]|[^\W_\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff]+"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'|\u2019)?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:'|\u2019)?t |i cannot |i can not "
    r"|i(?:'|\u2019)?m (?:unable|not able)|i am (?:unable|not able)|unfortunately, i )",
    re.I,
)
#: Words about the conversation, which are no content.
_META = re.compile(
    r"\bas an? (?:ai\b|(?:large )?language model\b)|\bmy instructions\b"
    r"|\b(?:here is|here(?:'|\u2019)s|here are|below is) (?:the|a|my|your) "
    r"(?:rewrite|rewritten|description|answer)\b"
    r"|\bthe (?:rewrite|rewritten \w+) (?:is|should|would|must)\b|\bthis (?:query|rewrite|prompt)\b"
    r"|\bthe (?:query|user|prompt|task) (?:asks|asked|wants|seeks|is asking|is looking)\b"
    r"|\b(?:let me|let(?:'|\u2019)s|i will|i(?:'|\u2019)ll|i need to|i should|we need to) "
    r"(?:think|write|rewrite|describe|look)\b"
    r"|^\W*(?:certainly|of course|sure)[!,]",
    re.I,
)
#: Special tokens of models and tags of training data; none of them may come into a text.
_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|<\uff5c[^<>\n]{1,40}\uff5c>|</?(?:think|thinking|answer|rewrite|image|video|s|bos|eos|pad|unk"
    r"|tool_call|disc_emb|gen_emb|start_of_turn|end_of_turn|image_\d+)>|\[/?INST\]|\[IMG\w*\]",
    re.I,
)


@dataclass(frozen=True)
class Verdict:
    """What has become of an answer."""

    rewrite: str | None  # None: dropped
    dropped_by: str = ""  # a name of ``NAMES``
    reason: str = ""


def judge(answer: Answer, prompt: str, instruction: str, filters: Filters) -> Verdict:
    """Return the rewrite in an answer, or the filter that drops it.

    Args:
        answer: Of the teacher.
        prompt: What the teacher was told.
        instruction: That of the item's task.
        filters: Limits.
    """
    if len(answer.text) > _LONGEST:
        return Verdict(None, "length", f"{len(answer.text):,} characters: {answer.text[:60]!r}")
    rewrite = rewrite_in(answer.text)
    if len(rewrite) > 4 * CHARACTERS * filters.max_rewrite_tokens:  # the other filters would read all of it
        return Verdict(None, "length", f"{next(_length(rewrite, '', filters))}: {rewrite[:60]!r}")
    for name, reasons in (
        ("format", _format(rewrite, answer.finish, filters)),
        ("length", _length(rewrite, answer.finish, filters)),
        ("repetition", _repetition(rewrite, filters)),
        ("leakage", _leakage(rewrite, prompt, instruction, filters)),
    ):
        if reason := next(reasons, None):
            return Verdict(None, name, f"{reason}: {rewrite!r:.90}")
    return Verdict(rewrite)


def words_of(text: str) -> list[str]:
    """Return the words in small letters.

    >>> words_of("A red-hot ring (2).")
    ['a', 'red', 'hot', 'ring', '2']
    """
    return [word.lower() for word in _WORDS.findall(text)]


def num_sentences(text: str) -> int:
    """Return the number of sentences; abbreviations and numbers end none.

    >>> num_sentences('Dr. No has 3.5 points. "He wins."'), num_sentences("A ring")
    (2, 1)
    """
    ends = [match for match in _ENDS.finditer(text) if _before(text, match.start()) not in _ABBREVIATIONS]
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(words_of(rest))


def _before(text: str, end: int) -> str:
    """Return the word that ends at a place, in small letters."""
    found = _BEFORE.search(text[max(0, end - _WORD) : end])
    return found.group().lower() if found else ""


def _format(rewrite: str, finish: str, filters: Filters) -> Iterator[str]:
    if finish not in ("stop", "length", "eos"):
        yield f"the answer ended with {finish!r}"
    if not words_of(rewrite) and finish != "length":
        yield "no words"
    if _CONTROL.search(rewrite):
        yield "control characters or broken text"
    if _REFUSAL.search(rewrite):
        yield "a refusal"
    if LIST.search(rewrite):
        yield "a list, a heading, a table, code or JSON"
    if (count := num_sentences(rewrite)) > filters.max_sentences:
        yield f"{count} sentences, at most {filters.max_sentences} (--filters.max_sentences)"


def _length(rewrite: str, finish: str, filters: Filters) -> Iterator[str]:
    if finish == "length":
        yield "cut off at --teacher.max_tokens"
    if (count := len(words_of(rewrite))) < filters.min_words:
        yield f"{count} words, at least {filters.min_words} (--filters.min_words)"
    if (tokens := -(-len(rewrite) // CHARACTERS)) > filters.max_rewrite_tokens:
        yield f"about {tokens} tokens, at most {filters.max_rewrite_tokens} (--filters.max_rewrite_tokens)"


def _repetition(rewrite: str, filters: Filters) -> Iterator[str]:
    words = words_of(rewrite)
    rows = Counter(_rows(words, _N))
    if rows and (most := rows.most_common(1)[0])[1] > filters.max_repeats:
        yield f"{' '.join(most[0])!r} {most[1]} times (--filters.max_repeats)"
    if run := next((row for row in _rows(words, _RUN) if len(set(row)) == 1), None):
        yield f"{run[0]!r} {_RUN} times in a row"
    sentences = Counter(tuple(words_of(part)) for part in re.split(f"[{_MARKS}]", rewrite))
    if twice := next((each for each, count in sentences.items() if count > 1 and len(each) > 2), None):
        yield f"the same sentence twice ({' '.join(twice)!r:.60})"


def _leakage(rewrite: str, prompt: str, instruction: str, filters: Filters) -> Iterator[str]:
    if token := _SPECIAL.search(rewrite):
        yield f"the special token {token.group()!r}"
    if said := _META.search(rewrite):
        yield f"words about the conversation ({said.group()!r})"
    for source, text in (("prompt", prompt), ("instruction", instruction)):
        told = words_of(text)
        length = min(filters.copied_words, max(_WHOLE, len(told)))
        if copied := set(_rows(words_of(rewrite), length)).intersection(_rows(told, length)):
            yield f"{length} words in a row of the {source} ({' '.join(min(copied))!r:.60})"


def _rows(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)
