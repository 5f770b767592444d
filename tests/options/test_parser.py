"""The parser that all commands share: a function's signature on the command line, its help and its errors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from rime_pl.errors import RimeError
from rime_pl.options.parser import PlainParser, options_of, parse
from rime_pl.options.renamed import RENAMED, new_name
from rime_pl.options.words import in_our_spelling


def find(
    query: str,
    *,
    output: Path,
    run: Path | None = None,
    top_k: int = 8,
    json: bool = False,
    tasks: list[str] | None = None,
    ks: list[int] | None = None,
    mode: Literal["one", "both"] = "both",
    rate: float = 0.1,
) -> int:
    """Find something.

    A second paragraph.

    Args:
        query: Words to look for.
        output: File to write.
        run: Folder of a run (default: the newest).
        top_k: Number of pictures shown.
        json: Whether JSON is printed.
        tasks: Tasks; null for all.
        ks: The k of recall@k.
        mode: Embeddings to compare.
        rate: A rate in ``nats``.
    """
    return 0


def found(*words: str) -> dict[str, object]:
    return parse(find, "rime find", words)


def test_the_signature_is_the_command_line() -> None:
    assert found("a cat", "--output", "x.png") == {
        "query": "a cat",
        "output": Path("x.png"),
        "run": None,
        "top_k": 8,
        "json": False,
        "tasks": None,
        "ks": None,
        "mode": "both",
        "rate": 0.1,
    }
    given = found("--output=x", "a cat", "--top-k", "3", "--json", "--tasks", "a", "b", "--ks", "1", "5")
    assert (given["top_k"], given["json"], given["tasks"], given["ks"]) == (3, True, ["a", "b"], [1, 5])
    assert found("c", "--output", "x", "--json", "false", "--tasks", "[a, b]")["tasks"] == ["a", "b"]
    assert found("c", "--output", "x", "--tasks", "null", "--json")["tasks"] is None
    assert found("c", "--output", "x", "--tasks=a", "--ks=[1, 5]")["tasks"] == ["a"]


@pytest.mark.parametrize("query", ["3", "null", "[a", "a: b", "true", "red apple"])
def test_a_text_stays_a_text(query: str) -> None:
    assert found(query, "--output", "x")["query"] == query


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`rime find` needs QUERY and --output PATH. `rime find --help` explains every option."),
        (
            ["c", "--output", "x", "--topk", "3"],
            "--topk is not a setting of `rime find`. Did you mean --top_k?",
        ),
        (
            ["c", "--output", "x", "--top-q=3"],
            "--top_q is not a setting of `rime find`. Did you mean --top_k?",
        ),
        (["c", "--output", "x", "--zzzzzz"], "--zzzzzz is not a setting of `rime find`."),
        (["c", "--output", "x", "--top_k", "x"], "--top_k must be a whole number, but is 'x'."),
        (["c", "--output", "x", "--rate", "no"], "--rate must be a number, but is 'no'."),
        (["c", "--output", "x", "--mode", "two"], "--mode must be 'one' or 'both', but is 'two'."),
        (["c", "--output", "x", "--rate"], "--rate needs a value after it. `rime find --help` says which."),
        (["c", "d", "--output", "x"], "`rime find` does not expect 'd'. Put quotes around several words."),
        (
            ["c", "--output", "x", "--ks", "one"],
            "--ks must be a list of whole numbers or null, but is '[one]'.",
        ),
    ],
)
def test_errors_are_a_sentence_or_two(words: list[str], message: str) -> None:
    with pytest.raises(RimeError) as caught:
        found(*words)
    assert str(caught.value) == message


def test_help_says_the_type_and_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        found("--help")
    assert ended.value.code == 0
    told = re.sub(r" +", " ", capsys.readouterr().out)
    assert told.startswith(
        "usage: rime find QUERY --output VALUE [--OPTION VALUE ...]\n\nFind something. A second"
    )
    for line in (
        "QUERY Words to look for\n",
        "--output PATH File to write (required)\n",
        "--run PATH Folder of a run (default: the newest)\n",
        "--top_k INT Number of pictures shown (default: 8)\n",
        "--json {true,false} Whether JSON is printed (default: false)\n",
        "--tasks STR ... Tasks; null for all\n",
        "--mode {one,both} Embeddings to compare (default: both)\n",
        "--rate FLOAT A rate in nats (default: 0.1)\n",
    ):
        assert line in told
    assert "top-k" not in told and "+" not in told, "one spelling of each option"


# -- old names ------------------------------------------------------------------------------------------


def stub(*names: str) -> PlainParser:
    """A parser that takes these settings, in the groups of their names."""
    parser = PlainParser(prog="rime cma fit")
    parser.add_argument("--config", action="config")
    for name in names:
        parser.add_argument(f"--{name}", type=str)
    return parser


def refused(parser: ArgumentParser, *words: str) -> list[str]:
    with pytest.raises(RimeError) as caught:
        parser.parse_args(words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_each_old_option_is_refused_with_the_new_one(old: str) -> None:
    (told,) = refused(
        stub(RENAMED[old]), f"--{old}", "1e-3" if "." not in RENAMED[old][len(old) :] else "word"
    )
    assert told == f"--{old} is now called {RENAMED[old]}."


def test_an_old_settings_file_is_refused_with_all_new_names(tmp_path: Path) -> None:
    file = tmp_path / "cma.yaml"
    file.write_text(
        "model:\n  learning_rate: 0.1\n  temperature: 0.05\n  reward: anchored\ndata:\n  written: pause\n"
    )
    names = ("model.optimizer.learning_rate", "model.temperature", "model.reward.form", "data.completion")
    assert refused(stub(*names), "--config", str(file)) == [
        f"{file} has old names:",
        "model.learning_rate is now called model.optimizer.learning_rate.",
        "model.reward is now called model.reward.form.",
        "data.written is now called data.completion (its value pause is now filler).",
    ]


def test_an_old_name_that_is_still_taken_is_no_old_name() -> None:
    assert stub("model.learning_rate").parse_args(["--model.learning_rate", "1"]).model.learning_rate == "1"
    known = {"model.reward", "model.reward.form"}
    assert new_name("model.reward", {"form": "anchored"}, known) is None
    assert new_name("model.reward", "reward.yaml", known) is None


# -- settings files -------------------------------------------------------------------------------------

#: A list of 9^5 values in six lines.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\n", "--config FILE: line 2 is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("words\n", "--config FILE: each line must be a setting, `name: value`."),
        (
            "modle:\n  a: 1\n  b: 2\n",
            "FILE: modle is not a setting of `rime cma fit`. Did you mean model?",
        ),
        (
            "model:\n  temprature: 1\n",
            "FILE: model.temprature is not a setting of `rime cma fit`. Did you mean model.temperature?",
        ),
        (
            "model:\n  temperature: 1\n  temperature: 2\n",
            "--config FILE: a setting may stand once in its group, but temperature stands in line 2 and in "
            "line 3. Remove one.",
        ),
        (
            "model: !!python/object/apply:os.system [true]\n",
            "--config FILE: line 1 is not YAML: could not",
        ),
        ("model: 2026-13-45\n", "--config FILE is not YAML: month must be in 1..12."),
        ("model: \x07\n", "--config FILE is not YAML: unacceptable character #x0007"),
        ("model: " + "[" * 20_000, "--config FILE is not YAML: maximum recursion depth"),
        (BOMB, "--config FILE: line 5 must hold at most 10,000 values, but aliases make it hold more. Write"),
        ("model: &a [*a]\n", "--config FILE: line 1 must hold at most 10,000 values, but aliases make it"),
    ],
)
def test_a_faulty_settings_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    (told,) = refused(stub("model.temperature"), "--config", str(file))
    assert told.startswith(message.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_threads", "0", "must be at least 1 and at most 1024, but is 0."),
        ("seed_everything", "-1", "must be at least 0 and at most 4294967295, but is -1."),
        ("model.rate", ".nan", "must be a finite number, but is nan."),
        ("model.rate", "-.inf", "must be a finite number, but is -inf."),
    ],
)
def test_numbers_that_no_setting_can_have(name: str, value: str, message: str, tmp_path: Path) -> None:
    parser = PlainParser(prog="rime cma fit")
    parser.add_argument("--config", action="config")
    parser.add_argument(f"--{name}", type=float if "rate" in name else int)
    assert refused(parser, f"--{name}={value}") == [f"--{name} {message}"]
    group, _, last = name.rpartition(".")
    (tmp_path / "a.yaml").write_text(f"{group}:\n  {last}: {value}\n" if group else f"{last}: {value}\n")
    assert refused(parser, "--config", str(tmp_path / "a.yaml")) == [f"{tmp_path}/a.yaml: {name} {message}"]


def test_many_wrong_names_are_not_all_shown(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("".join(f"name{number}: 1\n" for number in range(9)))
    told = refused(stub("model.temperature"), "--config", str(file))
    assert len(told) == 6 and told[-1] == "4 more names are wrong. Is this a file for another stage?"


def test_a_packaged_settings_file_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, here = in_our_spelling(["--config", "configs/tiny/cma.yaml"])
    (there,) = in_our_spelling(["--config=configs/tiny/cma.yaml"])
    assert Path(here).is_file() and there == f"--config={here}"
    assert list(in_our_spelling(["--config", "configs/none.yaml"]))[1] == "configs/none.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/cma.yaml").write_text("a: 1\n")
    assert list(in_our_spelling(["-c", os.path.join("configs", "cma.yaml")]))[1] == "configs/cma.yaml"  # noqa: PTH118


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all commands take.

    Args:
        seed: Seed of the order.
    """

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SharedMore(Shared):
    """What some commands take as well.

    Args:
        limit: Number of rows.
    """

    limit: int | None = None


def build(output: Path, common: SharedMore = SharedMore(), *, source: Path) -> None:
    """Build.

    Args:
        output: Folder to write.
        common: Settings that commands share.
        source: Folder to read.
    """


def test_the_fields_of_common_are_options_like_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output", "x", "--source", "y"]
    assert parse(build, "rime build", words, positional=False)["common"] == SharedMore()
    given = parse(build, "rime build", [*words, "--limit", "3", "--seed=7"], positional=False)
    assert given == {"output": Path("x"), "source": Path("y"), "common": SharedMore(seed=7, limit=3)}
    assert options_of(build) == ["output", "source", "seed", "limit"]
    with pytest.raises(RimeError, match=r"^--limit must be a whole number or null, but is 'x'\.$"):
        parse(build, "rime build", [*words, "--limit", "x"], positional=False)
    with pytest.raises(RimeError, match=r"--lmit is not a setting of `rime build`. Did you mean --limit\?"):
        parse(build, "rime build", [*words, "--lmit", "3"], positional=False)
    with pytest.raises(SystemExit):
        parse(build, "rime build", ["--help"], positional=False)
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--seed INT Seed of the order (default: 0)" in told and "--limit INT Number of rows" in told
    assert "common" not in told
