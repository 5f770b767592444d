"""What is shown while a teacher is asked: a bar with the true total in a terminal, lines in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rime_pl import bars
from rime_pl.teacher.meter import Meter
from rime_pl.teacher.settings import Price
from tests.teacher.endpoint import answer, serving
from tests.teacher.pairs import Listed, make_jobs, pair


@pytest.mark.parametrize("terminal", [True, False])
def test_cost_and_counts_are_shown_while_answers_come(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "EVERY", 0.0)
    shown = io.StringIO()
    env = {"TERM": "xterm"}
    console = Console(file=shown, force_terminal=terminal, width=80, soft_wrap=True, _environ=env)
    texts = ["A good town.", "Word.", "A good town.", "A good town."]
    with serving(lambda body, number: answer(texts[number])) as endpoint:
        jobs = make_jobs(
            *(Listed(*map(pair, range(4))), tmp_path, endpoint.url),
            **{"sides": ("query",), "price": Price(input=2.0, output=10.0), "concurrency": 1},
        )
        jobs.look()
        with Meter(jobs, console) as bar:
            jobs.ask(bar.tick)
        jobs.answers.close()
    told = shown.getvalue()
    assert ("4/4" if terminal else "asking: 2 of 4: ") in told
    assert "cost 0.0016, 400 tokens read, 80 written" in told
    assert "dropped: format 0, length 1, repetition 0, leakage 0; failed 0; repeated 0" in told
    if not terminal:
        assert told.count("\n") == 4 and told.startswith("asking: 1 of 4: cost 0.0004"), told


def test_answers_that_are_known_are_done(tmp_path: Path) -> None:
    with serving(lambda body, number: answer("A good town.")) as endpoint:
        for count, done in ((2, 0), (5, 2)):
            source = Listed(*map(pair, range(count)))
            jobs = make_jobs(source, tmp_path, endpoint.url, sides=("query",))
            jobs.look()
            bar = Meter(jobs, Console(file=io.StringIO()))
            assert (bar.done, bar.total) == (done, count)
            jobs.ask(bar.tick)
            assert bar.done == bar.total and len(endpoint.bodies) == count
            jobs.answers.close()
