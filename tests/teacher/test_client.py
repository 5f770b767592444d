"""An endpoint with faults: each has a name, is tried again if that helps, and nothing waits without end."""

from __future__ import annotations

import email.utils
import gzip
import time
from pathlib import Path
from typing import Any

import pytest

from rime_pl.errors import RimeError
from rime_pl.teacher import client
from rime_pl.teacher.cache import Answer
from rime_pl.teacher.client import Client, Failure
from rime_pl.teacher.request import Request, make_request
from rime_pl.teacher.settings import Teacher
from rime_pl.types import Item
from tests.teacher.endpoint import Behaviour, Endpoint, Reply, answer, fault, serving, words_in

HALF = Reply(body=answer("A red ring.").body, missing=40)
#: 100 kB that are unpacked to 100 MB.
BOMB = Reply(body=gzip.compress(bytes(100_000_000)), headers={"Content-Encoding": "gzip"})
GARBAGE = Reply(body=b"<html>gateway</html>")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(behaviour: Behaviour, count: int = 1, **settings: Any) -> tuple[list[Any], Client, Endpoint]:
    """The answers and failures of ``count`` requests, in the order of the requests."""
    with serving(behaviour) as endpoint:
        quick = {"timeout": 5.0, "retries": 2, **settings}
        teacher = Teacher(model="teacher", base_url=endpoint.url, **quick)
        one, results = Client(teacher), {}

        def keep(request: Request, result: Answer | Failure) -> None:
            assert request.name not in results, "each request has one end"
            results[request.name] = result

        names = [str(number) for number in range(count)]
        one.ask((make_request(Item(name), name, "Rewrite.", teacher) for name in names), keep, keep)
        return [results[name] for name in names], one, endpoint


def first(reply: Reply) -> Behaviour:
    """One bad reply, then good ones."""
    return lambda body, number: answer("A red ring.") if number else reply


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (fault(429, retry_after="0.01"), "rate limit (429)"),
        (fault(429), "rate limit (429)"),
        (fault(500), "server error (500)"),
        (fault(503, retry_after="soon"), "server error (503)"),
        (fault(408), "server error (408)"),
        (GARBAGE, "garbled response"),
        (Reply(body=b""), "garbled response"),
        (Reply(body=b'{"choices": [{"message": {"content": "A r'), "garbled response"),
        (HALF, "half a response"),
        (Reply(body=b"{" * 3_000_000), "garbled response"),
        (BOMB, "garbled response"),
        (Reply(body=BOMB.body[:5000], headers=BOMB.headers), "garbled response"),
        (Reply(body=b"no gzip", headers=BOMB.headers), "half a response"),
        (Reply(hangs=1.0), "time-out"),
        (Reply(trickles=True), "time-out"),
    ],
)
def test_a_passing_fault_is_tried_again_and_counted(reply: Reply, kind: str) -> None:
    timeout = 0.5 if kind == "time-out" else 5.0
    results, one, endpoint = ask(first(reply), timeout=timeout)
    assert results == [Answer("A red ring.", "stop", 100, 20)]
    assert one.faults == {kind: 1} and len(endpoint.bodies) == 2


