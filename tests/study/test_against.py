"""Two finished runs are compared on the same queries, or the reason why they are not is told."""

from pathlib import Path

import pytest

from rime_pl.run_folder import RunFolder, write_json
from rime_pl.study.against import COLUMNS, differences
from tests.study.runs import change, run_folder


def test_a_difference_has_its_interval_on_paired_queries(tmp_path: Path) -> None:
    other = run_folder(tmp_path / "cma", [1, 2, 2, 1])
    better = run_folder(tmp_path / "cma-2", [1, 1, 2, 1])
    table = differences([("cma", other), ("cma-2", better)], other)
    (row,) = table.rows  # a run is not compared with itself
    assert row[0] == "cma-2" and row[-1] == "-" and len(row) == len(table.head) == len(COLUMNS) + 2
    # one query of four is won and none is lost: with resampled queries between 0 and 3 of 4, as a rule
    assert set(row[1:-1]) == {"+0.250\n+0.000 to +0.750"}
    (row,) = differences([("cma", other)], better).rows
    assert set(row[1:-1]) == {"-0.250\n-0.750 to +0.000"}, "the sign is that of the run minus the other"


def test_what_else_differs_is_told(tmp_path: Path) -> None:
    other = run_folder(tmp_path / "cma", [1, 2])
    unlike = run_folder(tmp_path / "cma-2", [1, 2], stage="sft", seed=4)
    write_json(other.path / "origin.json", {"base_files": "a", "differs_from_recipe": {}})
    write_json(unlike.path / "origin.json", {"base_files": "b", "differs_from_recipe": {}})
    unlike = change(unlike, "manifest.json", steps=5, data_hash="of another")
    (row,) = differences([("cma-2", unlike)], other).rows
    assert row[-1] == (
        "stage sft instead of cma; seed 4 instead of 3; training steps 5 instead of 9; another base model; "
        "another corpus"
    )


@pytest.mark.parametrize("ranks", [[1, 2, 1], [1]])
def test_other_queries_are_refused(tmp_path: Path, ranks: list[int]) -> None:
    other = run_folder(tmp_path / "cma", [1, 2])
    (row,) = differences([("cma-2", run_folder(tmp_path / "cma-2", ranks))], other).rows
    assert set(row[1:-1]) == {"-"} and row[-1].startswith("tested on other queries")


def test_another_gallery_is_refused(tmp_path: Path) -> None:
    """The same queries among more candidates are harder: the difference would not be of the runs."""
    other, larger = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    write_json(larger.path / "ranks.json", [query | {"gallery": 900} for query in larger.ranks])
    (row,) = differences([("cma-2", RunFolder(larger.path))], other).rows
    assert set(row[1:-1]) == {"-"} and "among other candidates" in row[-1]


def test_a_mode_that_was_not_measured_has_no_difference(tmp_path: Path) -> None:
    other, cheap = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2"))
    write_json(cheap.path / "ranks.json", [query | {"ranks": {"disc-disc": 1}} for query in cheap.ranks])
    (row,) = differences([("cma-2", RunFolder(cheap.path))], other).rows
    assert dict(zip(COLUMNS, row[1:-1], strict=True)) == dict.fromkeys(COLUMNS, "-") | {
        "disc-disc": "+0.500\n+0.000 to +1.000"
    }


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    other, damaged, whole = (run_folder(tmp_path / name, [1, 2]) for name in ("cma", "cma-2", "cma-3"))
    (damaged.path / "ranks.json").write_text("[{")
    first, second = differences([("cma-2", damaged), ("cma-3", whole)], other).rows
    assert "damaged" in first[-1] and second[1].startswith("+0.000")
