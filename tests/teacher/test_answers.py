"""The file of answers: what was answered stays, whatever stops the process, and one process writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rime_pl.errors import RimeError
from rime_pl.teacher.cache import Answer, Answers

ONE, TWO = Answer("A red ring.", "stop", 10, 5), Answer("half \ud83d", "length")


def test_answers_are_there_again(tmp_path: Path) -> None:
    file = tmp_path / "new/answers.jsonl"
    with Answers(file) as answers:
        answers.add("one", "teacher", ONE)
        answers.add("two", "teacher", TWO)
        assert len(file.read_text().splitlines()) == 2, "written at once, not at the end"
    with Answers(file, read_only=True) as answers:
        assert answers.known == {"one": ONE, "two": TWO} and not answers.damaged


def test_a_line_that_a_kill_cut_off_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file) as answers:
        answers.add("one", "teacher", ONE)
        answers.add("two", "teacher", TWO)
    whole = file.read_bytes()
    for length in range(len(whole.splitlines()[0]) + 2, len(whole)):
        file.write_bytes(whole[:length])
        with Answers(file) as answers:
            cut = length < len(whole) - 1  # without its line end the line is still whole
            assert set(answers.known) == ({"one"} if cut else {"one", "two"}) and answers.damaged == cut
            answers.add("three", "teacher", ONE)
        with Answers(file, read_only=True) as answers:
            assert {"one", "three"} <= set(answers.known) and answers.damaged == cut
    file.write_bytes(whole[:20])
    with Answers(file) as answers:
        assert not answers.known and answers.damaged == 1


def test_damaged_lines_are_counted_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file) as answers:
        answers.add("one", "teacher", ONE)
    good = json.loads(file.read_text())
    bad = [{**good, "text": 3}, {**good, "key": None}, {**good, "prompt_tokens": "9"}, [], 7]
    with file.open("ab") as stream:
        stream.write(b"\xff\n\n" + b"[" * 100_000 + b"\n")
        stream.write("".join(json.dumps(each) + "\n" for each in bad).encode())
    with Answers(file, read_only=True) as answers:
        assert answers.known == {"one": ONE} and answers.damaged == 2 + len(bad)


def test_another_file_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("query_text,target_text\na,b\n")
    with pytest.raises(RimeError, match="--answers must be a file that `rime rewrite` has written"):
        Answers(file)
    assert file.read_text() == "query_text,target_text\na,b\n"
    with pytest.raises(RimeError, match="--answers must be a file, but"):
        Answers(tmp_path)


def test_two_processes_do_not_pay_for_the_same(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file), pytest.raises(RimeError, match=r"Another process writes .*answers.jsonl just now"):
        Answers(file)
    with Answers(file) as answers:
        answers.add("one", "teacher", ONE)
    assert Answers(file, read_only=True).known == {"one": ONE}


def test_a_run_without_an_answer_leaves_no_file(tmp_path: Path) -> None:
    with Answers(tmp_path / "answers.jsonl"):
        pass
    with Answers(tmp_path / "other.jsonl", read_only=True) as answers:
        assert not answers.known
    assert not list(tmp_path.iterdir())