@pytest.mark.parametrize(
    ("reply", "kind", "tries"),
    [
        (fault(500, "overloaded"), "server error (500)", 3),
        (fault(429, "slow down", retry_after="0.01"), "rate limit (429)", 3),
        (GARBAGE, "garbled response", 3),
        (HALF, "half a response", 3),
        (Reply(hangs=0.5), "time-out", 3),
        (fault(400, "picture is too small"), "refused (400)", 1),
        (fault(422, "no"), "refused (422)", 1),
    ],
)
def test_a_lasting_fault_is_a_failure_with_its_name(reply: Reply, kind: str, tries: int) -> None:
    began = time.monotonic()
    (failure,), one, endpoint = ask(lambda body, number: reply, timeout=0.1 if reply.hangs else 5.0)
    assert isinstance(failure, Failure) and failure.kind == kind
    assert len(endpoint.bodies) == tries and one.faults == {kind: tries}
    assert time.monotonic() - began < 5
    if kind.startswith("refused"):
        assert "picture is too small" in failure.says or "no" in failure.says


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (fault(401, "bad key"), r"refuses every request \(401\): .*bad key.*--teacher.key_variable"),
        (fault(403), r"refuses every request \(403\)"),
        (fault(404, "no such model"), r"\(404\): .*no such model.*--teacher.model"),
        (fault(429, "pay", code="insufficient_quota"), r"has no credit left: .*pay"),
        (fault(429, retry_after="86400"), r"asks for a pause of 86400 s \(429\)"),
    ],
)
def test_what_no_repetition_can_help_stops_at_once(reply: Reply, message: str) -> None:
    asked = []

    def behaviour(body: dict[str, Any], number: int) -> Reply:
        asked.append(number)
        return reply

    with pytest.raises(RimeError, match=message):
        ask(behaviour, count=50, concurrency=2)
    assert len(asked) <= 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_a_stop_and_takes_nothing_to_another_address(status: int) -> None:
    with serving(lambda body, number: answer("A ring.")) as other:
        reply = Reply(status, b"", {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(RimeError, match=rf"sends requests on to {other.url}.* \({status}\).*base_url"):
            ask(lambda body, number: reply, count=20)
        assert not other.bodies and not other.keys
    with pytest.raises(RimeError, match=r"an address that it does not name \(304\)"):
        ask(lambda body, number: Reply(304))


def test_an_endless_response_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LARGEST", 100)
    (failure,), one, _ = ask(lambda body, number: answer("A ring. " * 100), retries=1)
    assert failure.kind == "garbled response" and "it has more than 100 bytes" in failure.says
    assert one.faults == {"garbled response": 2}


def test_nobody_listens() -> None:
    teacher = Teacher(model="teacher", base_url="http://127.0.0.1:9/v1", retries=1, timeout=5.0)
    found: list[Failure] = []
    requests = iter([make_request(Item("a"), "a", "Rewrite.", teacher)])
    Client(teacher).ask(requests, lambda request, result: None, lambda request, result: found.append(result))
    assert [failure.kind for failure in found] == ["no connection"]


def test_requests_are_concurrent_up_to_the_limit() -> None:
    def behaviour(body: dict[str, Any], number: int) -> Reply:
        return Reply(body=answer("A red ring.").body, hangs=0.05)

    results, _, endpoint = ask(behaviour, count=12, concurrency=4)
    assert len(results) == 12 and endpoint.most_at_once == 4
    assert sorted(words_in(body) for body in endpoint.bodies) == sorted(f"Text: {n}" for n in range(12))


def test_a_rate_is_kept() -> None:
    *_, endpoint = ask(lambda body, number: answer("A ring."), 6, concurrency=6, requests_per_minute=1200)
    gaps = [after - before for before, after in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert endpoint.times[-1] - endpoint.times[0] > 0.9 * 5 * 0.05, gaps


def test_a_pause_that_the_endpoint_asks_for_holds_for_all() -> None:
    def behaviour(body: dict[str, Any], number: int) -> Reply:
        return fault(429, retry_after="0.4") if number == 0 else answer("A ring.")

    results, _, endpoint = ask(behaviour, count=8, concurrency=1)
    assert len(results) == 8 and endpoint.times[1] - endpoint.times[0] >= 0.35


def test_a_pause_may_be_a_date() -> None:
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (client._retry_after({"retry-after": later}) or 0) <= 31
    assert client._retry_after({"retry-after": "yesterday"}) is client._retry_after({}) is None
    assert client._retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert (
        client._retry_after({"retry-after": "-3"}) == 0.0
        and client._retry_after({"retry-after": "nan"}) is None
    )


def test_the_fields_of_a_request() -> None:
    *_, endpoint = ask(lambda body, number: answer("A ring."))
    assert endpoint.bodies[0].keys() == {"model", "messages", "max_tokens"}
    more = {
        "token_field": "max_completion_tokens",
        "temperature": 0.5,
        "extra": '{"seed": 7}',
        "max_tokens": 9,
    }
    *_, endpoint = ask(lambda body, number: answer("A ring."), **more)
    body = endpoint.bodies[0]
    assert (body["max_completion_tokens"], body["temperature"], body["seed"]) == (9, 0.5, 7)
    assert "max_tokens" not in body


def test_a_key_is_sent_only_where_it_is_named_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    *_, endpoint = ask(lambda body, number: answer("A ring."))
    assert endpoint.keys == ["Bearer none"], "the key of OpenAI goes to OpenAI only"
    *_, endpoint = ask(lambda body, number: answer("A ring."), key_variable="MY_KEY")
    assert endpoint.keys == ["Bearer sk-mine"]
    (failure,), *_ = ask(lambda body, number: fault(400, "sk-mine is no good"), key_variable="MY_KEY")
    assert "*** is no good" in failure.says and "sk-mine" not in failure.says
    with pytest.raises(RimeError, match=r"\*\*\* is wrong") as error:
        ask(lambda body, number: fault(401, "sk-mine is wrong"), key_variable="MY_KEY")
    assert "sk-mine" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(
        RimeError, match="The variable OPENAI_API_KEY of the environment must hold the API key"
    ):
        Client(Teacher(model="teacher"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9")
    with pytest.raises(RimeError, match="OPENAI_API_KEY of the environment must hold an API key in ASCII"):
        Client(Teacher(model="teacher"))


def test_a_picture_that_cannot_be_decoded_is_a_failure_and_costs_no_request(tmp_path: Path) -> None:
    with serving(lambda body, number: answer("A ring.")) as endpoint:
        teacher = Teacher(model="teacher", base_url=endpoint.url)
        request = Request("key", "Rewrite.", "", (b"\x89PNG",), "pair 3 (query)", "", 1)
        found: list[Failure] = []
        Client(teacher).ask(iter([request]), lambda *_: None, lambda _, failure: found.append(failure))
    assert found[0].kind == "unusable picture" and "pair 3 (query)" in found[0].says and not endpoint.bodies


def test_an_error_of_ours_is_not_taken_for_a_fault() -> None:
    def explode(request: Request, result: Any) -> None:
        raise ZeroDivisionError

    with serving(lambda body, number: answer("A ring.")) as endpoint:
        teacher = Teacher(model="teacher", base_url=endpoint.url, concurrency=3)
        requests = (make_request(Item(str(n)), str(n), "Rewrite.", teacher) for n in range(9))
        with pytest.raises(ZeroDivisionError):
            Client(teacher).ask(requests, explode, explode)
