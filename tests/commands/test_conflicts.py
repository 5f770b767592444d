"""Options that would be ignored are refused by name; no model is loaded for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rime_pl.__main__ import main
from rime_pl.commands import conflicts, demo, index, search
from rime_pl.commands.conflicts import Conflict
from rime_pl.options.parser import options_of

#: A value of each option that is not its default.
GIVEN = {
    **{"media": ["m"], "target_mode": ["generative"], "strategy": ["two-step"], "candidates": ["5"]},
    **{"threshold": ["0.5"], "faiss": ["true"], "mode": ["discriminative"], "images": ["m"], "top_k": ["3"]},
    **{"output": ["x.png"], "task": ["t"], "instruction": ["i"], "batch_size": ["3"], "index": ["x"]},
    **{"query_media": ["a.png"], "splits": ["test"], "galleries": ["pictures"], "part_size": ["3"]},
}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--run", "nowhere"]) == 2
    return capsys.readouterr().err.removeprefix("rime: error: ").strip()


@pytest.mark.parametrize("option", [o.lower() for o in conflicts.SEARCH[0].options])
def test_nothing_of_a_search_goes_with_calibrate(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["a ring"] if option == "query" else [f"--{option}", *GIVEN[option]]
    name = "QUERY" if option == "query" else f"--{option}"
    assert refused(["search", *given, "--calibrate"], capsys) == (
        f"{name} has no effect next to --calibrate, which chooses the threshold of a run and searches "
        "nothing. Leave it out."
    )


def test_each_option_of_search_is_used_or_refused_next_to_calibrate() -> None:
    known = {option.lower() for option in conflicts.SEARCH[0].options}
    assert set(options_of(search.run)) == known | {"run", "device", "base", "calibrate"}


@pytest.mark.parametrize("function", [index.run, search.run, demo.run])
def test_the_table_names_options_that_there_are(function: object) -> None:
    table: dict[object, tuple[Conflict, ...]] = {
        index.run: conflicts.INDEX,
        search.run: conflicts.SEARCH,
        demo.run: conflicts.DEMO,
    }
    names = {option.lower() for conflict in table[function] for option in conflict.options}
    assert names <= set(options_of(function))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["index", "p", "--from_parquet", "v", "--splits", "test", "--mode", "discriminative"],
            "SOURCE, --splits, --mode have no effect next to --from_parquet",
        ),
        (["index", "--from_parquet", "v", "--part_size", "9"], "--part_size has no effect next to --from"),
        (["index", "--from_parquet", "v", "--batch_size", "9"], "--batch_size has no effect next to --from"),
        (["index", "--from_parquet", "v", "--galleries", "g"], "--galleries has no effect next to --from"),
        (["index", "p", "--galleries", "g"], "--galleries has no effect because the source is no corpus."),
        (
            ["index", "p", "--media", "m"],
            "--media has no effect because the source is no table. Leave it out.",
        ),
        (["index", "p", "--task", "t", "--instruction", ""], "--task has no effect next to --instruction"),
        (["search", "a", "--strategy", "adaptive"], "--strategy has no effect without --index FOLDER."),
        (["search", "a", "--index", "x", "--images", "m"], "--images has no effect next to --index"),
        (["search", "a", "--index", "x", "--batch_size", "9"], "--batch_size has no effect next to --index"),
        (
            ["search", "a", "--index", "x", "--task", "t", "--instruction", "i"],
            "--task has no effect next to --instruction",
        ),
        (
            ["search", "a", "--index", "x", "--candidates", "9"],
            "--candidates has no effect unless --strategy",
        ),
        (
            ["search", "a", "--index", "x", "--candidates", "9", "--strategy", "adaptive"],
            "--candidates has no effect unless --strategy is two-step",
        ),
        (
            ["search", "a", "--index", "x", "--threshold", "0", "--strategy", "two-step"],
            "--threshold has no effect unless --strategy is adaptive",
        ),
        (
            ["search", "a", "--index", "x", "--mode", "discriminative", "--strategy", "adaptive"],
            "--mode has no effect next to --strategy adaptive",
        ),
        (["demo", "--media", "m"], "--media has no effect without --index FOLDER"),
        (["demo", "--index", "x", "--batch_size", "9"], "--batch_size has no effect next to --index"),
        (
            ["demo", "--index", "x", "--task", "t", "--instruction", "i"],
            "--task has no effect next to --instruction",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    there = ["--output", "made.index"] if words[0] == "index" else []
    assert refused([*words, *there], capsys).startswith(told)


@pytest.mark.parametrize(
    "words",
    [
        [
            "search",
            "a",
            "--index",
            "x",
            "--strategy",
            "two-step",
            "--candidates",
            "9",
            "--mode",
            "generative",
        ],
        ["search", "a", "--index", "x", "--strategy", "adaptive", "--threshold", "0.1", "--task", "t"],
        ["search", "a", "--images", "m", "--task", "t", "--instruction", "i", "--batch_size", "9"],
        ["search", "--calibrate"],
        ["demo", "--task", "t", "--instruction", "i", "--batch_size", "9", "--port", "0"],
    ],
)
def test_what_is_used_is_not_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "has no effect" not in refused(words, capsys)
