"""What a teacher is sent: one side and nothing of the other, pictures that fit, one key for equal content."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rime_pl.errors import DataError, RimeError
from rime_pl.teacher import wording
from rime_pl.teacher.request import Request, data_url, make_request
from rime_pl.teacher.settings import Teacher
from rime_pl.types import Item
from tests.teacher.pairs import SECRET, pair, picture

TEACHER = Teacher(model="teacher", base_url="http://127.0.0.1:9")


def request(item: Item, teacher: Teacher = TEACHER, system: str = "Rewrite.", thoughts: str = "") -> Request:
    return make_request(item, "it", system, teacher, thoughts)


def shown(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_request_for_a_query_holds_nothing_of_its_target() -> None:
    query, target = pair(1).query, pair(1).target
    assert query is not None
    sent = json.dumps(request(query, thoughts=query.cot or "").messages(10_000))
    assert "Which town is number 1?" in sent and "Answer." in sent
    assert SECRET not in sent and query.content_id not in sent
    assert SECRET in json.dumps(request(target).messages(10_000))


def test_the_prompts_of_the_sides_differ_and_ask_for_a_rewrite() -> None:
    query, target = wording.prompt("query", 128, False), wording.prompt("target", 128, False)
    assert query != target and "75 words" in query and "75 words" in target
    assert "thoughts" not in query and "thoughts" in wording.prompt("query", 128, True)


def test_a_prompt_of_the_user(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\ufeffSay it short.\n")
    assert wording.prompt("query", 128, False, own) == "Say it short."
    own.write_text(" \n")
    with pytest.raises(RimeError, match=r"--teacher.query_prompt must hold a prompt, but .*own.txt is empty"):
        wording.prompt("query", 128, False, own)
    for wrong in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(RimeError, match=r"--teacher.target_prompt must be a text file"):
            wording.prompt("target", 128, False, wrong)


def test_pictures_come_first_and_are_scaled_down_to_the_limit() -> None:
    item = Item("Make it night.", (picture(1, size=(400, 100)), picture(2, "JPEG")), instruction="Find it.")
    content = request(item).messages(10_000)[1]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == "Task: Find it.\nText: Make it night."
    large, small = (shown(part["image_url"]["url"]) for part in content[:2])
    assert large.size == (200, 50) and small.size == (12, 9) and large.mode == "RGB"


def test_a_text_alone_is_sent_as_a_plain_string() -> None:
    assert request(Item("A red ring.")).messages(10_000) == [
        {"role": "system", "content": "Rewrite."},
        {"role": "user", "content": "Text: A red ring."},
    ]


def test_a_transparent_picture_is_sent_on_white_and_a_broken_one_is_named() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(buffer, "PNG")
    low = min(low for low, _ in shown(data_url(buffer.getvalue(), 10_000, "it")).getextrema())  # type: ignore[misc]
    assert low > 250
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "JPEG")
    with pytest.raises(DataError, match="it is cut off"):
        data_url(noise.getvalue()[:900], 10_000, "it")


def test_equal_content_has_one_key_and_all_that_decides_an_answer_changes_it() -> None:
    item = Item("A ring.", (picture(1),), "content", "Find it.")
    key = request(item).key
    assert request(replace(item, content_id="other", media=(picture(1),), rewrite="x")).key == key
    others = [
        request(replace(item, text="A star.")),
        request(replace(item, instruction="Name it.")),
        request(replace(item, media=(picture(2),))),
        request(replace(item, media=())),
        request(item, system="Describe."),
        request(item, thoughts="It is round."),
        *(
            request(item, replace(TEACHER, **change))
            for change in (
                {"model": "other"},
                {"max_tokens": 9},
                {"temperature": 0.5},
                {"max_pixels": 5000},
                {"extra": '{"seed": 1}'},
            )
        ),
    ]
    assert len({key, *(other.key for other in others)}) == len(others) + 1
    same = [{"retries": 0}, {"concurrency": 1}, {"base_url": "http://127.0.0.1:10"}, {"timeout": 1.0}]
    assert {request(item, replace(TEACHER, **change)).key for change in same} == {key}


def test_the_estimate_counts_the_tokens_of_pictures() -> None:
    plain = request(Item("A ring."))
    with_one = request(Item("A ring.", (picture(1, size=(280, 280)),)))
    assert with_one.prompt_tokens - plain.prompt_tokens == 100
    assert request(Item("A ring.", (picture(1, size=(3000, 3000)),))).prompt_tokens < 1400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost:8000"}, "--teacher.base_url must be an address such as"),
        ({"base_url": "http://[::1/v1"}, "--teacher.base_url must be an address such as"),
        ({"base_url": "http://host:99999/v1"}, "--teacher.base_url must be an address such as"),
        ({"base_url": "http://host/a\nb"}, "--teacher.base_url must be an address such as"),
        ({"base_url": "http://me:word@host/v1"}, "--teacher.base_url must not hold a password"),
        ({"extra": "{"}, "--teacher.extra must be a JSON object, but is not JSON"),
        ({"extra": "[1]"}, "--teacher.extra must be a JSON object, but is '\\[1\\]'"),
        ({"extra": '{"model": "x"}'}, "--teacher.extra must not hold 'model'"),
        ({"concurrency": 0}, "teacher.concurrency must be 1 or more, but is 0"),
        ({"timeout": 0.0}, "teacher.timeout must be greater than 0"),
        ({"max_failed_share": -0.1}, "teacher.max_failed_share must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(RimeError, match=message):
        replace(TEACHER, **change)  # type: ignore[arg-type]
