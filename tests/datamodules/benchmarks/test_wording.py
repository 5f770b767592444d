"""Official texts letter for letter, and the same words in our places."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rime_pl.datamodules.benchmarks.options import ReadOptions
from rime_pl.datamodules.benchmarks.wording import Layout, item_of, official_text, without_mark
from rime_pl.prompts import PromptConfig, chat_prompt, picture_slot

OFFICIAL = [
    ("picture query", "Which?", "", "\nWhich?\n"),
    ("picture query", "Which?", "a \nb \n", "\nWhich? a\nb\n\n"),
    ("text query", "Find:", "a", "Find: a\n"),
    ("text query", "Find:", "", "Find: \n"),
    ("dialogue query", "Find:", "a", "Find: a\n\n"),
    ("picture", "Show: ", "a", "\nShow:  a\n"),
    ("picture", "Show. ", None, "\nShow. \n"),
    ("picture", "Show:", "", "\nShow: \n"),  # of captions, the first decides; others may be empty
    ("crop", "Show.", None, "\nShow."),
    ("clip", "Say. ", None, " Say. "),
    ("clip", "Ask: ", "a", " Ask:  a"),
    ("words", "Find:", "a", "Find: a"),
    ("words", "Find:", "", "Find:"),
    ("raw", "", " a\n", " a\n"),
    ("raw", "", None, ""),
]


@pytest.mark.parametrize(("layout", "instruction", "text", "says"), OFFICIAL)
def test_the_official_text(layout: Any, instruction: str, text: str | None, says: str) -> None:
    assert official_text(layout, instruction, text) == says
    item = item_of(ReadOptions("official"), layout, instruction, text)
    assert (item.instruction, item.text) == ("", says)
    parts = item_of(ReadOptions(), layout, instruction, text)
    raw = layout == "raw"
    assert (parts.instruction, parts.text) == (
        ("", says) if raw else (instruction.strip(), (text or "").strip())
    )


def test_every_layout_has_a_test() -> None:
    assert {layout for layout, *_ in OFFICIAL} == set(get_args(Layout))


@pytest.mark.parametrize(
    ("stored", "instruction"),
    [
        ("<|image_1|>\nRepresent it. ", "Represent it. "),
        ("<|image_1|>Represent it.", "Represent it."),
        ("Represent it.", "Represent it."),
        ("", ""),
    ],
)
def test_the_mark_of_a_picture_is_dropped(stored: str, instruction: str) -> None:
    assert without_mark(stored) == instruction


def test_the_official_text_follows_the_picture_in_our_prompt() -> None:
    """Mark, newline, words, newline: our prompt puts the places of media directly before the text."""
    text = official_text("picture query", "Which?", "a or b")
    prompt = chat_prompt(PromptConfig(), text, "", [picture_slot(1)])
    assert f"{picture_slot(1)}\nWhich? a or b\n" in prompt
