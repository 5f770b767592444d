"""What comes back: an answer, or a named reason why there is none; and the rewrite in an answer."""

from __future__ import annotations

import json

import pytest

from rime_pl.teacher.cache import Answer
from rime_pl.teacher.responses import Garbled, read_response, rewrite_in, split_response
from tests.teacher.endpoint import answer


def test_a_good_response() -> None:
    assert read_response(answer("A ring.").body) == Answer("A ring.", "stop", 100, 20)
    assert read_response(answer("A ring.", usage=False).body) == Answer("A ring.")
    parts = [{"type": "text", "text": "A "}, {"type": "x"}, "no", {"type": "text", "text": "ring."}]
    assert read_response(answer(parts).body).text == "A ring."  # type: ignore[arg-type]
    assert read_response(answer(None, refusal="No.").body) == Answer("No.", "refusal", 100, 20)  # type: ignore[arg-type]
    assert read_response(answer(None, "length").body) == Answer("", "length", 100, 20)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>504</html>",
        b'{"choices": [{"mess',
        b"\xff\xfe",
        b"\xff\xfe{\0}\0",
        b'{"choices": NaN}',
        b'{"choices": "A red ring."}',
        b'{"choices": null}',
        b'{"choices": [[]]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": {"text": "A ring."}}}]}',
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"error": {"message": "overloaded"}}',
        b'{"choices": []}',
        b'{"choices": {"0": 1}}',
        b'{"choices": [3]}',
        b'{"choices": [{"message": "hello"}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
    ],
)
def test_garbage_has_one_name(body: bytes) -> None:
    with pytest.raises(Garbled):
        read_response(body)


def test_usage_that_is_none_is_not_believed() -> None:
    body = json.loads(answer("A ring.").body)
    for usage in ("x", [], {"prompt_tokens": -1, "completion_tokens": "9"}, {"prompt_tokens": True}):
        found = read_response(json.dumps({**body, "usage": usage}).encode())
        assert (found.prompt_tokens, found.completion_tokens) == (None, None)


@pytest.mark.parametrize(
    ("text", "rewrite"),
    [
        ("A ring.", "A ring."),
        ('"A ring."', "A ring."),
        ("\u201cA ring.\u201d", "A ring."),
        ('"A" and "B"', '"A" and "B"'),
        ("Rewrite: A ring.", "A ring."),
        ("**Answer**: A ring.", "A ring."),
        ("A ring.\n\nIt is red.", "A ring. It is red."),
        ("<think>Hm, a ring?</think>\n\nA ring.", "A ring."),
        ("Hm, a ring?</think>A ring.", "A ring."),
        ("<rewrite>A ring.</rewrite>", "A ring."),
        ("- a ring\n- a star", "- a ring\n- a star"),
    ],
)
def test_the_rewrite_in_an_answer(text: str, rewrite: str) -> None:
    assert rewrite_in(text) == rewrite


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("<think>T</think><answer>A<gen_emb>", ("T", "A")),
        ("<think>T</think>A<gen_emb><|im_end|>", ("T", "A")),
        ("T <answer>A</answer> more", ("T", "A")),
        ("<rewrite>A</rewrite>", ("", "A")),
        ("<think>T</think><answer>A", ("T", "A")),
        ("<think>T", None),
        ("Step. Step. A.", None),
        ("", None),
    ],
)
def test_thoughts_and_answer(text: str, split: tuple[str, str] | None) -> None:
    assert split_response(text) == split
