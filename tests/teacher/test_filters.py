"""Each filter: what it drops, by name, and the nearest text that it keeps."""

from __future__ import annotations

import time

import pytest

from rime_pl.teacher import wording
from rime_pl.teacher.cache import Answer
from rime_pl.teacher.filters import Verdict, judge, num_sentences, words_of
from rime_pl.teacher.settings import Filters

PROMPT = wording.prompt("query", 128, False)
INSTRUCTION = "Find the picture of the same town by night."


def verdict(text: str, finish: str = "stop", **limits: int) -> Verdict:
    return judge(Answer(text, finish), PROMPT, INSTRUCTION, Filters(**limits))


@pytest.mark.parametrize(
    "text",
    [
        "A red ring.",
        "An umbrella",
        'A woman in a coat holds an umbrella. Behind her is St. Paul\'s, 3.5 km away. The sign says "Exit".',
        "Sorry is the name of a board game with red, blue, green and yellow pieces.",
        "The paper compares a language model with the user interface of a query editor.",
        "Circles, from left to right: a red one, a blue one, a red one, a green one.",
        "Zwei rote Kreise und ein Stern, links oben.",
        "\u8d64\u3044\u8f2a\u306e\u5de6\u306b\u9752\u3044\u661f\u304c\u3042\u308b\u3002",
        "Bora Bora is an island.",
        "Rates of 5 < 7 and 9 > 8 are shown in [1].",
        "1984 is a novel by George Orwell.",
    ],
)
def test_good_rewrites_pass_as_they_are(text: str) -> None:
    assert verdict(text) == Verdict(text)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("", "stop", "no words"),
        (" ... ", "stop", "no words"),
        ("A red ring.", "content_filter", "the answer ended with 'content_filter'"),
        ("I cannot do that.", "refusal", "the answer ended with 'refusal'"),
        ("I'm sorry, but I can\u2019t see it.", "stop", "a refusal"),
        ("Unfortunately, I do not know this town.", "stop", "a refusal"),
        ("- a ring\n- a star", "stop", "a list"),
        ("1. A ring.\n2. A star.", "stop", "a list"),
        ("# Ring\nIt is red.", "stop", "a list"),
        ("```\na ring\n```", "stop", "a list"),
        ('{"rewrite": "a ring"}', "stop", "a list"),
        ("| ring | red |", "stop", "a list"),
        ("A ring. A star. A box. A cup.", "stop", "4 sentences, at most 3"),
        ("A ring \ud83d.", "stop", "control characters"),
        ("A ring \x07 here.", "stop", "control characters"),
    ],
)
def test_format(text: str, finish: str, reason: str) -> None:
    found = verdict(text, finish)
    assert found.rewrite is None and found.dropped_by == "format" and found.reason.startswith(reason), found


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("Ring.", "stop", "1 words, at least 2"),
        ("A woman in a red", "length", "cut off at --teacher.max_tokens"),
        ("", "length", "cut off at --teacher.max_tokens"),
        ("word " * 3 + "x" * 500, "stop", "about 129 tokens, at most 128"),
    ],
)
def test_length(text: str, finish: str, reason: str) -> None:
    found = verdict(text, finish)
    assert found.rewrite is None and found.dropped_by == "length" and found.reason.startswith(reason), found


def test_limits_are_the_users() -> None:
    assert verdict("Ring.", min_words=1).rewrite == "Ring."
    assert verdict("A ring. A star. A box. A cup.", max_sentences=4).rewrite
    assert verdict("A ring that is red.", max_rewrite_tokens=4).dropped_by == "length"


@pytest.mark.parametrize(
    "text",
    [
        "a red ring on a box and a red ring on a table and a red ring on a chair",
        "The town is very very very very old.",
        "The town is old. It has a tower. The town is old.",
    ],
)
def test_repetition(text: str) -> None:
    assert verdict(text).dropped_by == "repetition"
    assert verdict("a red ring on a box and a red ring on a table").rewrite


@pytest.mark.parametrize(
    "text",
    [
        "As an AI, one sees a ring.",
        "As a language model I see a ring.",
        "Here is the rewrite: a red ring.",
        "The user wants a red ring.",
        "This query asks for a ring.",
        "Let me think about the ring.",
        "Sure, a red ring.",
        "A red ring.<|im_end|>",
        "A red <gen_emb> ring.",
        "<image> A red ring.",
        "A red ring </s>",
        "They must be understood without the picture and without the text, a ring.",
        "Find the picture of the same town by night, with a tower.",
    ],
)
def test_leakage(text: str) -> None:
    assert verdict(text).dropped_by == "leakage", text


def test_a_short_instruction_is_everyday_language() -> None:
    told = Answer("Apply the change to a red ring.")
    assert judge(told, PROMPT, "Apply the change.", Filters()).rewrite == "Apply the change to a red ring."


def test_a_reason_shows_the_answer() -> None:
    assert verdict("Ring.").reason == "1 words, at least 2 (--filters.min_words): 'Ring.'"


@pytest.mark.parametrize(
    "text", ["x", "a\n", "\n", "ab ", "<", "a.", "!", "<answer>", "<think>", '"', "(", "* "]
)
def test_a_hostile_answer_takes_no_time(text: str) -> None:
    began = time.process_time()
    many = text * (2_000 // len(text)) + "x"
    for answer in (many, f"a{many}", f"{many * 45}x", f"a{many * 45}", many * 100):
        judge(Answer(answer), PROMPT, INSTRUCTION, Filters(max_rewrite_tokens=40_000))
        judge(Answer(answer), PROMPT, INSTRUCTION, Filters())
    assert verdict(many * 100).dropped_by == "length" and time.process_time() - began < 2.0


def test_words_and_sentences() -> None:
    assert words_of("\u8d64\u3044\u661f ok_1") == ["\u8d64", "\u3044", "\u661f", "ok", "1"]
    assert num_sentences("Mr. X sees it. Dr. Y too!") == 2 and num_sentences("e.g. a ring, 3.5 cm") == 1
    assert num_sentences("\u661f\u3067\u3059\u3002\u8d64\u3044\u3002") == 2
