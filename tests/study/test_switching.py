"""The adaptive search in the table of a run: validation chooses the threshold, the test split measures it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rime_pl.inference.adaptive import Asked
from rime_pl.run_folder import RunFolder
from rime_pl.study import switching
from rime_pl.study.comparison import comparison_tables
from rime_pl.study.measure import seed_result
from rime_pl.study.record import record_of
from tests.study.runs import record, run_folder

#: Margin, found without a rewrite, found with one, for the queries of each split. On validation the rewrite
#: pays below 0.25. On the test split, with other values, "always" would be best; it must not be chosen.
SPLITS = {
    "val": [(0.1, 0, 1), (0.2, 0, 1), (0.3, 1, 0), (0.4, 1, 0)],
    "test": [(0.1, 0, 1), (0.15, 0, 0), (0.35, 0, 1), (0.45, 1, 1)],
}


class Vectors:
    def __init__(self, rows: list[tuple[float, int, int]]) -> None:
        self.split = SimpleNamespace(tasks=["twin"] * len(rows))
        self.columns = [torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True)]

    def asked(self, target_mode: str) -> Asked:
        margin, never, always = self.columns
        return Asked(margin, never, always if target_mode == "generative" else never, self.split.tasks)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were embedded, in order."""
    splits: list[str] = []

    def embed(model: Any, split: str) -> Vectors:
        splits.append(split)
        return Vectors(SPLITS[split])

    monkeypatch.setattr(switching, "load", lambda path: SimpleNamespace(name="the adapter"))
    monkeypatch.setattr(switching, "measure", embed)
    return splits


def test_validation_chooses_and_the_test_split_measures(tmp_path: Path, measured: list[str]) -> None:
    run = run_folder(tmp_path / "sft", [1], stage="sft")
    found = switching.measure_adaptive(run)
    assert measured == ["val", "test"] and found["target_mode"] == "generative"
    assert (found["recall@1"], found["share"]) == (0.5, 0.5)  # the first two get a rewrite
    assert (found["never"], found["always"]) == (0.25, 0.75)
    assert switching.measure_adaptive(run) == found and len(measured) == 2  # kept
    (run.path / switching.FILE).write_text('{"model": "another adapter"}')
    assert switching.measure_adaptive(run) == found and len(measured) == 4


def test_it_is_a_row_of_the_table_once_all_seeds_have_it(tmp_path: Path, measured: list[str]) -> None:
    runs = [run_folder(tmp_path / name, [1, 2], seed=n) for n, name in enumerate("01")]
    seeds: list[dict[str, RunFolder]] = [{"cma": run} for run in runs]
    switching.measure_adaptive(runs[0])
    assert record_of(seed_result("cma", one) for one in seeds)["adaptive"] == {}
    switching.measure_adaptive(runs[1])
    adaptive = record_of(seed_result("cma", one) for one in seeds)["adaptive"]
    assert adaptive["recall@1"] == [0.5, 0.5, 0.5] and adaptive["share"][0] == 0.5
    table = comparison_tables(record("cma", 0.5, 0.7) | {"adaptive": adaptive})[0].markdown()
    assert "| CMA, adaptive search | - | - | - | 0.500 (0.50-0.50) | - | - | 3.0 |" in table
    assert "(50% of the queries)" in table
