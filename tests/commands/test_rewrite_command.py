"""`rime rewrite` through the command line: cost first, answers kept through a kill, faults in a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.datamodules.builders.table import read_table
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.teacher import client
from tests.teacher.endpoint import Endpoint, Reply, answer, fault, serving, words_in
from tests.teacher.pairs import SECRET, make_corpus, make_table

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def good(body: dict[str, Any], number: int) -> Reply:
    return answer(f'A town, as in "{words_in(body).split("Text: ")[-1]}".')


def words(endpoint: Endpoint, *more: str) -> list[str]:
    return ["rewrite", "--teacher.model", "teacher", "--teacher.base_url", endpoint.url, *more]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def in_a_process(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "rime_pl", *arguments],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment},
    )


def test_a_corpus_gets_its_rewrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, new = make_corpus(tmp_path / "data", 6), tmp_path / "new"
    before = files(tmp_path)
    with serving(good) as endpoint:
        arguments = words(endpoint, "--data", str(data), "--output", str(new))
        prices = ["--price.input", "2", "--price.output", "10"]
        assert main([*arguments, *prices, "--dry_run"]) == 0
        told = capsys.readouterr().out
        assert "16 sides need a rewrite: 16 requests" in told and "16 are missing" in told
        assert "cost: about 0.0" in told and "not asked" in told
        assert not endpoint.bodies and files(tmp_path) == before, "a dry run asks nothing and leaves nothing"
        assert main([*arguments, *prices]) == 0
        told = capsys.readouterr().out
        assert "asked: cost 0.0064, 1,600 tokens read, 320 written" in told and f"written: {new}" in told
        assert len(endpoint.bodies) == 16
        assert not any(SECRET in str(body) for body in endpoint.bodies if "Which town" in str(body))
    reader = ShardReader(read_split(new, "train"))
    for number in range(6):
        query = reader.read(number).query
        assert query and query.rewrite == f'A town, as in "Which town is number {number}?".'
    assert {name for name in files(tmp_path) - before if not name.startswith("new/")} == {"new.answers.jsonl"}
    with serving(lambda body, number: fault(500)) as endpoint:  # a second run pays for nothing
        again = [*words(endpoint, "--data", str(data), "--output", str(tmp_path / "again"))]
        assert main([*again, "--answers", str(tmp_path / "new.answers.jsonl")]) == 0 and not endpoint.bodies
    assert "16 answers are in new.answers.jsonl, 0 are missing" in capsys.readouterr().out
    assert (tmp_path / "again/train/train-000000.tar").read_bytes() == (
        new / "train/train-000000.tar"
    ).read_bytes()


def test_a_table_gets_its_rewrites_and_drops_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(tmp_path / "in", 4)

    def behaviour(body: dict[str, Any], number: int) -> Reply:
        if SECRET in str(body):
            return fault(400, "too small") if "zanzibar 3" in str(body) else answer("Sorry, I cannot.")
        return good(body, number)

    output = tmp_path / "in/new.csv"
    with serving(behaviour) as endpoint:
        arguments = words(endpoint, "--table", str(table), "--output", str(output))
        assert main([*arguments, "--teacher.max_failed_share", "0.2"]) == 0
    told = capsys.readouterr().out
    assert "dropped: format" in told and "failed: refused (400)" in told and "1 x refused (400)" in told
    assert "pairs.csv lines 8 to 9 (target): the endpoint refuses it (400): " in told and "too small" in told
    rows = read_table(output).rows
    assert [bool(row.pair.query and row.pair.query.rewrite) for row in rows] == [True] * 4
    assert [row.pair.target.rewrite for row in rows] == [None] * 4
    listed = (tmp_path / "in/new.csv.unwritten.txt").read_text().splitlines()
    assert len(listed) == 4 and "(target): dropped: format: a refusal: 'Sorry, I cannot.'" in listed[0]


def test_nothing_that_passes_is_exit_code_1(tmp_path: Path) -> None:
    table = make_table(tmp_path, 2)
    with serving(lambda body, number: answer("Word.")) as endpoint:
        assert main(words(endpoint, "--table", str(table), "--output", str(tmp_path / "new.csv"))) == 1


def test_extract_needs_no_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table(
        tmp_path, 2, query_cot="<think>A bridge, so it is Porto.</think><answer>A bridge in Porto.</answer>"
    )
    output = tmp_path / "new.csv"
    assert main(["rewrite", "--way", "extract", "--table", str(table), "--output", str(output)]) == 0
    assert "no marked answer" in capsys.readouterr().out
    query = read_table(output).rows[0].pair.query
    assert (
        query and query.rewrite == "A bridge in Porto." and not (tmp_path / "new.csv.answers.jsonl").exists()
    )


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (fault(401, "bad key"), "rime: error: The endpoint refuses every request (401): "),
        (fault(500, "down"), "rime: error: At most 0.05 of the requests may fail"),
        (fault(429, "slow down"), "rime: error: At most 0.05 of the requests may fail"),
        (Reply(hangs=2.0), "rime: error: At most 0.05 of the requests may fail"),
        (Reply(body=b"<html>"), "rime: error: At most 0.05 of the requests may fail"),
        (
            Reply(body=answer("A town.").body, missing=30),
            "rime: error: At most 0.05 of the requests may fail",
        ),
    ],
)
def test_an_endpoint_of_no_use_is_a_clear_stop(
    reply: Reply, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_table(tmp_path / "in", 3)
    before, began = files(tmp_path), time.monotonic()
    with serving(lambda body, number: reply) as endpoint:
        arguments = words(endpoint, "--table", str(table), "--output", str(tmp_path / "in/new.csv"))
        assert main([*arguments, "--teacher.retries", "1", "--teacher.timeout", "0.3"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(message) and "Traceback" not in told.err
    assert files(tmp_path) == before and time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "`rime rewrite` needs --data CORPUS or --table FILE, one of them."),
        (["--data", "x", "--table", "y"], "`rime rewrite` needs --data CORPUS or --table FILE, one of them."),
        (["--data", "x", "--media", "y"], "--media belongs to --table"),
        (["--data", "x"], "data.path must be a corpus folder, but 'x' does not exist."),
        (["--table", "x.csv", "--limit", "0"], "--limit must be 1 or more, but is 0."),
        (["--table", "x.csv", "--teacher.model", ""], "`rime rewrite` needs --teacher.model NAME"),
        (["--table", "x.csv", "--teacher.base_url", "x"], "--teacher.base_url must be an address such as"),
        (["--table", "x.csv", "--price.limit", "1"], "--price.limit needs --price.input or --price.output"),
        (
            ["--table", "x.csv", "--teacher.retires", "1"],
            "--teacher.retires is not a setting of `rime rewrite`.",
        ),
        (["--table", "x.csv", "--filters.min_words", "0"], "filters.min_words must be 1 or more, but is 0."),
    ],
)
def test_errors_are_plain(
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("query_text,target_text\na,b\n")
    assert main(["rewrite", "--output", "new.csv", "--teacher.model", "teacher", *more]) == 2
    assert capsys.readouterr().err.startswith(f"rime: error: {message}")
    assert files(tmp_path) == {"x.csv"}


def test_help_and_the_way_to_the_package_without_it(tmp_path: Path) -> None:
    table = make_table(tmp_path, 1)
    arguments = ["--table", str(table), "--output", str(tmp_path / "new.csv"), "--teacher.model", "teacher"]
    code = (
        "import sys; sys.modules['openai'] = None; from rime_pl.__main__ import main;"
        "sys.exit(main(['rewrite', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more, status in ((["--help"], 0), (arguments, 2), ([*arguments, "--dry_run"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, *more], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == status, done.stderr
        if status:
            assert (
                "Install it: pip install 'rime_pl[rewrite]'" in done.stderr and "Traceback" not in done.stderr
            )
        elif more == ["--help"]:
            assert "--teacher.model STR" in done.stdout and "--gain.run PATH" in done.stdout


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stop_loses_nothing_that_was_answered(signum: int, code: int, tmp_path: Path) -> None:
    table = make_table(tmp_path, 30)
    output, kept = tmp_path / "new.csv", tmp_path / "new.csv.answers.jsonl"
    stopped = threading.Event()

    def answers_twelve(body: dict[str, Any], number: int) -> Reply:
        if number >= 12:
            stopped.wait(60)
        return good(body, number)

    with serving(answers_twelve) as endpoint:
        arguments = words(
            endpoint, "--table", str(table), "--output", str(output), "--teacher.concurrency", "3"
        )
        process = in_a_process(*arguments)
        end = time.monotonic() + 60
        # an answer that was sent may not be written yet, so it is the file that tells when to stop
        while _lines(kept) < 9 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
        stopped.set()
        assert process.returncode == code and "Traceback" not in said, said
        answers = kept.read_text().splitlines()
        assert len(answers) >= 9 and not output.exists(), "those in flight were not answered yet"
        if signum != signal.SIGKILL:
            assert said.startswith(f"rime: stopped. {len(answers)} answers are in {kept}"), said
        endpoint.bodies.clear()
        assert main(arguments) == 0
        assert len(endpoint.bodies) == 60 - len(answers)
    assert len({json.loads(line)["key"] for line in kept.read_text().splitlines()}) == 60
    assert all(row.pair.target.rewrite for row in read_table(output).rows)


def _lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


def test_settings_of_the_endpoint_may_come_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = make_table(tmp_path, 1), tmp_path / "new.csv"
    with serving(good) as endpoint:
        settings = tmp_path / "teacher.yaml"
        settings.write_text(f"model: teacher\nbase_url: {endpoint.url}\n")
        given = ["--table", str(table), "--output", str(output), "--teacher", str(settings)]
        assert main(["rewrite", *given]) == 0 and len(endpoint.bodies) == 2
    settings.write_text("modell: teacher\n")
    capsys.readouterr()
    assert main(["rewrite", *given]) == 2
    assert "Traceback" not in capsys.readouterr().err
