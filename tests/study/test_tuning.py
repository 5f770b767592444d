"""The weight of the cross-entropy: both arms get the same grid, and validation chooses."""

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.errors import RimeError
from rime_pl.run_folder import RunFolder
from rime_pl.study.comparison import comparison_tables
from rime_pl.study.tuning import ARMS, GRID, read_tuned, tune
from tests.study.runs import change, record, run_folder, trained

#: What validation finds for each weight; the rewrite has a tie, of which the smaller weight wins.
FOUND = {
    "rewrite": {"1": 0.5, "4": 0.6, "16": 0.6, "64": 0.5},
    "chain_of_thought": {"1": 0.4, "4": 0.5, "16": 0.6, "64": 0.7},
}


@pytest.fixture
def words_of_grid(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Name of each run of the grid that was trained -> its words."""
    done: dict[str, list[str]] = {}

    def train(run: RunFolder, name: str, words: list[str]) -> None:
        done[name] = words
        arm, value = name.removeprefix("tune_").rsplit("_", 1)
        last = {"recall@1/gen-gen": FOUND[arm][value], "trace/num_reference": 36.0}
        history = [{"recall@1/gen-gen": 0.99}, last]
        change(trained(words, stage="sft"), "summary.json", history=history, after={})

    monkeypatch.setattr("rime_pl.study.controls._train", train)
    monkeypatch.setattr("rime_pl.study.controls.chain_of_thought_lengths", lambda run: (48, 0.5))
    return done


def test_both_arms_try_the_same_weights_without_the_test_split(
    tmp_path: Path, words_of_grid: dict[str, list[str]]
) -> None:
    run, file = run_folder(tmp_path / "sft", [1], stage="sft"), tmp_path / "tuned" / "sft-mine.json"
    command = ["tune", "--run", str(run.path), "--output", str(file)]
    assert main(command) == 0
    assert set(words_of_grid) == {f"tune_{arm}_{value:g}" for arm in ARMS for value in GRID}
    for name, words in words_of_grid.items():
        assert words[words.index("--data.test_modes") + 1] == "[]"
        assert words[words.index("--data.limit_val_queries") + 1] == "null"
        assert words[words.index("--trainer.check_val_every_n_epoch") + 1] == "3"
        assert float(words[words.index("--model.lambda_ce") + 1]) == float(name.rsplit("_", 1)[1])
        assert ("cot" in words) == ("chain_of_thought" in name)
    found = json.loads(file.read_text())
    assert {arm: found[arm]["tried"] for arm in ARMS} == FOUND
    assert {arm: found[arm]["chosen"] for arm in ARMS} == {"rewrite": 4.0, "chain_of_thought": 64.0}
    words_of_grid.clear()
    assert main(command) == 0 and not words_of_grid  # what is finished is kept
    table = comparison_tables(record("sft", 0.5) | {"tuned": found})[-2].markdown()
    assert "| chain of thought | 0.400 | 0.500 | 0.600 | 0.700 | 64 |" in table
    assert "all validation queries (36 are annotated)" in table and "a better one may lie beyond it" in table
    found["chain_of_thought"]["chosen"] = 16.0
    assert "beyond" not in comparison_tables(record("sft", 0.5) | {"tuned": found})[-2].markdown()


def test_a_run_with_another_weight_is_not_compared(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    tried = {f"{value:g}": 0.5 for value in GRID}
    found: dict[str, Any] = {arm: {"tried": tried, "chosen": 4.0} for arm in ARMS}
    found["queries"] = 36
    file.write_text(json.dumps(found | {"data_hash": "of mine"}))
    run = run_folder(tmp_path / "sft", [1], stage="sft")  # with 4
    assert read_tuned(file, run)["rewrite"]["chosen"] == 4
    file.write_text(json.dumps(found | {"data_hash": "of mine", "rewrite": {"tried": tried, "chosen": 1.0}}))
    with pytest.raises(
        RimeError, match=r"model.lambda_ce 4.0 and not 1. Train it: .* --seed 3 .*lambda_ce 1"
    ):
        read_tuned(file, run)
    file.write_text(json.dumps(found | {"data_hash": "of others"}))
    with pytest.raises(RimeError, match=r"must be of the corpus of .*sft, but is of another one"):
        read_tuned(file, run)
    file.write_text(
        json.dumps(found | {"data_hash": "of mine", "rewrite": {"tried": {"4": 0.5}, "chosen": 4.0}})
    )
    with pytest.raises(RimeError, match=r"must hold the weights 1, 4, 16, 64 of both arms, but does not"):
        read_tuned(file, run)
    for damaged in ("{", "[]", json.dumps(found)):
        file.write_text(damaged)
        with pytest.raises(RimeError, match=r"--tuned must name a file that `rime tune` wrote"):
            read_tuned(file, run)


def test_only_sft_is_tuned(tmp_path: Path) -> None:
    with pytest.raises(RimeError, match=r"--tuned is for runs of SFT, but .*aligned is of cma"):
        read_tuned(tmp_path / "tuned.json", run_folder(tmp_path / "aligned", [1]))
    with pytest.raises(RimeError, match=r"--run must name a finished SFT run, but .*cma is none"):
        tune(run_folder(tmp_path / "cma", [1]))
    with pytest.raises(RimeError, match=r"--run must name a finished SFT run, but .*none is none"):
        tune(RunFolder(tmp_path / "none"))
