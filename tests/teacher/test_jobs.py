"""The work as a whole: what is asked and what is not, once for equal content, and when it is given up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rime_pl.errors import DataError, RimeError
from rime_pl.teacher import client
from rime_pl.teacher.gains import Gains
from rime_pl.teacher.jobs import Jobs
from rime_pl.teacher.meter import estimate, spent, state
from rime_pl.teacher.request import data_url, file_of
from rime_pl.teacher.settings import Price
from rime_pl.types import Item, Pair
from tests.teacher.endpoint import Behaviour, Endpoint, Reply, answer, fault, serving, words_in
from tests.teacher.pairs import SECRET, Listed, make_jobs, pair, picture

THINKS = "<think>The bridge has two towers, so it is Porto.</think><answer>A bridge in Porto.<gen_emb>"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)


def good(body: dict[str, Any], number: int) -> Reply:
    return answer(f"A town as in: {words_in(body).split('Text: ')[-1]}")


def done(source: Any, folder: Path, behaviour: Behaviour = good, **changes: Any) -> tuple[Jobs, Endpoint]:
    """All looked at and asked for."""
    with serving(behaviour) as endpoint:
        jobs = make_jobs(source, folder, endpoint.url, **changes)
        try:
            jobs.look()
            if jobs.missing:
                jobs.ask(lambda: None)
        finally:
            jobs.answers.close()
    return jobs, endpoint


def counts(jobs: Jobs) -> dict[str, dict[str, int]]:
    return {side: dict(ends) for side, ends in Gains(jobs).counts().items()}


def rewritten(pair: Pair, query: str | None, target: str | None) -> Pair:
    assert pair.query is not None
    return replace(
        pair, query=replace(pair.query, rewrite=query), target=replace(pair.target, rewrite=target)
    )


def test_each_side_gets_its_own_rewrite(tmp_path: Path) -> None:
    jobs, endpoint = done(Listed(pair(0), pair(1)), tmp_path)
    assert counts(jobs) == {"query": {"new rewrite": 2}, "target": {"new rewrite": 2}}
    assert jobs.rewrite(1, "query") == "A town as in: Which town is number 1?"
    assert jobs.rewrite(1, "target") == f"A town as in: {SECRET} 1"
    asked = [body for body in endpoint.bodies if "Which town" in str(body)]
    assert len(endpoint.bodies) == 4 and len(asked) == 2
    assert not any(SECRET in str(body) for body in asked), "whoever writes a query's rewrite sees no target"


def test_a_query_is_asked_about_without_the_picture_of_its_target(tmp_path: Path) -> None:
    shown, text = picture(1), Item("Make it night.")
    seen = Pair("k", "t", "g", replace(text, media=(picture(0),)), replace(text, text="", media=(shown,)))
    _, endpoint = done(Listed(seen, replace(seen, query=text)), tmp_path, sides=("query",))
    sent = [body["messages"][1]["content"] for body in endpoint.bodies]
    of_target = data_url(file_of(shown), 1_000_000, "it")
    assert len(sent) == 2 and of_target not in str(sent) and isinstance(min(sent, key=len), list)
    assert [part["type"] for part in min(sent, key=len)] == ["image_url", "text"]
    _, endpoint = done(Listed(seen), tmp_path, sides=("target",))
    assert of_target in str(endpoint.bodies), "it would have been recognised"


def test_equal_content_is_asked_for_once(tmp_path: Path) -> None:
    shared = replace(pair(1), target=pair(0).target)
    jobs, endpoint = done(Listed(pair(0), shared, pair(0)), tmp_path)
    assert len(endpoint.bodies) == 3 and counts(jobs)["target"] == {"new rewrite": 3}
    again, endpoint = done(Listed(pair(0), shared), tmp_path)
    assert not endpoint.bodies and counts(again)["query"] == {"new rewrite": 2}
    assert again.cost == 0 and "3 answers are in answers.jsonl, 0 are missing" in estimate(again)


def test_sides_that_have_a_rewrite_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    source = Listed(rewritten(pair(0), "A town.", None), rewritten(pair(1), None, "A town."))
    jobs, endpoint = done(source, tmp_path / "a")
    assert counts(jobs)["query"] == {"has a rewrite": 1, "new rewrite": 1} and len(endpoint.bodies) == 2
    jobs, endpoint = done(source, tmp_path / "b", again=True, sides=("query",))
    assert counts(jobs) == {"query": {"new rewrite": 2}} and len(endpoint.bodies) == 2


def test_a_limit_spreads_over_all_pairs(tmp_path: Path) -> None:
    jobs, endpoint = done(Listed(*map(pair, range(10))), tmp_path, limit=3, sides=("query",))
    assert sorted(number for number, _ in jobs.keys) == [0, 4, 8] and len(endpoint.bodies) == 3


def test_what_cannot_be_asked_about_is_counted(tmp_path: Path) -> None:
    many = pair(0, media=tuple(picture(n) for n in range(17)))
    gallery = replace(pair(1), query=None)
    jobs, endpoint = done(Listed(many, gallery, None), tmp_path, max_failed_share=0.4)
    assert counts(jobs) == {"query": {"too many pictures": 1}, "target": {"new rewrite": 2}}
    assert jobs.broken == {2: "pair 2 is torn."} and len(endpoint.bodies) == 2


def test_too_many_pairs_that_cannot_be_read_stop_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)At most 0.05 of the pairs may be unreadable.*1 of 2.*pair 1 is torn"
    ):
        done(Listed(pair(0), None), tmp_path)


# -- chains of thought ------------------------------------------------------------------------------------


def test_distil_sends_the_items_own_thoughts(tmp_path: Path) -> None:
    source = Listed(pair(0, cot=THINKS), pair(1, rewrite=THINKS), pair(2))
    jobs, endpoint = done(source, tmp_path, way="distil", sides=("query",))
    assert counts(jobs)["query"] == {"new rewrite": 2, "no chain of thought": 1}
    for body in endpoint.bodies:
        assert words_in(body).endswith(
            "Thoughts: The bridge has two towers, so it is Porto.\nA bridge in Porto."
        )
        assert "thoughts" in body["messages"][0]["content"] and SECRET not in str(body)
    first, second, _ = Gains(jobs).pairs(range(3))
    for written in (first, second):
        assert written is not None and written.query is not None
        assert written.query.cot == "The bridge has two towers, so it is Porto.\nA bridge in Porto."
        assert str(written.query.rewrite).startswith("A town as in")


def test_extract_asks_nobody(tmp_path: Path) -> None:
    plain = pair(2, cot="It has two towers. A bridge in Porto.")
    unfit = pair(3, cot="<think>Hm.</think><answer>Porto.</answer>")
    source = Listed(pair(0, cot=THINKS), pair(1, rewrite=THINKS), plain, unfit, pair(4, rewrite="A town."))
    jobs, endpoint = done(source, tmp_path, way="extract", sides=("query",))
    assert not endpoint.bodies and not list(tmp_path.iterdir())
    assert counts(jobs)["query"] == {
        "new rewrite": 2,
        "no marked answer": 1,
        "dropped: length": 1,
        "has a rewrite": 1,
    }
    assert jobs.rewrite(0, "query") == jobs.rewrite(1, "query") == "A bridge in Porto."


# -- faults -------------------------------------------------------------------------------------------------


def test_failures_up_to_the_share_are_counted_and_asked_for_again(tmp_path: Path) -> None:
    def behaviour(body: dict[str, Any], number: int) -> Reply:
        return fault(400, "no such town") if words_in(body).endswith(" 7?") else good(body, number)

    source = Listed(*map(pair, range(10)))
    jobs, endpoint = done(source, tmp_path, behaviour, sides=("query",), max_failed_share=0.1)
    assert (
        counts(jobs)["query"] == {"new rewrite": 9, "failed: refused (400)": 1} and len(endpoint.bodies) == 10
    )
    assert "pair 7 (query): the endpoint refuses it (400): " in jobs.failed_lines()
    assert jobs.rewrite(7, "query") is None and state(jobs).endswith("failed 1; repeated 1")
    jobs, endpoint = done(source, tmp_path, sides=("query",))
    assert len(endpoint.bodies) == 1 and counts(jobs)["query"] == {"new rewrite": 10}


def test_more_failures_than_the_share_stop_and_what_was_answered_is_kept(tmp_path: Path) -> None:
    def behaviour(body: dict[str, Any], number: int) -> Reply:
        return good(body, number) if number % 2 else fault(422, "not this one")

    source = Listed(*map(pair, range(20)))
    message = (
        r"(?s)At most 0.1 of the requests may fail .*but 3 of 20 have failed.*not this one.*\d answers are in"
    )
    with pytest.raises(RimeError, match=message):
        done(source, tmp_path, behaviour, sides=("query",), max_failed_share=0.1, concurrency=1)
    jobs, endpoint = done(source, tmp_path, sides=("query",))
    assert len(endpoint.bodies) == 18 and counts(jobs)["query"] == {"new rewrite": 20}


@pytest.mark.parametrize(("answered", "asked"), [(0, 5), (10, 30)])
def test_an_endpoint_that_fails_again_and_again_is_given_up(
    tmp_path: Path, answered: int, asked: int
) -> None:
    bodies: list[Any] = []

    def behaviour(body: dict[str, Any], number: int) -> Reply:
        bodies.append(body)
        return good(body, number) if number < answered else fault(500, "down")

    with pytest.raises(
        RimeError, match=r"(?s)Some requests must succeed, but the last \d+ have failed.*down"
    ):
        done(
            *(Listed(*map(pair, range(60))), tmp_path, behaviour),
            **{"sides": ("query",), "max_failed_share": 1.0, "retries": 0, "concurrency": 1},
        )
    assert len(bodies) == asked


def test_the_cost_stops_at_its_limit(tmp_path: Path) -> None:
    price = Price(input=1000.0, output=5000.0, limit=0.5)  # 0.2 an answer
    source = Listed(*map(pair, range(9)))
    with pytest.raises(RimeError, match=r"below --price.limit 0.5, but has reached 0.6000. 3 answers are in"):
        done(source, tmp_path, price=price, sides=("query",), concurrency=1)
    jobs, endpoint = done(source, tmp_path, price=replace(price, limit=2.0), sides=("query",))
    assert len(endpoint.bodies) == 6 and jobs.cost == pytest.approx(1.2)
    assert spent(jobs) == "cost 1.2000, 600 tokens read, 120 written"


def test_tokens_that_the_endpoint_does_not_tell_are_estimated_and_said_so(tmp_path: Path) -> None:
    jobs, _ = done(Listed(pair(0)), tmp_path, lambda body, number: answer("A town.", usage=False))
    assert jobs.spent.estimated == 2 and jobs.spent.prompt_tokens > 100 and jobs.spent.completion_tokens == 4
    assert spent(jobs).endswith("(estimated for 2 answers)")


def test_the_estimate_before_anything_is_asked(tmp_path: Path) -> None:
    jobs = make_jobs(Listed(pair(0), pair(0)), tmp_path, price=Price(input=2.0, output=10.0), max_tokens=500)
    jobs.look()
    read = sum(job.prompt_tokens for job in jobs.missing)
    told = estimate(jobs)
    assert (
        told.startswith("4 sides need a rewrite: 2 requests")
        and "0 answers are in answers.jsonl, 2 are missing" in told
    )
    assert f"estimate: {read:,} tokens to read, 160 to write (at most 1,000)." in told
    assert (
        f"cost: about {(2 * read + 1600) / 1e6:.4f}, at most about {(2 * read + 10_000) / 1e6:.4f}." in told
    )
    jobs.answers.close()
    unpriced = make_jobs(Listed(pair(0)), tmp_path)
    unpriced.look()
    assert "cost: not known. --price.input and --price.output" in estimate(unpriced)
    unpriced.answers.close()


def test_filters_are_counted_while_answers_come(tmp_path: Path) -> None:
    bad = ["", "Word.", "a b c d a b c d a b c d", "As an AI, I see a town."]
    jobs, _ = done(
        Listed(*map(pair, range(5))),
        tmp_path,
        lambda body, number: answer((*bad, "A good town.")[number]),
        sides=("query",),
        concurrency=1,
    )
    names = ("format", "length", "repetition", "leakage")
    assert counts(jobs)["query"] == {"new rewrite": 1, **{f"dropped: {name}": 1 for name in names}}
    assert "dropped: format 1, length 1, repetition 1, leakage 1; failed 0; repeated 0" in state(jobs)


def test_an_item_is_never_changed(tmp_path: Path) -> None:
    original = Item("a", (), "b", "c", None, "d")
    source = Listed(Pair("k", "t", "g", original, original))
    jobs, _ = done(source, tmp_path)
    (written,) = Gains(jobs).pairs(range(1))
    assert written == Pair("k", "t", "g", *(replace(original, rewrite="A town as in: a") for _ in range(2)))
