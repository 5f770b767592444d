"""What a reader meets is in plain words: README, docs, configs, Makefile and source.

Words that we replaced do not come back, links lead somewhere, and numbers have a leading zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: These two name old words on purpose: the one defines words, the other keeps a dated record.
FREE = {ROOT / "docs/glossary.md", ROOT / "docs/results/log.md"}
#: What to say in the place of a word; upper and lower case count as equal.
REPLACED = {
    "ancestor": "UME-R1 (arXiv 2511.00405)",
    "twins": "duplicates; in losses: false negatives",
    "yardstick": "scorer",
    "rehears": "simulate",
    "trace probe": "rewrite ablation",
    "trace_probe": "rewrite_ablation",
    "equations are not public": "say what we worked from",
    "equations not being public": "say what we worked from",
}
#: One distinctive piece of each sentence that had to be read twice.
UNCLEAR = (
    "What is RIME's own and what is ours",
    "What trains is float32, whatever the base is",
    "each with what all seeds made of it",
    "where annotation is dear",
    "compares with the others' in no way",
    "as a tie with a tendency",
    "with steps + rewrite, equal training steps",
    "minus disc-disc of training that alone",
    "Of each side one pass is",
    "Give back what nobody holds",
    "the passes over what was drawn, not the drawing",
    "alone is the reference, compared with itself",
    "is no share. Give",
    "runs of unlike numbers of steps",
    "takes its own first rows",
    "What a second reading found",
)
#: Between two words of a sentence: spaces, line breaks, comment signs and the seams of string literals.
GAP = r"""(?:\s|"|#|\bf(?="))+"""
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
BARE_NUMBER = re.compile(r"(?<![\w.\])/])\.\d")


def pages() -> list[Path]:
    """README and the other pages for people."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def texts() -> list[Path]:
    """All files that the words are searched in, each once."""
    source = [
        path
        for folder in ("rime_pl", "datamodules", "callbacks", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ]
    data = [*(ROOT / "docs").rglob("*.json"), *(ROOT / "configs").rglob("*.yaml"), ROOT / "Makefile"]
    return sorted({path.resolve() for path in (*pages(), *source, *data)} - FREE)


def spread(words: str) -> str:
    """The pattern of some words, also across lines and string literals."""
    return GAP.join(re.escape(word) for word in words.split(" "))


def found(pattern: str, path: Path, text: str) -> Iterator[str]:
    """Places where a pattern occurs, as ``file:line: words``."""
    for match in re.finditer(pattern, text, re.IGNORECASE):
        line = text.count("\n", 0, match.start()) + 1
        yield f"{path.relative_to(ROOT)}:{line}: {' '.join(match.group().split())}"


def without_code(text: str) -> str:
    """The page with blanks in the place of code, so that lines keep their numbers.

    >>> without_code("a `.5` b")
    'a      b'
    """
    return CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


@pytest.mark.parametrize("word", REPLACED)
def test_replaced_words_do_not_come_back(word: str) -> None:
    places = [place for path in texts() for place in found(spread(word), path, path.read_text())]
    assert not places, f"say {REPLACED[word]!r}:\n" + "\n".join(places)


@pytest.mark.parametrize("sentence", UNCLEAR)
def test_unclear_sentences_do_not_come_back(sentence: str) -> None:
    places = [place for path in texts() for place in found(spread(sentence), path, path.read_text())]
    assert not places, "\n".join(places)


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = LINK.findall(without_code(page.read_text()))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, f"{page.relative_to(ROOT)} links to files that do not exist: {dead}"


def test_numbers_have_a_leading_zero() -> None:
    pages_and_prose = [(page, without_code(page.read_text())) for page in pages()]
    places = [place for page, prose in pages_and_prose for place in found(BARE_NUMBER.pattern, page, prose)]
    assert not places, "write 0.738, not .738:\n" + "\n".join(places)


@pytest.mark.parametrize(
    ("prose", "bare"),
    [("from .70 to", True), ("|.70|", True), ("(.70)", True), ("+.70", True), ("0.70, v1.2 ../x", False)],
)
def test_a_bare_number_is_told_from_others(prose: str, bare: bool) -> None:
    assert bool(BARE_NUMBER.search(prose)) is bare


def test_a_sentence_is_found_across_lines_and_string_literals() -> None:
    text = 'raise RimeError(\n    f"data.annotated_share: {share} is no share. "\n    f"Give more."\n)'
    assert re.search(spread("is no share. Give"), text)
